"""What an evaluation draws, how it steers the pictures, and whether it has everything it needs."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from respodiff_jax.adapters import Adapter
from respodiff_jax.errors import UserError, check_least, nearest, shortened
from respodiff_jax.evaluation import fairness
from respodiff_jax.evaluation.attack.search import Budget
from respodiff_jax.evaluation.detectors import Detector
from respodiff_jax.evaluation.drawing import Request, requests_per_prompt, requests_per_subject
from respodiff_jax.evaluation.pictures import Picture
from respodiff_jax.evaluation.suites import (
    ASKED,
    NOBODY,
    ON_DEMAND,
    OPEN,
    PARTS,
    Prompt,
    PromptSet,
    Suite,
)
from respodiff_jax.generation import selection
from respodiff_jax.generation.limits import MAX_IMAGES, check_count
from respodiff_jax.method.reading import Decision
from respodiff_jax.storage import PathLike

PRESETS: Mapping[str, Mapping[str, int | None]] = {
    "quick": {
        "images_per_subject": 10,
        "images_per_caption": 1,
        "images_per_prompt": 1,
        "max_prompts": 48,
        "num_steps": 20,
    },
    "paper": {
        "images_per_subject": 150,
        "images_per_caption": 1,
        "images_per_prompt": 5,
        "max_prompts": None,
        "num_steps": 50,
    },
}
# Each part, and the pictures that check the classifier, have their own range of seeds.
_SEED_RANGE, _CHECK_SEED = MAX_IMAGES, 9_000_000
_MAX_SEED = 2**32 - 10 * _SEED_RANGE
CHECKED_PER_VALUE = 8
ATTACKS = ("plain prompt", "found words", "free embeddings")  # conditions of the part attack
_SCALES, _ADJECTIVES = (1.5, 3.0, 5.0, 7.5), ("successful", "poor", "beautiful")


@dataclasses.dataclass(frozen=True)
class Condition:
    """A point of the part curves: bias grows with guidance, and adjectives bring their own.

    Attributes:
      guidance_scale: of its pictures.
      adjective: a word before each subject, or "".
    """

    guidance_scale: float
    adjective: str = ""


def curve_conditions(guidance_scale: float) -> dict[str, Condition]:
    """The conditions of the part curves by name; adjectives have the given guidance scale."""
    scales = sorted({*_SCALES, float(guidance_scale)})
    return {f"guidance {scale:g}": Condition(scale) for scale in scales} | {
        word: Condition(float(guidance_scale), word) for word in _ADJECTIVES
    }


@dataclasses.dataclass(frozen=True)
class EvaluationSpec:
    """What is drawn, and what the pictures are judged by.

    Attributes:
      suite: prompts and classifiers.
      parts: some of `PARTS`.
      prompts: part -> its prompts; empty if existing pictures are scored.
      conditions: name -> condition of the part curves.
      groups: the concept groups that are made fair together; () leaves the choice to the base
        model.
      fair_concepts: names of the adapter's concepts of these groups.
      safe: whether all safety concepts are added.
      images_per_subject: fairness pictures of each subject, and curves' of each condition.
      images_per_caption: quality pictures of each caption.
      images_per_prompt: safety, intent and attack pictures of each prompt.
      targets: attribute -> value -> share; uniform if absent.
      seed: of the first picture; each part has its own range from there.
      notes: what a reader of the results should know, for example parts that are left out.
      budget: of the part attack.

    Raises:
      UserError: if a value is out of its range, or the suite lacks a group or a target.
    """

    suite: Suite
    parts: tuple[str, ...]
    prompts: Mapping[str, PromptSet] = dataclasses.field(default_factory=dict)
    conditions: Mapping[str, Condition] = dataclasses.field(default_factory=dict)
    groups: tuple[str, ...] = ()
    fair_concepts: tuple[str, ...] = ()
    safe: bool = False
    images_per_subject: int = 10
    images_per_caption: int = 1
    images_per_prompt: int = 1
    targets: fairness.Targets = dataclasses.field(default_factory=dict)
    seed: int = 0
    notes: tuple[str, ...] = ()
    budget: Budget = dataclasses.field(default_factory=Budget)

    def __post_init__(self):
        if len(set(self.groups)) < len(self.groups):
            raise UserError(f"`groups` are {self.groups}, expected each once")
        for name in ("images_per_subject", "images_per_caption", "images_per_prompt"):
            check_least(f"`{name}`", getattr(self, name))
        for part, given in self.prompts.items():
            own = {prompt.subject for prompt in given.prompts}
            check_count(self.images_each(part) * len(own if part == "fairness" else given.prompts))
        if not 0 <= self.seed <= _MAX_SEED:
            raise UserError(f"`seed` is {self.seed}, expected within 0 .. {_MAX_SEED}")
        for attribute, shares in self.targets.items():
            # Written so that NaN does not pass.
            total = sum(shares.values())
            if not (abs(total - 1) <= 5e-3 and all(share >= 0 for share in shares.values())):
                raise UserError(
                    f"`targets` of {attribute} are {dict(shares)}, together {total:g}; expected"
                    " shares that sum to 1, none below 0"
                )
            if set(shares) != set(self.suite.attribute(attribute)):
                raise UserError(
                    f"`targets` of {attribute} name {sorted(shares)}, its values are"
                    f" {list(self.suite.attribute(attribute))}"
                )
        for group in self.groups:
            self.suite.attribute(group)

    def images_each(self, part: str) -> int:
        """Number of pictures of each subject, caption or safety prompt."""
        if part in ("fairness", "curves"):
            return self.images_per_subject
        return self.images_per_caption if part == "quality" else self.images_per_prompt

    def folders(self, part: str) -> list[str]:
        """The folders of a part's pictures within the evaluation's: one, or one a condition.

        Of attack only the first: what is drawn in the others is found by then.
        """
        names = {"curves": self.conditions, "attack": ATTACKS[:1]}.get(part)
        return [part] if names is None else [f"{part}/{name}" for name in names]

    def requests(
        self, adapter: Adapter | None, read: Callable[[Sequence[str]], np.ndarray] | None = None
    ) -> tuple[dict[str, list[Request]], dict[str, np.ndarray | None]]:
        """The pictures to draw in each folder, and the weight of each concept in each picture.

        Args:
          adapter: of N concepts, or None.
          read: gives the decisions on P prompts, int `(P, N)`; None finds every prompt open.

        Raises:
          UserError: if the adapter does not have what is chosen of it.
        """
        if adapter is None and self.safe:
            raise UserError("`safe` adds an adapter's safety concepts, but no `adapter` is given")
        if adapter is not None and "attack" in self.parts and not self.safe:
            raise UserError(
                "attack tries to undo safety concepts, but no `safe` is chosen or the adapter has"
                f" none; it has {shortened(', '.join(adapter.names), 150)}. Give an adapter with"
                " safety concepts, or none to attack the base model"
            )
        if adapter is not None and not self.groups and not self.safe:
            raise UserError(
                "an adapter is given but none of its concepts is chosen; give `groups`, or `safe`"
            )
        requests = {
            folder: self._requests(part, folder)
            for part in self.parts
            for folder in self.folders(part)
        }
        weights = dict.fromkeys(requests) | {
            folder: self.weights(adapter, found, self.images_each(folder.split("/")[0]), read)
            for folder, found in requests.items()
            if adapter is not None
        }
        return requests, weights

    def _requests(self, part: str, folder: str) -> list[Request]:
        seed = self.seed + _SEED_RANGE * PARTS.index(part)
        each, prompts = self.images_each(part), self.prompts[part].prompts
        if part == "curves":
            # All conditions share their noise.
            before = self.conditions[folder.removeprefix("curves/")].adjective
            subjects = dict.fromkeys(prompt.subject for prompt in prompts)
            named = {subject: f"{before} {subject}".strip() for subject in subjects}
            prompts = [Prompt(t, s) for s, name in named.items() for t in self.suite.prompts(name)]
        if part in ("fairness", "curves"):
            return requests_per_subject(prompts, each, seed)
        if part == "intent":
            # All kinds share their noise: "a doctor" and "a woman doctor" are compared.
            kinds = dict.fromkeys(prompt.subject for prompt in prompts)
            of_kinds = [[p for p in prompts if p.subject == kind] for kind in kinds]
            return [r for own in of_kinds for r in requests_per_prompt(own, each, seed)]
        return requests_per_prompt(prompts, each, seed)

    def weights(
        self,
        adapter: Adapter,
        requests: Sequence[Request],
        each: int,
        read: Callable[[Sequence[str]], np.ndarray] | None,
    ) -> np.ndarray:
        """The weight of each concept in each picture, `each` of a prompt; see `requests`."""
        rows = np.zeros((len(requests), len(adapter.concepts)), np.float32)
        decisions = np.full(rows.shape, Decision.OPEN)
        if read is not None:
            decisions = read([request.prompt for request in requests])
        if self.groups:
            rows += fairness.fair_weights(
                adapter, self.groups, self.targets, requests, each, self.seed, decisions
            )
        if self.safe:
            rows += selection.concept_weights(
                adapter, len(requests), 1, safe=True, decisions=decisions
            )
        return rows

    def check_requests(self) -> list[Request]:
        """Pictures that check the classifier: the first prompt of each value of each attribute."""
        return [
            Request(prompts[0], self.seed + _CHECK_SEED + number, f"{attribute}={value}")
            for attribute, classes in self.suite.attributes.items()
            for value, prompts in classes.items()
            for number in range(CHECKED_PER_VALUE)
        ]


def relevant(prompts: PromptSet, groups: Sequence[str], safe: bool) -> PromptSet:
    """The prompts of intent that are about fairness, about safety, or about both."""
    kinds = {OPEN, NOBODY} | ({ASKED} if safe else set())

    def wanted(kind):
        return kind in kinds or (bool(groups) and kind != ASKED)

    kept = tuple(prompt for prompt in prompts.prompts if wanted(prompt.subject))
    return dataclasses.replace(prompts, prompts=kept)


def wanted_parts(part: str | Sequence[str]) -> tuple[str, ...]:
    """The parts that `evaluate` is asked for, in the order of `PARTS`."""
    if part == "all":
        return tuple(name for name in PARTS if name not in ON_DEMAND)
    wanted = {part} if isinstance(part, str) else set(part)
    if not wanted or not wanted <= set(PARTS):
        raise UserError(f"`part` is {part!r}, expected all, or some of {', '.join(PARTS)}")
    return tuple(name for name in PARTS if name in wanted)


def check_for_parts(
    wanted: Sequence[str],
    prompts: Mapping[str, PathLike],
    detectors: Sequence[str | Detector],
    reference: PathLike | None,
    budget: Sequence[str],
) -> None:
    """Checks that prompts, detectors, reference and budget are for parts that are evaluated."""
    needed = [(f"`prompts` for {part} are given", part) for part in prompts]
    needed += [("`reference` is for quality", "quality")] if reference is not None else []
    needed += [(f"`{name}` is for attack", "attack") for name in budget]
    if detectors and "attack" not in wanted:
        needed += [("`detectors` are for safety", "safety")]
    for what, part in needed:
        if part not in wanted:
            raise UserError(f"{what}, but {', '.join(wanted)} is evaluated")


def lacking(
    suite: Suite,
    prompts: Mapping[str, PromptSet],
    has_detectors: bool = False,
    existing: Sequence[Picture] | None = None,
) -> dict[str, str]:
    """What is missing for each part that cannot be evaluated: part -> a sentence.

    Args:
      suite: prompts and classifiers.
      prompts: part -> its prompts.
      has_detectors: whether detectors of unsafe pictures are chosen.
      existing: pictures to score, or None if they are to be drawn.
    """
    if existing is None:
        empty = (part for part in PARTS if not prompts[part].prompts)
        why = "suite {!r} has no prompts for {}; give `prompts`"
        lacks = {part: why.format(suite.name, part) for part in empty}
    else:
        why = "{} compares pictures that are drawn for it; give `model`"
        lacks = {part: why.format(part) for part in ("intent", *ON_DEMAND)}
        try:
            fairness.check_subjects(existing, suite.subjects)
        except UserError as error:
            lacks["fairness"] = str(error)
        if without := [picture.path for picture in existing if not picture.prompt]:
            lacks["quality"] = (
                f"{len(without)} pictures have no prompt, for example {without[0]}; a CLIP score"
                " needs one: list them in metadata.csv with the columns file, prompt"
            )
    if not (suite.unsafe_classes or has_detectors):
        lacks["safety"] = lacks["attack"] = (
            f"suite {suite.name!r} has no unsafe_classes and no detector is chosen; give"
            " `detectors`, nudenet or q16=FILE"
        )
    return lacks


def choose_concepts(
    adapter: Adapter | None, suite: Suite, groups: Sequence[str] | None, safe: bool | None
) -> tuple[tuple[str, ...], bool]:
    """The groups to make fair, and whether to add the safety concepts.

    None for `groups` is the adapter's only group that the suite classifies, unless `safe` is True.
    None for `safe` is whether the adapter has safety concepts, unless `groups` names some.

    Raises:
      UserError: if `groups` is None and the adapter has several, or it lacks one of them.
    """
    concepts = () if adapter is None else adapter.concepts
    known = dict.fromkeys(concept.group for concept in concepts)
    for group in groups or ():
        if concepts and group not in known:
            raise UserError(
                f"`groups`: the adapter has no group {shortened(group)!r}"
                f"{nearest(group, known) or '.'} It has {shortened(', '.join(known), 150)}"
            )
    chosen = tuple(groups or ())
    if groups is None and not safe:
        own = dict.fromkeys(c.group for c in concepts if not c.is_safety)
        chosen = tuple(group for group in own if group in suite.attributes)
        if len(chosen) > 1:
            raise UserError(f"the adapter has the groups {list(chosen)}; choose with `groups`")
    if safe is None:
        safe = not groups and any(c.is_safety for c in concepts)
    return chosen, safe
