"""What a visitor of the page chose, and what follows: pictures, reasons, files, a command line."""

import dataclasses
import os
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from respodiff_jax import images as images_lib
from respodiff_jax.adapters import Adapter, CombinedAdapter, unconditional
from respodiff_jax.generation.folder import common_record, reading_of, scales_of
from respodiff_jax.generation.sampling import SamplerOptions
from respodiff_jax.generation.selection import concept_weights
from respodiff_jax.method.concepts import Concept
from respodiff_jax.method.reading import Decision
from respodiff_jax.play.painter import Job, Painter

MAX_SEED = 2**32 - 1 - 64  # room for the pictures that follow the first
STRIP = 7  # pictures of a strip


@dataclasses.dataclass(frozen=True)
class Settings:
    """The controls of the page; the names are those of `generate`.

    Attributes:
      prompt: the prompt.
      concepts: concept name -> scale, for every picture.
      fair: a concept group; each picture gets one of its concepts.
      ratio: concept name -> share, for the group of `fair`; the sum is 1. None is uniform.
      safe: add every safety concept.
      steer_always: steer every prompt at every timestep, as the paper does.
      count: number of pictures.
      seed: seed of the first picture.
      num_steps, sampler, guidance_scale, negative_prompt: as in `SamplerOptions`.
    """

    prompt: str
    concepts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    fair: str | None = None
    ratio: Mapping[str, float] | None = None
    safe: bool = False
    steer_always: bool = False
    count: int = 8
    seed: int = 0
    num_steps: int = 20
    sampler: str = "ddim"
    guidance_scale: float = 7.5
    negative_prompt: str = ""

    @property
    def options(self) -> SamplerOptions:
        return SamplerOptions(
            self.num_steps, self.guidance_scale, self.negative_prompt, sampler=self.sampler
        )

    @property
    def steers(self) -> bool:
        return bool(self.concepts or self.fair or self.safe)

    def selection(self) -> dict[str, object]:
        """The arguments of `concept_weights` that choose concepts."""
        return {
            "concepts": self.concepts,
            "fair": self.fair,
            "ratio": self.ratio,
            "safe": self.safe,
        }


class Plan(NamedTuple):
    """The pictures of some settings.

    Attributes:
      base: a job for each picture, without the adapter.
      adapted: a job for each picture, from the same noise.
      reasons: a line for each picture: what was steered and why, or why not.
      decisions: from `read_prompts`, or None.
    """

    base: list[Job]
    adapted: list[Job]
    reasons: list[str]
    decisions: np.ndarray | None


def plan(painter: Painter, settings: Settings) -> Plan:
    """Chooses what steers each picture.

    Raises:
      UserError: if the settings do not fit each other or the adapter.
    """
    adapter, count = painter.adapter, settings.count
    base = [Job(settings.prompt, settings.seed + i) for i in range(count)]
    if adapter is None or not settings.steers:
        why = "no adapter is loaded" if adapter is None else "no concept is chosen"
        return Plan(base, base, [f"Not steered: {why}."] * count, None)
    decisions = decide(painter, settings, [settings.prompt])
    weights = concept_weights(
        adapter, 1, count, seed=settings.seed, decisions=decisions, **settings.selection()
    )
    adapted = [
        job._replace(weights=tuple(row), steer_always=settings.steer_always)
        for job, row in zip(base, weights.tolist(), strict=True)
    ]
    reasons = [_reason(adapter, settings, decisions, row) for row in weights]
    return Plan(base, adapted, reasons, decisions)


def decide(painter: Painter, settings: Settings, prompts: Sequence[str]) -> np.ndarray | None:
    """The decisions on prompts, `(len(prompts), N)`; None if every prompt is steered."""
    return None if settings.steer_always else painter.decisions(prompts)


def label(concept: Concept) -> str:
    """A concept's name on the page; that of safety says what it avoids."""
    if not concept.is_safety:
        return concept.name
    return textwrap.shorten(f"away from {concept.unsafe_prompt}", 60, placeholder=" …")


def _direction(concept: Concept, weight: float) -> str:
    """Where a weight steers, and how strongly; a negative weight steers the other way."""
    if concept.is_safety:
        text = label(concept) if weight > 0 else label(concept).replace("away from", "towards", 1)
    else:
        text = f"to {concept.name}" if weight > 0 else f"away from {concept.name}"
    return text if abs(weight) == 1 else f"{text} × {abs(weight):.2g}"


def _reason(
    adapter: Adapter | CombinedAdapter,
    settings: Settings,
    decisions: np.ndarray | None,
    weights: np.ndarray,
) -> str:
    """A sentence for each group that was chosen."""
    chosen: dict[str, dict[str, float]] = {}
    for concept, weight in zip(adapter.concepts, weights.tolist(), strict=True):
        asked = concept.name in settings.concepts or concept.group == settings.fair
        if asked or (settings.safe and concept.is_safety):
            chosen.setdefault(concept.group, {})[concept.name] = weight
    reads = {
        concept.group
        for part in adapter.parts
        for concept in part.concepts
        if part.reading is not None and not concept.is_safety
    }
    concepts = {concept.name: concept for concept in adapter.concepts}
    reading = reading_of(adapter, decisions, 0)
    sentences = []
    for group, scales in chosen.items():
        title = group.replace("_", " ")
        decision = reading.get(group, "open")
        if decision == Decision.NAMED.name.lower():
            sentences.append(f"Not steered: the prompt names the {title}.")
            continue
        if decision == Decision.NOBODY.name.lower():
            sentences.append(f"Not steered: the adapter finds no person in the prompt ({title}).")
            continue
        steered = ", ".join(
            _direction(concepts[name], weight) for name, weight in scales.items() if weight
        )
        why = f"the prompt leaves the {title} open"
        if group not in reads or decisions is None:
            why = "every prompt is steered"
        sentences.append(f"Steered {steered or 'to nothing'}: {why}.")
    return " ".join(sentences)


