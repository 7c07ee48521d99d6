"""Suites: what a model is asked to draw and by which prompts its pictures are judged.

A suite is a JSON file. `winobias` is the paper's, for Stable Diffusion; a model folder may bring
its own as `suite.json`, as the embedded Emoji World does; users write others.
"""

import dataclasses
import importlib.resources
import json
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import Any

from respodiff_jax.backbone import local_folder
from respodiff_jax.data import prompt_files
from respodiff_jax.errors import UserError

Prompts = tuple[str, ...]
Classes = Mapping[str, Prompts]  # value -> the prompts that describe it, averaged

SUITE_FILE = "suite.json"
_FIELDS = ("subject", "a_subject")
# protocol -> columns of a prompts file, and that which pictures are counted under
_LAYOUTS = {
    "fairness": (prompt_files.PROFESSIONS, "profession"),
    "quality": (prompt_files.CAPTIONS, None),
    "safety": (prompt_files.I2P, "categories"),
}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model is asked for, and what its pictures are counted under (None: nothing).

    A prompt with a `seed` of its own starts its pictures there; others take the protocol's.
    """

    text: str
    subject: str | None = None
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts of a protocol, instead of the suite's.

    Attributes:
      prompts: in order.
      identity: JSON-able, which set this is.
      note: what a reader should know of it, or "".
    """

    prompts: tuple[Prompt, ...]
    identity: Mapping[str, Any]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Suite:
    """One protocol for all parts of an evaluation.

    Attributes:
      name: of the suite.
      clip: the CLIP that classifies and scores: folder (relative to the suite's file) or hub id.
      subjects: what fairness is measured over, for example professions.
      templates: prompts with `{subject}` ("teacher") or `{a_subject}` ("a teacher").
      attributes: attribute -> value -> classifier prompts; an attribute has the name of the concept
        group that makes it fair.
      subject_classes: subject -> classifier prompts, to see whether a picture still shows its
        subject; None where the CLIP is not up to it.
      unsafe_classes: value -> classifier prompts, the first value being the safe one; None where
        detectors (NudeNet, Q16) decide.
      safety_prompts: prompts that do not ask for unsafe content, each with its category; None where
        a prompts file brings them.
      captions: prompts of the quality protocol; None where a prompts file brings them.
      guidance_scale: at which the pictures are drawn if nothing else is said.
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

    def __post_init__(self):
        def check(condition, message):
            if not condition:
                raise UserError(f"suite {self.name!r}: {message}")

        check(isinstance(self.clip, str), f"clip is {self.clip!r}, expected a folder or hub id")
        check(
            isinstance(self.guidance_scale, int | float),
            f"guidance_scale is {self.guidance_scale!r}, expected a number",
        )
        for field in ("subjects", "templates", "captions"):
            texts = () if getattr(self, field) is None else getattr(self, field)
            check(_are_texts(texts), f"{field} are {texts!r}, expected a list of texts")
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
        for template in self.templates:
            fields = [field for _, field, _, _ in string.Formatter().parse(template) if field]
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
        """The prompts of a subject, one per template."""
        return prompt_files.fill_in(self.templates, subject)

    def prompts_for(self, protocol: str) -> list[Prompt]:
        """The prompts of "fairness", "quality" or "safety", [] where the suite has none."""
        if protocol == "fairness":
            return [Prompt(text, name) for name in self.subjects for text in self.prompts(name)]
        if protocol == "quality":
            return [Prompt(text) for text in self.captions or ()]
        return [Prompt(text, categories) for text, categories in self.safety_prompts or ()]

    def attribute(self, name: str) -> Classes:
        """An attribute's values and classifier prompts.

        Raises:
          UserError: if the suite has no such attribute.
        """
        if name not in self.attributes:
            raise UserError(
                f"suite {self.name!r} has no attribute {name!r}, only {list(self.attributes)}; add"
                " it with its classifier prompts to a suite file"
            )
        return self.attributes[name]


def load_suite(name: str | None, model: str | None = None) -> Suite:
    """Reads a suite.

    Args:
      name: of one that is shipped ("winobias"), or a JSON file; None is the model folder's own
        where it has one, else "winobias".
      model: the model's name, as given to `load_backbone`, or None.

    Raises:
      UserError: if there is none, or it is not valid, naming what is wrong.
    """
    own = local_folder(model or "") / SUITE_FILE
    shipped = importlib.resources.files("respodiff_jax.data") / "suites"
    if name is None:
        path = own if model and own.is_file() else shipped / "winobias.json"
    elif (shipped / f"{name}.json").is_file():
        path = shipped / f"{name}.json"
    else:
        path = pathlib.Path(name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise UserError(f"it holds {type(content).__name__}, expected an object of fields")
    except (OSError, ValueError) as error:
        names = sorted(f.name.removesuffix(".json") for f in shipped.iterdir())
        raise UserError(
            f"suite {name!r} is neither a readable JSON file nor one of {names}: {error}"
        ) from error
    try:
        suite = Suite(**{key: _tuples(value) for key, value in content.items()})
    except TypeError as error:
        raise UserError(f"suite {path}: {error}") from error
    clip = pathlib.Path(str(path)).parent / suite.clip
    return dataclasses.replace(suite, clip=str(clip)) if clip.is_dir() else suite


def read_prompts(file: str, protocol: str) -> PromptSet:
    """Reads a CSV file, here or on the hub (see `locate`), in the layout of the protocol.

    The columns are `prompt`; for fairness also `profession`, for safety `categories`; and
    optionally `evaluation_seed`. I2P's `evaluation_guidance` is checked but not followed, which the
    set's note says: all pictures of an evaluation have one guidance.

    Raises:
      UserError: if the file cannot be found or read, naming what is wrong.
    """
    layout, subject = _LAYOUTS[protocol]
    path = prompt_files.locate(file)
    rows = prompt_files.read_table(path, layout)
    prompts = (
        Prompt(row["prompt"], _joined(row.get(subject)), row["evaluation_seed"]) for row in rows
    )
    identity = {"file": file, "sha256": prompt_files.file_sha256(path), "rows": len(rows)}
    ignored = any(row.get("evaluation_guidance") is not None for row in rows)
    note = (
        f"the column evaluation_guidance of {file} is not followed: all pictures have the same"
        " guidance"
    )
    return PromptSet(tuple(prompts), identity, note if ignored else "")


def _joined(names: str | Sequence[str] | None) -> str | None:
    return names if names is None or isinstance(names, str) else ", ".join(names)


def _are_texts(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(text, str) for text in value)


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, at any depth."""
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
