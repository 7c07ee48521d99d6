"""Concepts: what a pair of RAM and SAM is trained to bring in, or to keep out.

A *fairness* concept steers the neutral prompt ("a person") towards a target prompt ("a woman"). A
*safety* concept steers it away from an unsafe prompt ("violence"), which serves as the negative
prompt of the training target (paper, section 4.2). Concepts that are alternatives to each other
("a woman", "a man") share a group ("gender").
"""

import dataclasses
import math
import numbers
import zlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from respodiff_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Concept:
    """One concept and its recipe.

    Attributes:
      name: unique, for example "a woman"; what `respodiff generate --concept` names.
      group: the attribute it is a value of, for example "gender"; "safety" for safety concepts.
      neutral_prompts: prompts steered from; one is drawn for each training sample.
      target_prompt: prompt steered towards (fairness), or None.
      unsafe_prompt: prompt steered away from (safety), or None. Exactly one of the two is given.
      guidance_scale: `s_tar`, guidance of the training target.
      lambda_sem: weight of L_sem.
      lr_ram: learning rate of RAM.
      lr_sam: learning rate of SAM.
    """

    name: str
    group: str
    neutral_prompts: tuple[str, ...]
    target_prompt: str | None = None
    unsafe_prompt: str | None = None
    guidance_scale: float = 4.0
    lambda_sem: float = 0.5
    lr_ram: float = 1e-2
    lr_sam: float = 1e-3

    def __post_init__(self):
        def check(condition: bool, field: str, expected: str):
            if not condition:
                raise UserError(
                    f"concept {self.name!r}: {field} is {getattr(self, field)!r}, expected"
                    f" {expected}"
                )

        check(_is_text(self.name), "name", "a non-empty Unicode text")
        check(_is_text(self.group), "group", "a non-empty Unicode text")
        check(
            len(self.neutral_prompts) > 0 and all(map(_is_text, self.neutral_prompts)),
            "neutral_prompts",
            "one or more non-empty Unicode prompts",
        )
        if (self.target_prompt is None) == (self.unsafe_prompt is None):
            raise UserError(
                f"concept {self.name!r}: target_prompt is {self.target_prompt!r} and unsafe_prompt"
                f" is {self.unsafe_prompt!r}; give exactly one, the first for fairness, the second"
                " for safety"
            )
        prompt_field = "target_prompt" if self.unsafe_prompt is None else "unsafe_prompt"
        check(_is_text(getattr(self, prompt_field)), prompt_field, "a non-empty Unicode prompt")
        scale = self.guidance_scale
        check(_is_number(scale) and scale > 0, "guidance_scale", "a positive number")
        for field in ("lambda_sem", "lr_ram", "lr_sam"):
            value = getattr(self, field)
            check(_is_number(value) and value >= 0, field, "zero or a positive number")

    @property
    def is_safety(self) -> bool:
        return self.unsafe_prompt is not None

    @property
    def prompts(self) -> tuple[str, ...]:
        """All prompts that training embeds for this concept, but the empty one."""
        return (*self.neutral_prompts, self.own_prompt)

    @property
    def own_prompt(self) -> str:
        """The prompt that names the concept: fairness's target or safety's unsafe prompt."""
        return self.target_prompt or self.unsafe_prompt

    @property
    def stream(self) -> int:
        """A number that names this concept's random stream wherever it is trained, 0 .. 2^32-1."""
        return zlib.crc32(self.name.encode())

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description; `from_dict` reads it back."""
        return dataclasses.asdict(self) | {"neutral_prompts": list(self.neutral_prompts)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Concept":
        """Builds a concept from a mapping of its fields.

        Raises:
          UserError: naming unknown or missing fields.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        label = fields.get("name", "without a name")
        if unknown := sorted(set(fields) - known):
            raise UserError(
                f"concept {label!r}: unknown fields {unknown}, expected {sorted(known)}"
            )
        required = ("name", "group", "neutral_prompts")
        if missing := [field for field in required if field not in fields]:
            raise UserError(f"concept {label!r}: missing fields {missing}")
        neutral_prompts = fields["neutral_prompts"]
        if isinstance(neutral_prompts, str):
            neutral_prompts = (neutral_prompts,)
        if not isinstance(neutral_prompts, Sequence):
            raise UserError(
                f"concept {label!r}: neutral_prompts is {neutral_prompts!r}, expected a text or a"
                " list of texts"
            )
        return cls(**dict(fields) | {"neutral_prompts": tuple(neutral_prompts)})


# Name and default of each number of a concept.
HYPER_PARAMETERS = MappingProxyType(
    {f.name: f.default for f in dataclasses.fields(Concept) if f.type is float}
)


def validate_concepts(concepts: Sequence[Concept]) -> None:
    """Checks that there are concepts, with different names and random streams.

    Raises:
      UserError: otherwise, naming the duplicates.
    """
    if not concepts:
        raise UserError("no concepts to train: give the config at least one entry in `concepts`")
    seen: dict[int, str] = {}
    for concept in concepts:
        if concept.stream in seen and seen[concept.stream] != concept.name:
            raise UserError(
                f"concepts {seen[concept.stream]!r} and {concept.name!r} have names of the same"
                " checksum, from which random streams are made; change one by a letter"
            )
        if concept.stream in seen:
            raise UserError(
                f"concepts {seen[concept.stream]!r} and {concept.name!r} are duplicates: names are"
                " the keys of adapters and random streams; rename one"
            )
        seen[concept.stream] = concept.name


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and _is_unicode(value)


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can say it: JSON and command lines may bring half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
