"""Decides for each prompt which concepts of an adapter may steer its pictures."""

from collections.abc import Sequence

import jax
import numpy as np

from respodiff_jax.adapters.adapter import Adapter, label
from respodiff_jax.adapters.combined import CombinedAdapter
from respodiff_jax.backbone import Backbone, equal_batches
from respodiff_jax.errors import UserError
from respodiff_jax.method import reading

_BATCH = 64


def reads_prompts(adapter: Adapter | CombinedAdapter) -> bool:
    """Whether some of the adapter's concepts depend on the prompt."""
    return any(
        part.reading is not None and not all(concept.is_safety for concept in part.concepts)
        for part in adapter.parts
    )


def read_prompts(
    adapter: Adapter | CombinedAdapter, model: Backbone, prompts: Sequence[str]
) -> np.ndarray:
    """The decision on each prompt for each concept.

    A group is open only if all its concepts find it open; else each of them gets the first decision
    that is not. Safety concepts decide apart from others.

    Args:
      adapter: of N concepts. Concepts without a reading find every prompt open.
      model: with the parameters of its text encoders.
      prompts: P texts; each distinct text is encoded once.

    Returns:
      int `(P, N)`, values of `method.reading.Decision`.

    Raises:
      UserError: if the adapter reads text states of another size than the model's.
    """
    open_to_all = np.zeros((len(prompts), len(adapter.concepts)), int)
    if not reads_prompts(adapter):
        return open_to_all
    distinct = list(dict.fromkeys(prompts))
    found = []
    for rows, count in equal_batches(len(distinct), min(_BATCH, len(distinct))):
        batch = [distinct[row] for row in rows]
        context = model.encode_prompts(batch, model.default_resolution).context
        found.append(read_contexts(adapter, context)[:count])
    decisions = np.concatenate(found)
    row = {prompt: i for i, prompt in enumerate(distinct)}
    return decisions[[row[prompt] for prompt in prompts]]


def read_contexts(adapter: Adapter | CombinedAdapter, context: jax.Array) -> np.ndarray:
    """As `read_prompts`, from the prompts' text states, `(P, L, D)`."""
    heads = (part.reading or reading.always(len(part.concepts), 1) for part in adapter.parts)
    scores = [_scores(part, h, context) for part, h in zip(adapter.parts, heads, strict=True)]
    decisions = reading.decide(np.concatenate(scores, axis=1))
    groups = [(concept.group, concept.is_safety) for concept in adapter.concepts]
    for group in set(groups):
        members = [i for i, other in enumerate(groups) if other == group]
        own = decisions[:, members]
        first = (own != reading.Decision.OPEN).argmax(1)
        decisions[:, members] = np.take_along_axis(own, first[:, None], axis=1)
    return decisions


def decisions_table(
    adapter: Adapter | CombinedAdapter, model: Backbone, prompts: Sequence[str]
) -> str:
    """A line for each prompt with its decision on each group, then a line of counts for each group.

    Safety concepts steer every prompt and are left out.

    Raises:
      UserError: as `read_prompts`.
    """
    decisions = read_prompts(adapter, model, prompts)
    first_of: dict[str, int] = {}
    for i, concept in enumerate(adapter.concepts):
        if not concept.is_safety:
            first_of.setdefault(concept.group, i)
    columns = [decisions[:, i] for i in first_of.values()]
    width = max(10, *(len(group) + 2 for group in first_of))
    lines = ["".join(f"{group:{width}}" for group in first_of) + "prompt"]
    for prompt, row in zip(prompts, zip(*columns, strict=True), strict=True):
        words = (f"{reading.Decision(d).name.lower():{width}}" for d in row)
        lines.append("".join(words) + " ".join(prompt.split()))
    for group, column in zip(first_of, columns, strict=True):
        counts = [f"{(column == d).sum():,} {d.name.lower()}" for d in reading.Decision]
        lines.append(f"{group}: {', '.join(counts)}")
    return "\n".join(lines)


def _scores(part: Adapter, heads: reading.Reading, context: jax.Array) -> np.ndarray:
    if part.reading is None:
        return np.tile(heads.bias, (len(context), 1, 1))
    ours, theirs = heads.weight.shape[-1], context.shape[-1]
    if ours != theirs:
        raise UserError(
            f"the adapter ({label(part)}) reads text states of {ours} features, this model's have"
            f" {theirs}; use the model that it was trained on, {part.backbone['name']}, or steer"
            " every prompt with `steer_always`"
        )
    return np.asarray(reading.scores(heads, context))
