"""Chooses the concepts that steer each image: by name, by fair quota, or for safety.

Fairness (paper, section 4.4): each image gets one concept of a group, so that the images meet the
group's target distribution, by default uniform. Safety: each image gets the sum of all safety
concepts.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from respodiff_jax.adapters import Adapter, CombinedAdapter
from respodiff_jax.errors import UserError, nearest, shortened
from respodiff_jax.method.concepts import is_number
from respodiff_jax.method.reading import Decision


def fair_assignment(
    images_per_prompt: int, num_prompts: int, ratios: Sequence[float], seed: int
) -> np.ndarray:
    """Assigns a concept to each image, so that the ratios are met exactly.

    Concept k gets its share `ratios[k]` of all images, rounded by the largest remainder, with ties
    by lot. Of the images of each prompt it gets its share, rounded down or up. The order is random.

    Args:
      images_per_prompt: M.
      num_prompts: P.
      ratios: K shares, 0 or more; they are normalised.
      seed: seed of the order and the lots.

    Returns:
      int `(P, M)`, indices into `ratios`.

    Raises:
      UserError: if ratios are negative, not finite or all zero.
    """
    if min(ratios) < 0 or not 0 < sum(ratios) < math.inf:
        raise UserError(f"ratios are {list(ratios)}, expected shares of 0 or more, not all 0")
    rng = np.random.default_rng(seed)
    # With fractions, 0.29 of 100 is 29 and 1/3 of 3 is 1.
    shares = [Fraction(float(ratio)).limit_denominator(10**6) for ratio in ratios]
    shares = [share / sum(shares) for share in shares]
    if not num_prompts:
        return np.zeros((0, images_per_prompt), int)
    exact = [share * images_per_prompt * num_prompts for share in shares]
    quotas = np.array([math.floor(value) for value in exact])
    by_lot = rng.permutation(len(shares))
    largest_remainder = sorted(by_lot, key=lambda k: quotas[k] - exact[k])
    quotas[largest_remainder[: images_per_prompt * num_prompts - quotas.sum()]] += 1

    # Every prompt gets the floors. The rest of the quotas goes around the prompts in turn, one
    # concept after the other. The rest of a concept is at most one image per prompt, so no prompt
    # gets the concept twice from the rest.
    floors = np.array([math.floor(share * images_per_prompt) for share in shares])
    order = rng.permutation(len(shares))
    rest = np.repeat(order, (quotas - floors * num_prompts)[order])
    dealt = rest.reshape(-1, num_prompts).T  # (P, M - sum of floors)
    common = np.tile(np.repeat(np.arange(len(shares)), floors), (num_prompts, 1))
    assignment = rng.permuted(np.concatenate([common, dealt], axis=1), axis=1)
    return rng.permutation(assignment, axis=0)


def concept_weights(
    adapter: Adapter | CombinedAdapter | None,
    num_prompts: int,
    images_per_prompt: int,
    *,
    concepts: Mapping[str, float | None] | None = None,
    fair: str | None = None,
    ratio: Mapping[str, float] | None = None,
    safe: bool = False,
    seed: int = 0,
    decisions: np.ndarray | None = None,
) -> np.ndarray | None:
    """The weight of each concept in each image; the images of a prompt follow each other.

    A concept steers an image only if its prompt leaves the concept's group open. The shares of
    `fair` are met exactly among the images of open prompts.

    Args:
      adapter: of N concepts, or None for the base model.
      num_prompts: P.
      images_per_prompt: M.
      concepts: concept name -> scale, for every image; None is the concept's default scale.
      fair: a concept group; each image gets one of its concepts, at its default scale, by
        `fair_assignment`.
      ratio: concept name -> share, for the group of `fair`; the sum is 1, and a concept that is
        not named gets 0. None is uniform.
      safe: add every safety concept at its default scale.
      seed: seed of `fair_assignment`.
      decisions: from `read_prompts`, `(P, N)`; None finds every prompt open.

    Returns:
      float32 `(P * M, N)`, or None without an adapter.

    Raises:
      UserError: if a concept or group is unknown (the message lists the known ones), a scale is not
        finite, a group cannot be balanced, `ratio` does not fit `fair` or sum to 1, `safe` finds no
        safety concept, `concepts` names one that `fair` or `safe` chooses, or the choice is empty
        or has no adapter.
    """
    chosen = {"concepts": concepts, "fair": fair, "ratio": ratio, "safe": safe}
    if adapter is None:
        if used := [f"`{name}`" for name, value in chosen.items() if value]:
            raise UserError(f"{', '.join(used)} given but no adapter; give `adapter`")
        return None
    if not any(chosen.values()):
        raise UserError(
            "an adapter is given but none of its concepts is chosen; choose with `concepts`, `fair`"
            f" or `safe`. {_inventory(adapter)}"
        )
    for name, scales in (("concepts", concepts), ("ratio", ratio)):
        if scales and not isinstance(scales, Mapping):
            raise UserError(f"`{name}` is {scales!r}, expected {{name: number}}")
    if decisions is None:
        decisions = np.full((num_prompts, len(adapter.concepts)), Decision.OPEN)
    weights = np.zeros((num_prompts * images_per_prompt, len(adapter.concepts)), np.float32)
    for name, scale in (concepts or {}).items():
        if name not in adapter.names:
            own, _, scale = name.rpartition("=")
            if own.strip() in adapter.names:
                raise UserError(
                    f"concept {own.strip()!r}: scale is {shortened(scale)!r}, expected a number"
                )
            raise UserError(
                f"concept {shortened(name)!r} is not in the adapter"
                f"{nearest(name, adapter.names) or '.'}"
                f" {_inventory(adapter)}"
            )
        index = adapter.names.index(name)
        scale = adapter.default_scales[index] if scale is None else scale
        if not is_number(scale):
            raise UserError(f"concept {name!r}: scale is {scale!r}, expected a finite number")
        weights[:, index] += scale
    if ratio and fair is None:
        raise UserError("`ratio` divides a group's concepts; name the group with `fair`")
    if fair is not None:
        members, shares = _fair_shares(adapter, fair, ratio)
        if clash := [adapter.names[i] for i in members if adapter.names[i] in (concepts or {})]:
            raise UserError(
                f"`fair` {fair} chooses among its concepts itself; drop {clash[0]!r} from"
                " `concepts`"
            )
        is_open = (decisions[:, members] == Decision.OPEN).all(1)
        rows = np.flatnonzero(np.repeat(is_open, images_per_prompt))
        picks = fair_assignment(images_per_prompt, int(is_open.sum()), shares, seed).reshape(-1)
        columns = np.asarray(members)[picks]
        weights[rows, columns] += np.float32(adapter.default_scales)[columns]
    if safe:
        members = [i for i, concept in enumerate(adapter.concepts) if concept.is_safety]
        if not members:
            raise UserError(f"`safe`: the adapter has no safety concepts. {_inventory(adapter)}")
        if clash := [adapter.names[i] for i in members if adapter.names[i] in (concepts or {})]:
            raise UserError(
                "`safe` chooses all safety concepts at their default scales; drop"
                f" {clash[0]!r} from `concepts`, or drop `safe`"
            )
        weights[:, members] += np.float32(adapter.default_scales)[members]
    is_open = np.repeat(decisions == Decision.OPEN, images_per_prompt, axis=0)
    return np.where(is_open, weights, np.float32(0))


def _fair_shares(
    adapter: Adapter | CombinedAdapter, group: str, ratio: Mapping[str, float] | None
) -> tuple[list[int], list[float]]:
    """The indices of the group's concepts in the adapter, and their shares."""
    members = [i for i, concept in enumerate(adapter.concepts) if concept.group == group]
    names = [adapter.names[i] for i in members]
    if not members:
        groups = {concept.group for concept in adapter.concepts}
        raise UserError(
            f"`fair`: the adapter has no group {shortened(group)!r}"
            f"{nearest(group, groups) or '.'} {_inventory(adapter)}"
        )
    if any(adapter.concepts[i].is_safety for i in members):
        raise UserError(f"`fair`: {group!r} holds safety concepts, which are summed; use `safe`")
    if len(members) == 1:
        raise UserError(
            f"`fair`: group {group!r} has only the concept {names[0]!r}, nothing to balance; name"
            " it in `concepts`, or add an adapter with the others"
        )
    if not ratio:
        return members, [1 / len(members)] * len(members)
    if outside := sorted(set(ratio) - set(names)):
        raise UserError(f"`ratio` names {outside}, but group {group!r} has {names}")
    if not all(is_number(share) and share >= 0 for share in ratio.values()):
        raise UserError(f"`ratio` is {dict(ratio)}, expected shares of 0 or more")
    if abs(sum(ratio.values()) - 1) > 5e-3:
        raise UserError(f"`ratio` sums to {sum(ratio.values()):g}, expected 1: {dict(ratio)}")
    return members, [ratio.get(name, 0.0) for name in names]


def _inventory(adapter: Adapter | CombinedAdapter) -> str:
    """A sentence that lists the adapter's concepts by group."""
    groups: dict[str, list[str]] = {}
    for concept in adapter.concepts:
        groups.setdefault(concept.group, []).append(concept.name)
    listed = "; ".join(f"{group}: {', '.join(names)}" for group, names in groups.items())
    return shortened(f"The adapter has {listed}", 200)
