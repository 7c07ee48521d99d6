"""Trains the reading of prompts: contrast prompts through the frozen text encoder, then the heads.

Each group of concepts has its own contrast prompts, from the config's `reading` section and the
concepts' words:

    a person, "a photo of a doctor"           SOMEBODY
    a word of the group, "a woman doctor"     SOMEBODY and VALUE
    a thing, "a photo of a bulldog"           THING
    a person and a thing, "a doctor with a cat"   as the person, and THING
    two things, "a car and a cat"             THING
    an adjective, "an old doctor"             as without it; THING is not fitted to it

A person of the config whose phrase contains a word of the group also has VALUE.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import scipy.stats
from etils import epath
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open

from respodiff_jax.adapters import Adapter
from respodiff_jax.backbone import Backbone, equal_batches
from respodiff_jax.data.prompt_files import fill_in, with_article
from respodiff_jax.errors import UserError
from respodiff_jax.method.concepts import Concept, without_article
from respodiff_jax.method.reading import (
    SOMEBODY,
    THING,
    VALUE,
    Reading,
    always,
    fit_heads,
    scores,
)
from respodiff_jax.progress import Progress
from respodiff_jax.storage import local_copy, open_path, write_whole

READING_FILE = "reading.safetensors"
WARN_BELOW = 0.95  # held-out AUROC

_PERSON = "{person}"
_PEOPLE_PER_WORD = 12
_BATCH = 64


class TrainedReading(NamedTuple):
    """A reading of N concepts.

    Attributes:
      heads: of the concepts.
      accuracy: group -> head ("somebody", "thing", "value") -> held-out AUROC.
    """

    heads: Reading
    accuracy: Mapping[str, Mapping[str, float]]


def train_reading(
    config: ConfigDict, concepts: Sequence[Concept], model: Backbone, say: Callable[[str], None]
) -> dict[str, TrainedReading]:
    """Fits the heads of each fairness group; of the model, only the text encoder runs.

    Args:
      config: of the training; its `reading` section is read.
      concepts: of all groups.
      model: with the parameters of its text encoders.
      say: called with a line for each group.

    Returns:
      The reading of each concept, by name; empty without fairness concepts. Safety concepts find
      every prompt open.
    """
    known: dict[str, np.ndarray] = {}

    def encode(prompts):
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        bar = {"desc": "contrast prompts", "total": len(missing), "unit": "prompt"}
        with Progress(**bar, disable=not missing) as progress:
            for rows, count in equal_batches(len(missing), _BATCH):
                batch = [missing[row] for row in rows]
                context = model.encode_prompts(batch, model.default_resolution).context
                known.update(zip(batch[:count], np.asarray(context, np.float32), strict=False))
                progress.update(count)
        return np.stack([known[prompt] for prompt in prompts])

    groups: dict[str, list[Concept]] = {}
    for concept in concepts:
        if not concept.is_safety:
            groups.setdefault(concept.group, []).append(concept)
    heads, accuracy = {}, {}
    for group, members in groups.items():
        given = config.reading
        prompts = contrast_prompts(
            members, given.people, given.adjectives, given.things, given.templates
        )
        heads[group], accuracy[group] = fit_reading(encode, prompts)
        found = ", ".join(f"{head} {value:.3f}" for head, value in accuracy[group].items())
        doubt = ""
        if min(accuracy[group].values()) < WARN_BELOW:
            doubt = (
                f"; below {WARN_BELOW}: many prompts will be read wrongly. Give the concepts more"
                " `words` and the config more `reading.people` and `reading.things`, or set"
                " reading.train to False"
            )
        say(f"reading of prompts, {group}: held-out AUROC {found}{doubt}")
    if not groups:
        return {}
    safety = always(1, next(iter(heads.values())).weight.shape[-1])
    return {
        c.name: TrainedReading(safety if c.is_safety else heads[c.group], accuracy)
        for c in concepts
    }


def join(readings: Sequence[TrainedReading]) -> TrainedReading:
    """The reading of all concepts of several."""
    heads = Reading(*map(np.concatenate, zip(*(r.heads for r in readings), strict=True)))
    return TrainedReading(heads, readings[0].accuracy)


def with_reading(
    adapter: Adapter, reading: TrainedReading | None, concepts: Sequence[Concept]
) -> Adapter:
    """The adapter with the reading of its concepts.

    Args:
      adapter: of some of the concepts.
      reading: of the concepts, or None.
      concepts: of the run.
    """
    if reading is None:
        return adapter
    names = [concept.name for concept in concepts]
    rows = [names.index(name) for name in adapter.names]
    groups = {concept.group for concept in adapter.concepts}
    return dataclasses.replace(
        adapter,
        reading=Reading(*(leaf[rows] for leaf in reading.heads)),
        reading_accuracy={g: a for g, a in reading.accuracy.items() if g in groups},
    )


def write_reading(workdir: epath.PathLike, reading: TrainedReading | None) -> None:
    """Keeps the reading of a run's concepts in its folder; None removes an earlier one."""
    if reading is None:
        (open_path(workdir) / READING_FILE).unlink(missing_ok=True)
        return
    metadata = {"accuracy": json.dumps(reading.accuracy)}
    content = safetensors.numpy.save(reading.heads._asdict(), metadata)
    write_whole(open_path(workdir) / READING_FILE, content)


