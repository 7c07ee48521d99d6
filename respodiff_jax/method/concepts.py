"""Concepts: what a pair of RAM and SAM learns to bring into pictures, or to keep out of them.

A *fairness* concept steers the neutral prompt ("a person") towards a target prompt ("a woman"). A
*safety* concept steers it away from an unsafe prompt ("violence"), which serves as the negative
prompt of the training target (paper, section 4.2). Concepts that are alternatives to each other
("a woman", "a man") share a group ("gender").

A concept with a list of target prompts has a *counterpart* of each neutral prompt, and learns the
difference between the two. The counterparts of "a dark-skinned person" and "a light-skinned person"
are "a dark-skinned woman" and "a light-skinned woman": the difference has no skin tone. A safety
concept's neutral prompts may ask for what is unsafe, "a person with a knife", with the counterpart
"a safe photo of a person".
"""

import dataclasses
import numbers
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from respodiff_jax.errors import UserError

# Pairs of words for a gender: one in a concept's prompt also brings the other.
_SYNONYMS = {"woman": "female", "female": "woman", "man": "male", "male": "man"}
_SYNONYM = re.compile(rf"\b({'|'.join(_SYNONYMS)})\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Concept:
    """One concept and its hyper-parameters.

    Attributes:
      name: unique among the concepts of an adapter, for example "a woman".
      group: the attribute that the concept is a value of, for example "gender"; "safety" for safety
        concepts.
      neutral_prompts: prompts to steer from; each training sample draws one. A single text or a
        list becomes a tuple.
      target_prompt: prompt to steer towards; or a list, the counterpart of each neutral prompt.
      unsafe_prompt: what a safety concept steers away from. With counterparts it only names that.
      guidance_scale: `s_tar`, guidance of the training target, above 0; one for all neutral prompts
        or one for each.
      lambda_sem: lambda, the factor in L_sem, 0 or more.
      lr_ram: learning rate of RAM, 0 or more.
      lr_sam: learning rate of SAM, 0 or more.
      words: noun phrases that name the concept in a prompt, without an article, such as "woman" or,
        with a person, "female {person}"; () takes the concept's own prompts.
      default_scale: the concept's scale in pictures for which the user gives none.
      max_timestep: the concept steers pictures at timesteps up to this one; None: at all timesteps.

    Raises:
      UserError: if a field has the wrong type or value; the message names it.

    Deviation: the paper steers at all timesteps. With a `max_timestep`, the base model alone takes
    the first steps, which decide most of a picture's composition. Training is at all timesteps.
    """

    name: str
    group: str
    neutral_prompts: tuple[str, ...]
    target_prompt: str | tuple[str, ...] | None = None
    unsafe_prompt: str | None = None
    guidance_scale: float | tuple[float, ...] = 4.0
    lambda_sem: float = 0.5
    lr_ram: float = 1e-2
    lr_sam: float = 1e-3
    words: tuple[str, ...] = ()
    default_scale: float = 1.0
    max_timestep: int | None = None

    def __post_init__(self):
        def check(condition: bool, field: str, expected: str):
            if not condition:
                raise UserError(
                    f"concept {self.name!r:.80}: {field} is {getattr(self, field)!r:.80}, expected"
                    f" {expected}"
                )

        check(_is_text(self.name), "name", "a non-empty Unicode text")
        check(_is_text(self.group), "group", "a non-empty Unicode text")
        prompts = self.neutral_prompts
        prompts = (prompts,) if isinstance(prompts, str) else prompts
        check(
            isinstance(prompts, Sequence) and len(prompts) > 0 and all(map(_is_text, prompts)),
            "neutral_prompts",
            "a text or a list of texts, each a non-empty Unicode prompt",
        )
        object.__setattr__(self, "neutral_prompts", tuple(prompts))
        if self.target_prompt is None and self.unsafe_prompt is None:
            raise UserError(
                f"concept {self.name!r:.80}: target_prompt and unsafe_prompt are missing; give"
                " target_prompt for fairness, or unsafe_prompt for safety"
            )
        for field, is_right, each in (
            ("target_prompt", _is_text, "a non-empty Unicode prompt"),
            ("unsafe_prompt", _is_text, "a non-empty Unicode prompt"),
            ("guidance_scale", lambda s: is_number(s) and s > 0, "a positive number"),
        ):
            value = getattr(self, field)
            if isinstance(value, list | tuple) and field != "unsafe_prompt":
                object.__setattr__(self, field, tuple(value))
                whole = len(value) == len(self.neutral_prompts) and all(map(is_right, value))
                check(whole, field, f"{each}, or one for each of the neutral_prompts")
            elif value is not None or field == "guidance_scale":
                check(is_right(value), field, each)
        if self.is_safety and isinstance(self.target_prompt, str) and len(prompts) == 1:
            object.__setattr__(self, "target_prompt", (self.target_prompt,))
        words = (self.words,) if isinstance(self.words, str) else self.words
        check(
            isinstance(words, Sequence) and all(map(_is_text, words)),
            "words",
            "a list of noun phrases, each a non-empty Unicode text",
        )
        object.__setattr__(self, "words", tuple(words))
        for field in ("lambda_sem", "lr_ram", "lr_sam"):
            value = getattr(self, field)
            check(is_number(value) and value >= 0, field, "zero or a positive number")
        check(is_number(self.default_scale), "default_scale", "a finite number")
        last = self.max_timestep
        check(
            last is None or (type(last) is int and 0 <= last < 2**24),
            "max_timestep",
            "a whole number of 0 or more, such as 900, or none",
        )
        if self.is_safety:
            expected = "one counterpart for each of the neutral_prompts, or none"
            check(not isinstance(self.target_prompt, str), "target_prompt", expected)

    @property
    def is_safety(self) -> bool:
        return self.unsafe_prompt is not None

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every prompt that training embeds for this concept, except the empty one."""
        return (*self.neutral_prompts, *self.own_prompts)

    @property
    def own_prompts(self) -> tuple[str, ...]:
        """For each neutral prompt the one it is steered to or, without such, away from."""
        return self._for_each(self.target_prompt or self.unsafe_prompt)

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """`s_tar` of each neutral prompt."""
        return self._for_each(self.guidance_scale)

    def _for_each(self, value: Any) -> tuple[Any, ...]:
        return value if isinstance(value, tuple) else (value,) * len(self.neutral_prompts)

    @property
    def has_counterparts(self) -> bool:
        """Whether each neutral prompt has its own target prompt."""
        return isinstance(self.target_prompt, tuple)

    @property
    def reading_words(self) -> tuple[str, ...]:
        """`words` or, without any, `own_words`."""
        return self.words or self.own_words

    @property
    def own_words(self) -> tuple[str, ...]:
        """Noun phrases of the concept's own prompts, as `words`.

        For "a woman" they are "woman", "woman {person}", "female" and "female {person}". Of a
        counterpart, only what its neutral prompt does not say names the concept.
        """
        words = []
        for neutral, own in zip(self.neutral_prompts, self.own_prompts, strict=True):
            own = without_article(own)
            if len(set(self.own_prompts)) > 1:
                said = {*neutral.split()} - {"person"}
                own = " ".join(word for word in own.split() if word not in said) or own
            for phrase in (own, _SYNONYM.sub(lambda found: _SYNONYMS[found[0].lower()], own)):
                with_person = re.sub(r"\bperson\b", "{person}", phrase)
                words += [phrase, with_person if with_person != phrase else f"{phrase} {{person}}"]
        return tuple(dict.fromkeys(words))

    @property
    def stream(self) -> int:
        """Seed of this concept's random stream, 0 .. 2^32-1; it depends on the name alone."""
        return zlib.crc32(self.name.encode())

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them; `from_dict` reads them.

        Fields that earlier versions lack are left out at their defaults.
        """
        fields = dataclasses.asdict(self)
        for name, default in (("words", ()), ("default_scale", 1.0), ("max_timestep", None)):
            if fields[name] == default:
                del fields[name]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Concept":
        """Builds a concept from its fields.

        Raises:
          UserError: if fields are unknown or missing, or have the wrong type or value.
        """
        label = f"concept {fields['name']!r:.80}" if "name" in fields else "concept without a name"
        known = {f.name: f.default for f in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - set(known)):
            known = ", ".join(known)
            raise UserError(f"{label}: unknown fields {unknown!s:.100}, expected {known}")
        required = [name for name, default in known.items() if default is dataclasses.MISSING]
        if missing := [name for name in required if name not in fields]:
            raise UserError(f"{label}: missing fields {missing}")
        return cls(**fields)


def without_article(prompt: str) -> str:
    return re.sub(r"^(an?|the) ", "", prompt, flags=re.IGNORECASE)


# Name and default of each hyper-parameter of a concept.
HYPER_PARAMETERS = MappingProxyType(
    {
        f.name: f.default
        for f in dataclasses.fields(Concept)
        if f.name in ("guidance_scale", "lambda_sem", "lr_ram", "lr_sam")
    }
)


def validate_concepts(concepts: Sequence[Concept]) -> None:
    """Checks that there are concepts, and that their names and random streams differ.

    Raises:
      UserError: if there are none, or two of them clash.
    """
    if not concepts:
        raise UserError("there are no concepts, expected at least one")
    seen: dict[int, str] = {}
    for concept in concepts:
        if concept.stream in seen:
            pair = f"concepts {seen[concept.stream]!r:.80} and {concept.name!r:.80}"
            if seen[concept.stream] == concept.name:
                raise UserError(f"{pair} are duplicates; rename one, as an adapter needs each once")
            raise UserError(
                f"{pair} have names with the same checksum, which seeds their random streams;"
                " change one name by a letter"
            )
        seen[concept.stream] = concept.name


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number, and no truth value."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and _is_unicode(value)


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can encode the text: JSON and command lines may bring half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
