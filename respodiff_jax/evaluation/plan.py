"""What an evaluation makes, how it is steered, and whether all that it needs is there."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from respodiff_jax.adapters import Adapter
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation import fairness, quality
from respodiff_jax.evaluation.picture_sets import Request, repeated
from respodiff_jax.evaluation.pictures import Picture
from respodiff_jax.evaluation.suites import Prompt, PromptSet, Suite
from respodiff_jax.generation import selection

PROTOCOLS = ("fairness", "quality", "safety")
# Each protocol's pictures, and those that check the classifier, have a range of seeds of their own.
SEED_RANGE, CHECK_SEED = 1_000_000, 9_000_000
_MAX_SEED = 2**32 - 10 * SEED_RANGE


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is made and how it is steered.

    Attributes:
      protocols: of `PROTOCOLS`.
      groups: the concept groups that are made fair together; () is the base model's own choice.
      safe: add all safety concepts.
      images_per_subject: fairness pictures of each subject.
      images_per_caption: quality pictures of each caption.
      images_per_prompt: pictures of each safety prompt.
      target: attribute -> value -> share; uniform where absent.
      seed: of the first picture; protocols have their own ranges.
      prompts: protocol -> prompts instead of the suite's.
      notes: what a reader of the results should know, for example what is left out.
    """

    protocols: tuple[str, ...] = PROTOCOLS
    groups: tuple[str, ...] = ()
    safe: bool = False
    images_per_subject: int = 10
    images_per_caption: int = 1
    images_per_prompt: int = 1
    target: fairness.Target = dataclasses.field(default_factory=dict)
    seed: int = 0
    prompts: Mapping[str, PromptSet] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.protocols or not set(self.protocols) <= set(PROTOCOLS):
            raise UserError(f"protocols are {self.protocols}, expected some of {PROTOCOLS}")
        if len(set(self.groups)) < len(self.groups):
            raise UserError(f"groups are {self.groups}, expected each once")
        for name in ("images_per_subject", "images_per_caption", "images_per_prompt"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.seed <= _MAX_SEED:
            raise UserError(f"seed is {self.seed}, expected within 0 .. {_MAX_SEED}")
        if others := sorted(set(self.prompts) - set(self.protocols)):
            raise UserError(
                f"prompts for {', '.join(others)} are given, but the protocols are"
                f" {', '.join(self.protocols)}"
            )
        for attribute, shares in self.target.items():
            # Written so that NaN does not pass.
            total = sum(shares.values())
            if not (abs(total - 1) <= 5e-3 and all(share >= 0 for share in shares.values())):
                raise UserError(
                    f"target of {attribute} is {dict(shares)}, together {total:g}; expected shares"
                    " of 1, none below 0"
                )

    def images_each(self, protocol: str) -> int:
        """Pictures of each subject, caption or safety prompt."""
        each = (self.images_per_subject, self.images_per_caption, self.images_per_prompt)
        return each[PROTOCOLS.index(protocol)]


def missing(
    suite: Suite,
    prompts: Mapping[str, PromptSet],
    detectors: Collection[str] = (),
    given: Sequence[Picture] | None = None,
) -> dict[str, str]:
    """What protocols lack that they cannot do without, in words, by protocol.

    Args:
      suite: what is drawn and how it is judged.
      prompts: by protocol, instead of the suite's.
      detectors: names of those of unsafe pictures.
      given: pictures that are there, or None where they are to be made.
    """
    lacks = {}
    if given is None:
        for protocol in PROTOCOLS:
            if not _prompts(suite, prompts, protocol):
                lacks[protocol] = f"suite {suite.name!r} has no prompts for {protocol}; give a file"
    else:
        for protocol, check in (
            ("fairness", lambda: fairness.check_subjects(given, suite.subjects)),
            ("quality", lambda: quality.check_prompts(given)),
        ):
            try:
                check()
            except ValueError as error:
                lacks[protocol] = str(error)
    if not (suite.unsafe_classes or detectors):
        lacks["safety"] = (
            f"suite {suite.name!r} has no unsafe_classes and no detector is chosen; choose nudenet"
            " or q16=FILE"
        )
    return lacks


def check_plan(
    suite: Suite,
    plan: Plan,
    adapter: Adapter | None = None,
    detectors: Collection[str] = (),
    given: Sequence[Picture] | None = None,
) -> tuple[dict[str, list[Request]], dict[str, np.ndarray | None]]:
    """Whether all that a plan needs is there, before a model is read.

    Args:
      suite: what is drawn and how it is judged.
      plan: how much of what.
      adapter: the concepts, or None for the base model alone.
      detectors: names of those of unsafe pictures.
      given: pictures that are there, or None where they are to be made.

    Returns:
      by protocol what to make, and the weight of each concept in each picture or None; of given
      pictures nothing.

    Raises:
      UserError: if a group or target is no attribute of the suite or does not fit the adapter, or
        a protocol has nothing to draw, too little, or nobody to judge it.
    """
    for name in plan.groups:
        suite.attribute(name)
    for name, shares in plan.target.items():
        if set(shares) != set(suite.attribute(name)):
            raise UserError(
                f"target of {name} names {sorted(shares)}, its values are"
                f" {list(suite.attribute(name))}"
            )
    lacks = missing(suite, plan.prompts, detectors, given)
    for protocol in plan.protocols:
        if protocol in lacks:
            raise UserError(lacks[protocol])
    requests, weights = ({}, {}) if given is not None else _requests(adapter, suite, plan)
    pictures = requests.get("quality", given)
    if "quality" in plan.protocols and len(pictures) < 2:
        raise UserError(
            "quality of one picture, expected two or more; give more captions or pictures"
        )
    return requests, weights


def _prompts(suite: Suite, prompts: Mapping[str, PromptSet], protocol: str) -> Sequence[Prompt]:
    return prompts[protocol].prompts if protocol in prompts else suite.prompts_for(protocol)


def _requests(
    adapter: Adapter | None, suite: Suite, plan: Plan
) -> tuple[dict[str, list[Request]], dict[str, np.ndarray | None]]:
    """What to make for each protocol, and how it is steered."""
    if adapter is None and plan.safe:
        raise UserError("safe adds an adapter's safety concepts, but no adapter is given")
    if adapter is not None and not plan.groups and not plan.safe:
        raise UserError("an adapter is given but nothing chosen of it; name groups, or safe")
    requests: dict[str, list[Request]] = {}
    weights: dict[str, np.ndarray | None] = {}
    for protocol in plan.protocols:
        seed = plan.seed + SEED_RANGE * PROTOCOLS.index(protocol)
        each = plan.images_each(protocol)
        draw = fairness.plan if protocol == "fairness" else repeated
        wanted = draw(_prompts(suite, plan.prompts, protocol), each, seed)
        requests[protocol], weights[protocol] = wanted, None
        if adapter is not None:
            rows = np.zeros((len(wanted), len(adapter.concepts)), np.float32)
            if plan.groups:
                rows += fairness.fair_weights(
                    adapter, plan.groups, plan.target, wanted, each, plan.seed
                )
            if plan.safe:
                rows += selection.concept_weights(adapter, len(wanted) // each, each, safe=True)
            weights[protocol] = rows
    return requests, weights
