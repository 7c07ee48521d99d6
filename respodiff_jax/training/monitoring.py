"""Watching a run: progress bar, TensorBoard, JSON lines and validation grids.

All of it is written below the working directory, by process 0: `metrics.jsonl`, `tensorboard/`,
`grids/`.
"""

import contextlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm

from respodiff_jax.adapters import Adapter
from respodiff_jax.backbone import Backbone
from respodiff_jax.generation.sampling import default_batch_size, initial_noise
from respodiff_jax.images import grid
from respodiff_jax.method.concepts import Concept
from respodiff_jax.method.modules import Steering
from respodiff_jax.method.objective import ConceptArrays
from respodiff_jax.method.train_step import Metrics
from respodiff_jax.storage import LocalFolder, append_text, read_json_lines, write_whole

# Of many concepts, nobody looks at more grids than this.
MAX_GRIDS = 8
# How often TensorBoard's events are copied to a bucket.
PUSH_SECONDS = 120


class RunLog:
    """Progress bar, `metrics.jsonl` and TensorBoard of a run.

    Args:
      workdir: of the run.
      concepts: in the order of the metrics' concept axis, which may go on after them.
      batch_size: samples of each concept in a step.
      first_step: steps done before, 0 or where a checkpoint resumed; later entries are dropped.
      steps: to do in all.
      label: shown before the bar.
    """

    def __init__(
        self,
        workdir: epath.Path,
        concepts: Sequence[Concept],
        batch_size: int,
        first_step: int,
        steps: int,
        label: str = "",
    ):
        self._names = [c.name for c in concepts]
        self._diverged = np.zeros(len(concepts), bool)
        self._samples_per_step = len(concepts) * batch_size
        self._writes = jax.process_index() == 0
        self._bar = tqdm(
            desc=label or None,
            total=steps,
            initial=first_step,
            unit="step",
            disable=not self._writes,
            smoothing=0.05,
        )
        self._last_time: float | None = None  # unknown until the step has compiled
        if self._writes:
            self._jsonl = workdir / "metrics.jsonl"
            _drop_lines_after(self._jsonl, first_step)
            # Its own writer for buckets has a thread that ends with the first failure, and the run
            # would then wait for it.
            self._events = LocalFolder(workdir / "tensorboard")
            self._tensorboard = SummaryWriter(str(self._events.path), purge_step=first_step + 1)
            self._pushed = time.monotonic()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exc) -> None:
        self._bar.close()
        if self._writes:
            self._tensorboard.close()
            self._events.close()

    def write(self, step: int, metrics: Sequence[Metrics]) -> int:
        """Records host metrics of the steps since the last call, of which `step` is the newest.

        A concept that has diverged is told of once, and recorded no more.

        Returns:
          How many concepts have not diverged.
        """
        metrics = [Metrics(*(x[: len(self._names)] for x in m)) for m in metrics]
        diverged_at = metrics[-1].diverged_at
        for i in np.flatnonzero((diverged_at >= 0) & ~self._diverged):
            self.say(
                f"dropped {self._names[i]!r}: loss or module no longer finite at step"
                f" {diverged_at[i]}; it stays as it was before"
            )
        self._diverged = diverged_at >= 0
        remaining = int((~self._diverged).sum())
        now = time.perf_counter()
        rate = None
        if self._last_time is not None:
            rate = len(metrics) * self._samples_per_step / (now - self._last_time)
        self._last_time = now
        self._bar.update(len(metrics))
        if not self._writes or not remaining:
            return remaining
        means = Metrics(*(np.mean(np.stack(x), axis=0) for x in zip(*metrics, strict=True)))
        alive = ~self._diverged
        shown = ("loss_resp", "loss_sem", "grad_norm_ram", "grad_norm_sam")
        scalars = {
            name: {field: float(getattr(means, field)[i]) for field in shown}
            for i, name in enumerate(self._names)
            if alive[i]
        }
        self._bar.set_postfix_str(
            f"L_resp {means.loss_resp[alive].mean():.4g}, L_sem {means.loss_sem[alive].mean():.4g}"
            + (f", {rate:.3g} samples/s" if rate else "")
        )
        line = {"step": step, "samples_per_s": rate, "concepts": scalars}
        append_text(self._jsonl, json.dumps(line) + "\n")
        for name, fields in scalars.items():
            for field, value in fields.items():
                self._tensorboard.add_scalar(f"{name}/{field}", value, step)
        if rate:
            self._tensorboard.add_scalar("samples_per_s", rate, step)
        self._tensorboard.add_scalar("ddim_index", float(means.ddim_index.mean()), step)
        if time.monotonic() - self._pushed > PUSH_SECONDS:
            self._tensorboard.flush()
            self._events.push()
            self._pushed = time.monotonic()
        return remaining

    def write_grid(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds a validation grid, uint8 `(H, W, 3)`, to TensorBoard; its time is not the steps'."""
        self._tensorboard.add_image(f"{name}/grid", image, step, dataformats="HWC")
        if self._last_time is not None:
            self._last_time = time.perf_counter()

    def say(self, text: str) -> None:
        """Prints a line above the bar, on process 0."""
        if self._writes:
            self._bar.write(text)


def _drop_lines_after(path: epath.Path, step: int) -> None:
    if path.exists():
        kept = [line for line in read_json_lines(path) if line["step"] <= step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))