def signed(scale: float) -> str:
    """A scale with its sign: "+0.33", "-1.00", or "0"."""
    text = f"{scale:+.2f}"
    return text if float(text) else "0"


def strip(painter: Painter, settings: Settings, concept: str) -> tuple[list[Job], str]:
    """A picture's path from scale −1 to +1 of a concept, and why it may not change."""
    fixed = dataclasses.replace(
        settings, concepts={concept: 1.0}, fair=None, ratio=None, safe=False, count=1
    )
    decisions = decide(painter, fixed, [settings.prompt])
    weights = concept_weights(painter.adapter, 1, 1, decisions=decisions, **fixed.selection())[0]
    scales = np.linspace(-1, 1, STRIP)
    jobs = [
        Job(
            settings.prompt,
            settings.seed,
            tuple((weights * scale).tolist()),
            settings.steer_always,
        )
        for scale in scales
    ]
    return jobs, _reason(painter.adapter, fixed, decisions, weights)


def command_line(painter: Painter, settings: Settings, sources: Sequence[str]) -> str:
    """The command that makes the same pictures, for a POSIX shell.

    It names everything that `generate` could otherwise choose by the adapter or the device.

    Args:
      painter: has the model and the resolution.
      settings: the controls.
      sources: where the adapters are.
    """
    model = painter.model
    words = [["respodiff", "generate"], ["--model", model.identity["name"]]]
    words += [[f"--{n}", v] for n in ("revision", "variant") if (v := model.identity[n])]
    words += [["--dtype", np.dtype(model.dtype)], ["--resolution", painter.resolution]]
    if sources and settings.steers:
        words += [["--adapter", _near(source)] for source in sources]
        words += [["--concept", f"{n}={s:g}"] for n, s in settings.concepts.items()]
        if settings.fair:
            words.append(["--fair", settings.fair])
        if settings.fair and settings.ratio:
            shares = ",".join(f"{name}={share:g}" for name, share in settings.ratio.items())
            words.append(["--ratio", shares])
        words += [["--safe"]] * settings.safe + [["--steer-always"]] * settings.steer_always
        words.append(["--base"])
    words += [
        [f"--prompt={settings.prompt}"],
        ["--images-per-prompt", settings.count],
        ["--seed", settings.seed],
        ["--steps", settings.num_steps],
        ["--sampler", settings.sampler],
        ["--guidance", f"{settings.guidance_scale:g}"],
    ]
    if settings.negative_prompt:
        words.append([f"--negative-prompt={settings.negative_prompt}"])
    words.append(["--out", "pictures"])
    return " \\\n    ".join(shlex.join(map(str, word)) for word in words)


def _near(source: str) -> str:
    """A path from the current folder, where that is shorter."""
    if not os.path.isabs(source):
        return source
    return min(os.path.relpath(source), source, key=len)


def picture_file(
    painter: Painter,
    settings: Settings,
    job: Job,
    picture: np.ndarray,
    sources: Sequence[str],
    decisions: np.ndarray | None = None,
) -> bytes:
    """A PNG with the same `parameters` as one of `respodiff generate`."""
    is_base = not job.weights
    options = dataclasses.replace(settings.options, resolution=painter.resolution)
    adapter = painter.adapter
    if adapter is not None and settings.steer_always:
        adapter = unconditional(adapter)
    record = {
        "prompt": job.prompt,
        "seed": job.seed,
        "concepts": {} if is_base else scales_of(painter.adapter, np.asarray(job.weights)),
        "prompt_reading": {} if is_base else reading_of(painter.adapter, decisions, 0),
    } | common_record(painter.model, options, sources, adapter)
    return images_lib.to_png(Image.fromarray(picture), record)


def grid_file(
    settings: Settings, base: Sequence[np.ndarray], adapted: Sequence[np.ndarray]
) -> bytes:
    """A PNG with the pictures before above those after, in rows of at most eight."""
    rows, labels, captions = [], [], []
    columns = min(len(base), 8)
    blank = np.full_like(base[0], 255)
    for start in range(0, len(base), columns):
        for name, pictures in (("before", base), ("after", adapted)):
            part = list(pictures[start : start + columns])
            seeds = [f"seed {settings.seed + start + i}" for i in range(len(part))]
            rows.append(part + [blank] * (columns - len(part)))
            captions.append(seeds + [""] * (columns - len(part)))
            labels.append(name)
    title = settings.prompt
    return images_lib.to_png(images_lib.grid(rows, labels, captions, title=title, rows_per_group=2))


def strip_file(title: str, pictures: Sequence[np.ndarray]) -> bytes:
    """A PNG of a strip."""
    captions = [signed(scale) for scale in np.linspace(-1, 1, STRIP)]
    return images_lib.to_png(images_lib.grid([pictures], captions=[captions], title=title))
