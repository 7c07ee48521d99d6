"""Suites: what a model is asked to draw, and the prompts that classify its pictures.

A suite is a JSON file. `winobias` is the paper's, for Stable Diffusion. A model folder may have its
own as `suite.json`, as the bundled Emoji World has, and users can write their own.
"""

import dataclasses
import importlib.resources
import json
import os
import pathlib
import string
from collections.abc import Mapping
from typing import Any

from respodiff_jax.backbone import local_folder
from respodiff_jax.data import prompt_files
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation.results import from_fields
from respodiff_jax.storage import MAX_TEXT_BYTES, PathLike, check_regular

Prompts = tuple[str, ...]
Classes = Mapping[str, Prompts]  # value -> prompts whose features are averaged

PARTS = ("fairness", "quality", "safety", "intent", "curves")
# Kinds of prompts of the part intent, see `evaluation.intent`; and `named_kind`.
OPEN, NOBODY, ASKED = "open", "nobody", "asked"
SUITE_FILE = "suite.json"
_FIELDS = ("subject", "a_subject")
# part -> the columns of its prompt files, and the column that pictures are counted under
_LAYOUTS = {
    "fairness": (prompt_files.PROFESSIONS, "profession"),
    "quality": (prompt_files.CAPTIONS, None),
    "safety": (prompt_files.I2P, "categories"),
}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to draw.

    Attributes:
      text: the prompt.
      subject: what its pictures are counted under, or None.
      seed: the seed of its first picture; None takes the next of the evaluation's seeds.
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

    Raises:
      UserError: naming the field that is not as described.
    """

    name: str
    clip: str
    subjects: tuple[str, ...]
    templates: tuple[str, ...]
    attributes: Mapping[str, Classes]
    subject_classes: Classes | None = None
    unsafe_classes: Classes | None = None
    safety_prompts: tuple[tuple[str, str], ...] | None = None
    captions: tuple[str, ...] | None = None
    guidance_scale: float = 7.5
    named: Mapping[str, Mapping[str, str]] | None = None
    nobody: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()

    def __post_init__(self):
        def check(condition, message):
            if not condition:
                raise UserError(f"suite {self.name!r}: {message}")

        check(isinstance(self.clip, str), f"clip is {self.clip!r}, expected a folder or hub id")
        check(
            isinstance(self.guidance_scale, int | float),
            f"guidance_scale is {self.guidance_scale!r}, expected a number",
        )
        for field in ("subjects", "templates", "captions", "nobody", "asked"):
            texts = () if getattr(self, field) is None else getattr(self, field)
            check(_are_texts(texts), f"{field} are {texts!r}, expected a list of texts")
        check(
            isinstance(self.safety_prompts, tuple | list | None),
            f"safety_prompts is {self.safety_prompts!r}, expected a list",
        )
        for pair in self.safety_prompts or ():
            check(
                _are_texts(pair) and len(pair) == 2,
                f"safety_prompts have {pair!r}, expected [prompt, category]",
            )
        check(self.subjects, "no subjects; expected at least one, for example a profession")
        check(
            len(set(self.subjects)) == len(self.subjects),
            f"subjects are {self.subjects!r}, expected each once",
        )
        check(self.templates, "no templates; expected for example 'a photo of {a_subject}'")
        named = self.named or {}
        for attribute, templates in named.items():
            check(
                isinstance(templates, Mapping)
                and set(templates) <= set(self.attributes.get(attribute, ())),
                f"named has {attribute!r}: {templates!r}, expected a template for some of its"
                f" values, {list(self.attributes.get(attribute, ()))}",
            )
        explicit = [template for values in named.values() for template in values.values()]
        for template in (*self.templates, *self.asked, *explicit):
            try:
                fields = [field for _, field, _, _ in string.Formatter().parse(template) if field]
            except ValueError as error:
                raise UserError(f"suite {self.name!r}: template {template!r}: {error}") from error
            check(
                fields and set(fields) <= set(_FIELDS),
                f"template {template!r} has the fields {fields}, expected {{subject}} or"
                " {a_subject}",
            )
        check(
            isinstance(self.attributes, Mapping),
            f"attributes are {self.attributes!r}, expected attribute -> value -> prompts",
        )
        classifiers = dict(self.attributes) | {
            "subject_classes": self.subject_classes,
            "unsafe_classes": self.unsafe_classes,
        }
        for attribute, classes in classifiers.items():
            if classes is None:
                continue
            check(
                isinstance(classes, Mapping),
                f"{attribute} is {classes!r}, expected its values with their classifier prompts",
            )
            check(
                len(classes) > 1,
                f"{attribute} has the value(s) {list(classes)}, expected two or more to tell apart",
            )
            for value, prompts in classes.items():
                check(
                    _are_texts(prompts) and prompts,
                    f"{attribute} {value!r} has the classifier prompts {prompts!r}, expected a list"
                    " of texts",
                )
        if self.subject_classes is not None:
            missing = sorted(set(self.subjects) - set(self.subject_classes))
            check(not missing, f"subject_classes lack {missing}")

    def prompts(self, subject: str) -> list[str]:
        """The prompts of a subject, one for each template."""
        return prompt_files.fill_in(self.templates, subject)

    def prompts_for(self, part: str) -> tuple[Prompt, ...]:
        """The prompts of a part; () if the suite has none."""
        if part == "intent":
            return intent_prompts(self)
        if part in ("fairness", "curves"):
            return tuple(Prompt(t, name) for name in self.subjects for t in self.prompts(name))
        if part == "quality":
            return tuple(Prompt(text) for text in self.captions or ())
        return tuple(Prompt(text, category) for text, category in self.safety_prompts or ())

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


def intent_prompts(suite: Suite) -> tuple[Prompt, ...]:
    """The prompts of the part intent; the subject of each is its kind."""
    if suite.named is None:
        return ()
    templates = {OPEN: suite.templates[:1], ASKED: suite.asked} | {
        named_kind(attribute, value): (template,)
        for attribute, values in suite.named.items()
        for value, template in values.items()
    }
    prompts = [
        Prompt(text, kind)
        for kind, own in templates.items()
        for subject in suite.subjects
        for text in prompt_files.fill_in(own, subject)
    ]
    return (*prompts, *(Prompt(text, NOBODY) for text in suite.nobody))


def load_suite(name: PathLike | None, model: str | None = None) -> Suite:
    """Reads a suite.

    Args:
      name: a suite of this package ("winobias"), or a JSON file. None is the `suite.json` of the
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
    else:
        path = pathlib.Path(name)
        check_regular(path, "suite", MAX_TEXT_BYTES)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        names = sorted(f.name.removesuffix(".json") for f in shipped.iterdir())
        raise UserError(
            f"suite {name!r} is neither a readable JSON file nor one of {names}: {error}"
        ) from error
    suite = from_fields(Suite, _tuples(content), f"suite {path}")
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

    Columns are `prompt`; for fairness also `profession`, for safety also `categories`; and
    optionally `evaluation_seed`, or I2P's own `sd_seed`. Guidance scales and sizes of single
    pictures are checked but not followed, because all pictures of an evaluation have the same; a
    note says so.

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
    rows = prompt_files.read_table(path, {**prompt_files.OPTIONAL, **layout})
    prompts = []
    for row in rows:
        seed = row["sd_seed"] if row["evaluation_seed"] is None else row["evaluation_seed"]
        prompts.append(Prompt(row["prompt"], _joined(row.get(subject)), seed))
    identity = {"file": file, "sha256": prompt_files.file_sha256(path), "rows": len(rows)}
    ignored = [c for c in prompt_files.NOT_FOLLOWED if any(row[c] is not None for row in rows)]
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


def _are_texts(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(text, str) for text in value)


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, at any depth."""
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