class Profiler:
    """A trace of a few steps after compilation, for TensorBoard's profile tab.

    Args:
      directory: where to; None for no trace.
    """

    FIRST, LAST = 2, 5  # counted from the first step of this start

    def __init__(self, directory: epath.Path | None):
        self._directory = directory
        self._trace = contextlib.ExitStack()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exc) -> None:
        self._trace.close()

    def before_step(self, index: int) -> None:
        """Starts or stops the trace; `index` counts the steps of this start."""
        if self._directory is not None and index == self.FIRST:
            folder = LocalFolder(self._directory)
            self._trace.callback(folder.close)
            self._trace.enter_context(jax.profiler.trace(folder.path))
        elif index > self.LAST:
            self._trace.close()


class ValidationGrids:
    """Pictures of each concept's first neutral prompt: base, RAM + SAM, RAM only, of equal seeds.

    Args:
      workdir: of the run; grids go to `grids/`.
      config: the config's `log` section.
      steps: of the run.
      backbone: the model's functions; its parameters are not used.
      sample: from `Placement.compile_sampler`.
      concepts: the concepts, and
      arrays: their embeddings.
      resolution: in pixels.
    """

    ROWS = ("base", "RAM + SAM", "RAM only")
    RAM_SCALES, SAM_SCALES = np.array([0, 1, 1], np.float32), np.array([0, 1, 0], np.float32)

    def __init__(
        self,
        workdir: epath.Path,
        config: Any,
        steps: int,
        backbone: Backbone,
        sample: Callable,
        concepts: Sequence[Concept],
        arrays: ConceptArrays,
        resolution: int,
    ):
        self._directory = workdir / "grids"
        self._config = config
        self._steps = steps
        self._concepts = concepts[:MAX_GRIDS]
        self._neutral = jax.tree.map(lambda x: np.asarray(x[:, 0]), arrays.neutral)
        self._empty = jax.tree.map(lambda x: np.asarray(x[:1]), arrays.empty)
        self._noise = np.asarray(
            initial_noise(range(config.grid_images), backbone.latent_shape(resolution))
        )
        # All waves have as many modules, and a diverged concept's stay, so that none compiles anew.
        self._num_modules = min(len(arrays.stream), MAX_GRIDS)
        # As many images at a time as `generate` gives a device: a grid fits where training does.
        most = self._num_modules * len(self.ROWS) * config.grid_images
        self._batch_size = default_batch_size(most, jax.device_count(), resolution)
        self._sample = sample

    def due(self, step: int) -> bool:
        """Whether there are to be grids of that step."""
        return step == self._steps or step % self._config.grid_every == 0

    def missing(self, step: int, adapter: Adapter) -> bool:
        """Whether that step lacks any, as process 0 sees it; all processes take part."""
        found = len(list(self._directory.glob(f"{step:07d}_*.png")))
        some = np.array(found < len(self._shown(adapter)))
        return bool(multihost_utils.broadcast_one_to_all(some))

    def _shown(self, adapter: Adapter) -> list[int]:
        return [i for i, c in enumerate(self._concepts) if c.name in adapter.names]

    def write(self, step: int, frozen: dict, adapter: Adapter, log: RunLog) -> None:
        """Samples and writes one grid for each concept that the adapter has; every process takes
        part."""
        shown = self._shown(adapter)
        images = self._images(frozen, adapter, shown) if shown else ()
        if jax.process_index() != 0:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        for i, rows in zip(shown, images, strict=True):
            concept = self._concepts[i]
            title = f'"{concept.neutral_prompts[0]}" to {concept.name}, step {step}'
            picture = grid(rows, row_labels=self.ROWS, title=title)
            name = re.sub(r"\W+", "_", concept.name)
            content = io.BytesIO()
            picture.save(content, format="PNG")
            write_whole(self._directory / f"{step:07d}_{i:02d}_{name}.png", content.getvalue())
            log.write_grid(step, concept.name, np.asarray(picture.convert("RGB")))

    def _images(self, frozen: dict, adapter: Adapter, shown: Sequence[int]) -> np.ndarray:
        """Images `(len(shown), 3, grid_images, H, W, 3)`, in batches over all devices."""
        columns = np.zeros(self._num_modules, int)
        columns[shown] = [adapter.names.index(self._concepts[i].name) for i in shown]
        ram, sam = jax.tree.map(lambda x: x[columns], (adapter.ram, adapter.sam))
        shape = len(shown), len(self.ROWS), len(self._noise)
        concept, row, seed = (index.ravel() for index in np.indices(shape))
        concept = np.array(shown)[concept]
        own = np.eye(self._num_modules, dtype=np.float32)[concept]
        ram_scale = own * self.RAM_SCALES[row, None]
        sam_scale = own * self.SAM_SCALES[row, None]
        guidance_scale = np.float32(self._config.grid_guidance_scale)
        images = []
        for start in range(0, len(seed), self._batch_size):
            # The last batch is filled up, so that all have one shape.
            now = np.minimum(np.arange(start, start + self._batch_size), len(seed) - 1)
            cond = jax.tree.map(lambda x, now=now: x[concept[now]], self._neutral)
            steering = Steering(ram, sam, ram_scale[now], sam_scale[now])
            noise = self._noise[seed[now]]
            images.append(self._sample(frozen, noise, cond, self._empty, steering, guidance_scale))
        return np.concatenate(images)[: len(seed)].reshape(*shape, *images[0].shape[1:])


def newest_grids(workdir: str | os.PathLike, step: int | None = None) -> bytes | None:
    """A PNG of a run's newest sample grids, one concept's below the other's.

    Args:
      workdir: of the run.
      step: up to which grids are looked for; by default all are.

    Returns:
      The file's content, or None where there are none.
    """
    files = sorted((epath.Path(workdir) / "grids").glob("[0-9]*.png"), key=lambda path: path.name)
    steps = [int(path.name.split("_")[0]) for path in files]
    newest = max((s for s in steps if step is None or s <= step), default=None)
    if newest is None:
        return None
    pictures = [
        Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
        for path, its_step in zip(files, steps, strict=True)
        if its_step == newest
    ]
    size = max(p.width for p in pictures), sum(p.height for p in pictures)
    whole = Image.new("RGB", size, "white")
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    content = io.BytesIO()
    whole.save(content, format="PNG")
    return content.getvalue()
