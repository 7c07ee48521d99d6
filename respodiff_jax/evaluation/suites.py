"""Suites: what a model is asked to draw, and the prompts that classify its pictures.

A suite is a JSON file. `winobias` is the paper's, for Stable Diffusion. A model folder may have its
own as `suite.json`, as the bundled Emoji World has, and users can write their own.
"""

import dataclasses
import importlib.resources
import os
import pathlib
import string
from collections.abc import Mapping
from typing import Annotated, Any

from msgspec import Meta

from respodiff_jax.backbone import local_folder
from respodiff_jax.data import prompt_files
from respodiff_jax.errors import UserError
from respodiff_jax.storage import PathLike, checked, read_json

Text = Annotated[str, Meta(pattern=r"\S")]
# value -> prompts whose features are averaged; two values or more, to tell apart
Classes = Annotated[
    Mapping[str, Annotated[tuple[Text, ...], Meta(min_length=1)]], Meta(min_length=2)
]

PARTS = ("fairness", "quality", "safety", "intent", "curves", "attack")
ON_DEMAND = ("curves", "attack")  # parts that "all" leaves out
# Kinds of prompts of the part intent, see `evaluation.intent`; and `named_kind`.
OPEN, NOBODY, ASKED = "open", "nobody", "asked"
SUITE_FILE = "suite.json"
# part -> the columns of its prompt files, and the column that pictures are counted under
_LAYOUTS = {
    "fairness": (prompt_files.PROFESSIONS, "profession"),
    "quality": (prompt_files.CAPTIONS, None),
    "safety": (prompt_files.I2P, "categories"),
    "attack": (prompt_files.I2P, "categories"),
}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to draw.

    Attributes:
      text: the prompt.
      subject: what its pictures are counted under, or None.
      seed: the seed of its first picture, or the next one that no earlier picture of the same text
        has; None takes the next of the evaluation's seeds.
    """

    text: str
    subject: str | None = None
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """The prompts of a part of an evaluation.

    Attributes:
      prompts: in the order of drawing.
      identity: the file that they come from, JSON-able; None if they are the suite's.
      notes: what a reader of the results should know about them.
    """

    prompts: tuple[Prompt, ...]
    identity: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Suite:
    """The prompts and classifiers of all parts of an evaluation.

    Attributes:
      name: name of the suite.
      clip: the CLIP that classifies and scores: a folder (relative to the suite's file) or hub id.
      subjects: what fairness is measured over, for example professions.
      templates: prompts with `{subject}` ("teacher") or `{a_subject}` ("a teacher").
      attributes: attribute -> value -> classifier prompts. An attribute is named as the concept
        group that makes it fair.
      subject_classes: subject -> classifier prompts, to check that a picture still shows its
        subject; None if the CLIP cannot recognise them.
      unsafe_classes: value -> classifier prompts, the first value being the safe one; None if only
        detectors (NudeNet, Q16) judge safety.
      safety_prompts: pairs of a prompt that does not ask for unsafe content and its category; None
        if a prompt file has to bring them.
      captions: prompts of the quality part; None if a prompt file has to bring them.
      guidance_scale: default guidance scale of the pictures.
      named: attribute -> value -> template of prompts that name the value, with `{subject}` or
        `{a_subject}`; None leaves out the part intent.
      nobody: prompts of pictures without people.
      asked: templates of prompts that ask for something unsafe.
      note: what readers of a report should know about the pictures.

    Raises:
      UserError: naming the field that is not as described.
    """

    name: str
    clip: str
    subjects: Annotated[tuple[Text, ...], Meta(min_length=1)]
    templates: Annotated[tuple[Text, ...], Meta(min_length=1)]
    attributes: Mapping[str, Classes]
    subject_classes: Classes | None = None
    unsafe_classes: Classes | None = None
    safety_prompts: tuple[tuple[Text, Text], ...] | None = None
    captions: tuple[Text, ...] | None = None
    guidance_scale: float = 7.5
    named: Mapping[str, Mapping[str, Text]] | None = None
    nobody: tuple[Text, ...] = ()
    asked: tuple[Text, ...] = ()
    note: str = ""

    def __post_init__(self):
        def check(condition, message):
            if not condition:
                raise UserError(f"suite {self.name!r:.100}: {message}")

        check(
            len(set(self.subjects)) == len(self.subjects),
            f"subjects are {self.subjects!r:.200}, expected each once",
        )
        named = self.named or {}
        for attribute, templates in named.items():
            check(
                set(templates) <= set(self.attributes.get(attribute, ())),
                f"named has {attribute!r:.50}: {templates!r:.100}, expected a template for some of"
                f" its values, {list(self.attributes.get(attribute, ()))!r:.50}",
            )
        explicit = [template for values in named.values() for template in values.values()]
        for template in (*self.templates, *self.asked, *explicit):
            check(
                prompt_files.is_template(template),
                f"template {template!r:.100}, expected a text with {{subject}} or {{a_subject}},"
                " and no other braces",
            )
        if self.subject_classes is not None:
            missing = sorted(set(self.subjects) - set(self.subject_classes))
            check(not missing, f"subject_classes lack {missing!r:.200}")

    def prompts(self, subject: str) -> list[str]:
        """The prompts of a subject, one for each template."""
        return prompt_files.fill_in(self.templates, subject)

    def prompts_for(self, part: str) -> tuple[Prompt, ...]:
        """The prompts of a part; () if the suite has none."""
        if part == "intent":
            return self._intent_prompts()
        if part in ("fairness", "curves"):
            return tuple(Prompt(t, name) for name in self.subjects for t in self.prompts(name))
        if part == "quality":
            return tuple(Prompt(text) for text in self.captions or ())
        if part == "attack":
            return tuple(
                Prompt(text, _category(template))
                for template in self.asked
                for name in self.subjects
                for text in prompt_files.fill_in([template], name)
            )
        return tuple(Prompt(text, category) for text, category in self.safety_prompts or ())

    def _intent_prompts(self) -> tuple[Prompt, ...]:
        """The subject of each prompt is its kind."""
        if self.named is None:
            return ()
        templates = {OPEN: self.templates[:1], ASKED: self.asked} | {
            named_kind(attribute, value): (template,)
            for attribute, values in self.named.items()
            for value, template in values.items()
        }
        prompts = [
            Prompt(text, kind)
            for kind, own in templates.items()
            for subject in self.subjects
            for text in prompt_files.fill_in(own, subject)
        ]
        return (*prompts, *(Prompt(text, NOBODY) for text in self.nobody))

    def attribute(self, name: str) -> Classes:
        """The values of an attribute with their classifier prompts.

        Raises:
          UserError: if the suite has no such attribute.
        """
        if name not in self.attributes:
            raise UserError(
                f"suite {self.name!r} has no attribute {name!r}, only {list(self.attributes)}; add"
                " it with its classifier prompts to a suite file"
            )
        return self.attributes[name]


def named_kind(attribute: str, value: str) -> str:
    """The kind of the prompts that name a value."""
    return f"names {attribute}={value}"


def load_suite(name: PathLike | None, model: str | None = None) -> Suite:
    """Reads a suite.

    Args:
      name: a suite of this package ("winobias"), a JSON file, or a model with a suite of its own
        ("emoji-world"). None is the `suite.json` of the
        model's folder, or "winobias" if there is none.
      model: the model's name, as given to `load_backbone`, or None.

    Raises:
      UserError: if there is no such suite or it is not valid, naming what is wrong.
    """
    own = local_folder(model or "") / SUITE_FILE
    shipped = importlib.resources.files("respodiff_jax.data") / "suites"
    if name is None:
        path = own if model and own.is_file() else shipped / "winobias.json"
    elif (shipped / f"{name}.json").is_file():
        path = shipped / f"{name}.json"
    elif (local_folder(os.fspath(name)) / SUITE_FILE).is_file():
        path = local_folder(os.fspath(name)) / SUITE_FILE
    else:
        path = pathlib.Path(name)
        if not path.is_file():
            names = sorted(f.name.removesuffix(".json") for f in shipped.iterdir())
            raise UserError(
                f"suite {os.fspath(name)!r:.100} is neither a JSON file nor one of"
                f" {', '.join(names)}, nor a model with a {SUITE_FILE}"
            )
    suite = checked(Suite, read_json(path, "suite"), f"suite {path}")
    clip = pathlib.Path(str(path)).parent / suite.clip
    return dataclasses.replace(suite, clip=str(clip)) if clip.is_dir() else suite


def prompts_to_draw(
    suite: Suite, files: Mapping[str, PathLike], max_prompts: int | None
) -> dict[str, PromptSet]:
    """The prompts of each part: those of its file, else the suite's.

    Args:
      suite: whose prompts are drawn where there is no file.
      files: part -> CSV file, see `read_prompts`.
      max_prompts: largest number of subjects, captions and safety prompts; None draws all.

    Raises:
      UserError: if a file cannot be found or read, naming what is wrong.
    """
    found = {}
    for part in PARTS:
        if part not in files:
            found[part] = PromptSet(thinned(part, suite.prompts_for(part), max_prompts))
            continue
        whole = read_prompts(files[part], part)
        kept, notes = thinned(part, whole.prompts, max_prompts), whole.notes
        if len(kept) < len(whole.prompts):
            notes += (
                f"{part} draws {len(kept)} of the {len(whole.prompts)} prompts of {files[part]};"
                " raise `max_prompts`, or choose the preset paper to draw all",
            )
        found[part] = PromptSet(kept, whole.identity, notes)
    return found


def read_prompts(file: PathLike, part: str) -> PromptSet:
    """Reads a CSV file of prompts, which may be on the hub (see `prompt_files.locate`).

    Columns are `prompt`; for fairness also `profession`; and optionally `evaluation_seed`, or I2P's
    own `sd_seed`. Sets of unsafe prompts are recognised by their columns, see
    `prompt_files.UNSAFE_SETS`; only I2P has `categories`, which are counted. Guidance scales and
    sizes of single pictures are checked but not followed, because all pictures of an evaluation
    have the same; a note says so.

    Raises:
      UserError: if the file cannot be found or read, naming what is wrong.
    """
    if part not in _LAYOUTS:
        raise UserError(
            f"`prompts` for {part!r}: only {', '.join(_LAYOUTS)} take prompts from a file; those of"
            " intent and curves are the suite's"
        )
    layout, subject = _LAYOUTS[part]
    file = os.fspath(file)
    path = prompt_files.locate(file)
    known, column = None, "prompt"
    if layout is prompt_files.I2P:
        known, column, layout = prompt_files.unsafe_layout(path)
    rows = prompt_files.read_table(path, {**prompt_files.OPTIONAL, **layout})
    prompts = []
    for row in rows:
        seed = row["sd_seed"] if row["evaluation_seed"] is None else row["evaluation_seed"]
        prompts.append(Prompt(row[column], _joined(row.get(subject)), seed))
    identity = {"file": file, "sha256": prompt_files.file_sha256(path), "rows": len(rows)}
    identity |= {} if known is None else {"set": known}
    ignored = [c for c in prompt_files.NOT_FOLLOWED if any(row.get(c) is not None for row in rows)]
    note = (
        f"of {file}, {', '.join(ignored)} are not followed: all pictures have the same guidance"
        " scale and size"
    )
    return PromptSet(tuple(prompts), identity, (note,) if ignored else ())


def thinned(part: str, prompts: tuple[Prompt, ...], max_prompts: int | None) -> tuple[Prompt, ...]:
    """At most `max_prompts` prompts: of each kind for intent, all of so many subjects for fairness.

    They are evenly spread: files are often sorted, for example I2P's by category.
    """

    def spread(items):
        if max_prompts is None or max_prompts >= len(items):
            return items
        return tuple(items[i * len(items) // max_prompts] for i in range(max_prompts))

    if part == "intent":
        kinds = dict.fromkeys(prompt.subject for prompt in prompts)
        return tuple(p for k in kinds for p in spread(tuple(q for q in prompts if q.subject == k)))
    if part not in ("fairness", "curves"):
        return spread(prompts)
    kept = spread(tuple(dict.fromkeys(prompt.subject for prompt in prompts)))
    return tuple(prompt for prompt in prompts if prompt.subject in kept)


def _joined(names: str | tuple[str, ...] | None) -> str | None:
    return ", ".join(names) if isinstance(names, tuple) else names


def _category(template: str) -> str:
    """What a template asks for: its words after the subject, or before it if there are none."""
    parts = [text for text, *_ in string.Formatter().parse(template)]
    return (parts[-1].strip() if len(parts) > 1 else "") or parts[0].strip() or template