def load_reading(workdir: epath.PathLike) -> TrainedReading | None:
    """The reading in a run's folder; None where there is none."""
    path = open_path(workdir) / READING_FILE
    if not path.is_file():
        return None
    try:
        with local_copy(path) as local, safe_open(local, framework="numpy") as file:
            heads = Reading(*(file.get_tensor(field) for field in Reading._fields))
            return TrainedReading(heads, json.loads(file.metadata()["accuracy"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}); remove it and continue the training"
        ) from error


class ContrastPrompt(NamedTuple):
    """A prompt with its labels.

    Attributes:
      text: of the prompt.
      labels: what each head should say about it.
      phrase: that it is about.
      adjective: whether an adjective stands before the phrase.
    """

    text: str
    labels: tuple[bool, bool, bool]
    phrase: str
    adjective: bool = False


def contrast_prompts(
    concepts: Sequence[Concept],
    people: Sequence[str],
    adjectives: Sequence[str],
    things: Sequence[str],
    templates: Sequence[str],
) -> list[ContrastPrompt]:
    """The contrast prompts of one group.

    Args:
      concepts: of the group.
      people: noun phrases for somebody in the picture, without an article.
      adjectives: words that say nothing about the group.
      things: noun phrases for pictures without anybody.
      templates: with `{subject}` or `{a_subject}`; each phrase takes all of them.

    In one template each, everybody also stands with two adjectives, "an old doctor", and every
    eighth thing with one. And each phrase stands twice with a thing, "a doctor with a cat" and "a
    dog and a doctor": that is somebody and a thing, or two things.
    """
    words = list(dict.fromkeys(word for concept in concepts for word in concept.reading_words))
    # A concept's own prompt names it, whatever its `words` are.
    own = [word for concept in concepts for word in concept.own_words]
    names = [word.replace(_PERSON, "").strip() for word in dict.fromkeys((*words, *own))]
    named = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")(?!\w)", re.IGNORECASE)
    open_people = [person for person in people if not named.search(person)]
    if not open_people:
        found = ", ".join(dict.fromkeys(names))
        raise UserError(
            f"config.reading.people has nobody without a word of the group ({found}); add for"
            ' example "doctor"'
        )
    neutral = [without_article(p) for c in concepts for p in c.neutral_prompts]
    # The group's words are not neutral adjectives, and what is steered is not a thing.
    adjectives = [adjective for adjective in adjectives if not named.search(adjective)]
    things = [thing for thing in things if thing not in {*neutral, *names}]
    people = [*dict.fromkeys((*neutral, *people))]
    phrases = {person: (True, False, bool(named.search(person))) for person in people}
    for number, word in enumerate(words):
        chosen = [
            open_people[(number + i) * len(open_people) // _PEOPLE_PER_WORD % len(open_people)]
            for i in range(_PEOPLE_PER_WORD if _PERSON in word else 1)
        ]
        phrases |= {word.replace(_PERSON, person): (True, False, True) for person in chosen}
    people = list(phrases)
    phrases |= dict.fromkeys(things, (False, True, False))
    prompts = []

    def add(number, subject, *rest):
        template = templates[number % len(templates)]
        prompts.extend(ContrastPrompt(text, *rest) for text in fill_in([template], subject))

    for phrase, labels in phrases.items():
        texts = fill_in(templates, phrase)
        prompts.extend(ContrastPrompt(text, labels, phrase) for text in texts)
    for number, phrase in enumerate([*2 * people, *things[::8]] if adjectives else ()):
        subject = f"{adjectives[number % len(adjectives)]} {phrase}"
        add(number, subject, phrases[phrase], phrase, True)
    for number, (phrase, labels) in enumerate(phrases.items()):
        thing = things[(7 * number + 3) % len(things)]
        pairs = f"{phrase} with {with_article(thing)}", f"{thing} and {with_article(phrase)}"
        for shift, subject in enumerate(pairs):
            add(number + shift, subject, (labels[SOMEBODY], True, labels[VALUE]), phrase)
    return prompts


def fit_reading(
    encode: Callable[[Sequence[str]], np.ndarray], prompts: Sequence[ContrastPrompt]
) -> tuple[Reading, dict[str, float]]:
    """Fits the heads of a group, and measures them on phrases that they were not fitted to.

    Args:
      encode: gives the text states of prompts, `(P, L, D)`.
      prompts: from `contrast_prompts`.

    Returns:
      The heads, with N = 1, and the held-out AUROC of each head: half of the phrases are read by
      heads that were fitted to the other half.
    """
    context = encode([prompt.text for prompt in prompts])
    labels = np.array([prompt.labels for prompt in prompts])
    _, number = np.unique([prompt.phrase for prompt in prompts], return_inverse=True)
    half = np.random.default_rng(0).permutation(number.max() + 1)[number] % 2 == 0
    # Adjectives stand mostly before people. Fitted to them, THING would read any unknown word as a
    # person, and miss things.
    fitted = np.ones(labels.shape, bool)
    fitted[:, THING] = [not prompt.adjective for prompt in prompts]
    weights = np.stack([f / np.bincount(number, f)[number] for f in fitted.T], 1)

    for rows in (half, ~half):
        if not (labels[rows].any(0) & (~labels[rows]).any(0)).all():
            raise UserError(
                "config.reading has too few people or things to fit its classifiers to one half of"
                " them and measure them on the other; give at least a dozen of each"
            )

    held_out = np.zeros(labels.shape, np.float32)
    for rows in (half, ~half):
        heads = fit_heads(context[rows], labels[rows], weights[rows])
        held_out[~rows] = np.asarray(scores(heads, context[~rows]))[:, 0]
    accuracy = {
        name: auroc(held_out[fitted[:, head], head], labels[fitted[:, head], head])
        for name, head in (("somebody", SOMEBODY), ("thing", THING), ("value", VALUE))
    }
    reading = fit_heads(context, labels, weights)
    # An unknown word should not be read as a value. So VALUE's threshold is midway between the mean
    # scores of prompts with and without a value (EquiSteer), not where the fit puts it.
    named = labels[:, VALUE]
    middle = (held_out[named, VALUE].mean() + held_out[~named, VALUE].mean()) / 2
    reading.bias[:, VALUE] -= middle
    return reading, accuracy


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The share of pairs of a positive and a negative in which the positive scores higher."""
    positives, ranks = labels.sum(), scipy.stats.rankdata(scores)[labels]
    below = ranks.sum() - positives * (positives + 1) / 2
    return float(below / (positives * (~labels).sum()))
