"""Watching a run: progress bar, TensorBoard, JSON lines and validation grids.

All of it is written below the working directory, by process 0: `metrics.jsonl`, `tensorboard/`,
`grids/`.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

from respodiff_jax import diffusion
from respodiff_jax.adapters import Adapter
from respodiff_jax.backbone import Backbone
from respodiff_jax.concepts import Concept
from respodiff_jax.generation import initial_noise, make_sampler
from respodiff_jax.images import grid
from respodiff_jax.modules import Steering
from respodiff_jax.objective import ConceptArrays
from respodiff_jax.parallel import Placement
from respodiff_jax.train_step import Metrics

# A run may hold thousands of concepts; nobody looks at more grids than this.
MAX_GRIDS = 8


class RunLog:
    """Progress bar, `metrics.jsonl` and TensorBoard of a run.

    Args:
      workdir: of the run.
      concepts: in the order of the metrics' concept axis.
      batch_size: samples of each concept in a step.
      first_step: steps done before, 0 or where a checkpoint resumed; later entries are dropped.
      steps: to do in all.
    """

    def __init__(
        self,
        workdir: epath.Path,
        concepts: Sequence[Concept],
        batch_size: int,
        first_step: int,
        steps: int,
    ):
        self._names = [c.name for c in concepts]
        self._samples_per_step = len(concepts) * batch_size
        self._writes = jax.process_index() == 0
        self._bar = tqdm(
            total=steps, initial=first_step, unit="step", disable=not self._writes, smoothing=0.05
        )
        self._last_time: float | None = None  # unknown until the step has compiled
        if self._writes:
            self._jsonl = workdir / "metrics.jsonl"
            _drop_lines_after(self._jsonl, first_step)
            self._tensorboard = SummaryWriter(
                str(workdir / "tensorboard"), purge_step=first_step or None
            )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exc) -> None:
        self._bar.close()
        if self._writes:
            self._tensorboard.close()

    def write(self, step: int, metrics: Sequence[Metrics]) -> None:
        """Records host metrics of the steps since the last call, of which `step` is the newest."""
        now = time.perf_counter()
        rate = None
        if self._last_time is not None:
            rate = len(metrics) * self._samples_per_step / (now - self._last_time)
        self._last_time = now
        self._bar.update(len(metrics))
        if not self._writes:
            return
        means = Metrics(*(np.mean(np.stack(x), axis=0) for x in zip(*metrics, strict=True)))
        shown = ("loss_resp", "loss_sem", "grad_norm_ram", "grad_norm_sam")
        scalars = {
            name: {field: float(getattr(means, field)[i]) for field in shown}
            for i, name in enumerate(self._names)
        }
        self._bar.set_postfix_str(
            f"L_resp {means.loss_resp.mean():.4g}, L_sem {means.loss_sem.mean():.4g}"
            + (f", {rate:.3g} samples/s" if rate else "")
        )
        line = {"step": step, "samples_per_s": rate, "concepts": scalars}
        with self._jsonl.open("a") as f:
            f.write(json.dumps(line) + "\n")
        for name, fields in scalars.items():
            for field, value in fields.items():
                self._tensorboard.add_scalar(f"{name}/{field}", value, step)
        if rate:
            self._tensorboard.add_scalar("samples_per_s", rate, step)
        self._tensorboard.add_scalar("ddim_index", float(means.ddim_index.mean()), step)

    def write_grid(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds a validation grid, uint8 `(H, W, 3)`, to TensorBoard."""
        if self._writes:
            self._tensorboard.add_image(f"{name}/grid", image, step, dataformats="HWC")

    def say(self, text: str) -> None:
        """Prints a line above the bar, on process 0."""
        if self._writes:
            self._bar.write(text)


def _drop_lines_after(path: epath.Path, step: int) -> None:
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        path.write_text("".join(kept))


class ValidationGrids:
    """Pictures of each concept's first neutral prompt: base, RAM + SAM, RAM only, of equal seeds.

    Args:
      workdir: of the run; grids go to `grids/`.
      config: the config's `log` section.
      backbone: of the run.
      placement: of the run.
      concepts: the concepts, and
      arrays: their embeddings.
    """

    ROWS = ("base", "RAM + SAM", "RAM only")

    def __init__(
        self,
        workdir: epath.Path,
        config: Any,
        backbone: Backbone,
        placement: Placement,
        module: Any,
        resolution: int,
        concepts: Sequence[Concept],
        arrays: ConceptArrays,
    ):
        self._directory = workdir / "grids"
        self._config = config
        self._concepts = concepts[:MAX_GRIDS]
        self._arrays = arrays
        self._noise = np.tile(
            initial_noise(range(config.grid_images), backbone.latent_shape(resolution)),
            (len(self.ROWS), 1, 1, 1),
        )
        schedule = diffusion.Schedule.from_config(backbone.scheduler_config, config.grid_steps)
        self._sample = placement.compile_with_frozen(make_sampler(backbone, module, schedule))

    def write(self, step: int, frozen: dict, adapter: Adapter, log: RunLog) -> None:
        """Samples and writes one grid for each concept; every process takes part."""
        images_per_row = self._config.grid_images
        ram_scale = np.repeat(np.float32([0, 1, 1]), images_per_row)[:, None]
        sam_scale = np.repeat(np.float32([0, 1, 0]), images_per_row)[:, None]
        for i, concept in enumerate(self._concepts):
            cond, uncond = jax.tree.map(
                lambda x: np.repeat(x[None], len(self._noise), axis=0),
                (
                    jax.tree.map(lambda x, i=i: x[i, 0], self._arrays.neutral),
                    jax.tree.map(lambda x, i=i: x[i], self._arrays.empty),
                ),
            )
            ram, sam = jax.tree.map(lambda x, i=i: x[i : i + 1], (adapter.ram, adapter.sam))
            images = self._sample(
                frozen,
                self._noise,
                cond,
                uncond,
                Steering(ram, sam, ram_scale, sam_scale),
                np.float32(self._config.grid_guidance_scale),
            )
            if jax.process_index() == 0:
                rows = np.asarray(images).reshape(len(self.ROWS), images_per_row, *images.shape[1:])
                title = f'"{concept.neutral_prompts[0]}" to {concept.name}, step {step}'
                picture = grid(rows, row_labels=self.ROWS, title=title)
                self._directory.mkdir(parents=True, exist_ok=True)
                name = f"{i:02d}_{concept.name.replace(' ', '_').replace('/', '_')}"
                with (self._directory / f"{step:07d}_{name}.png").open("wb") as f:
                    picture.save(f, format="PNG")
                log.write_grid(step, concept.name, np.asarray(picture.convert("RGB")))
