"""Watching a run: progress bar, `metrics.jsonl` and TensorBoard.

Process 0 writes them below the working directory.
"""

import contextlib
import json
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from respodiff_jax.method.concepts import Concept
from respodiff_jax.method.train_step import Metrics
from respodiff_jax.progress import Progress
from respodiff_jax.storage import LocalFolder, append_text, read_json_lines, write_whole

# Seconds between copies of TensorBoard's events to a bucket.
PUSH_SECONDS = 120


class RunLog:
    """Progress bar, `metrics.jsonl` and TensorBoard of a run.

    Args:
      workdir: of the run.
      concepts: in the order of the metrics' concept axis. The axis may be longer.
      train: the config's `train` section.
      first_step: steps done before, 0 or where a checkpoint resumed; later entries are dropped.
      fetch: makes host arrays of a step's metrics.
      label: shown before the bar.
    """

    def __init__(
        self,
        workdir: epath.Path,
        concepts: Sequence[Concept],
        train: ConfigDict,
        first_step: int,
        fetch: Callable[[Metrics], Metrics],
        label: str = "",
    ):
        self._pending: list[Metrics] = []
        self._fetch = fetch
        self._names = [c.name for c in concepts]
        self._diverged = np.zeros(len(concepts), bool)
        self._samples_per_step = len(concepts) * train.batch_size
        self._writes = jax.process_index() == 0
        self._bar = Progress(
            desc=label or None,
            total=train.steps,
            initial=first_step,
            unit="step",
            disable=not self._writes,
            smoothing=0.05,
        )
        self._started: float | None = time.perf_counter()  # None once the step has compiled
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

    def add(self, metrics: Metrics) -> None:
        """Keeps a step's metrics until the next `write`; waits for all steps but the last two.

        Two unfinished steps keep the devices busy; more would delay a stop.
        """
        self._pending.append(metrics)
        jax.block_until_ready(self._pending[-3:-2])
        if self._started is not None:
            seconds, self._started = time.perf_counter() - self._started, None
            if seconds > 1:
                self.say(f"compiled in {seconds:.0f} s")

    def write(self, step: int) -> int:
        """Records the metrics added since the last call; `step` is the number of steps done.

        A diverged concept is reported once, and no longer recorded.

        Returns:
          The number of concepts that have not diverged.
        """
        fetched = [self._fetch(m) for m in self._pending]
        self._pending.clear()
        metrics = [Metrics(*(x[: len(self._names)] for x in m)) for m in fetched]
        diverged_at = metrics[-1].diverged_at
        for i in np.flatnonzero((diverged_at >= 0) & ~self._diverged):
            self.say(
                f"dropped {self._names[i]!r}: loss, module or optimiser state no longer finite at"
                f" step {diverged_at[i]}; it stays as it was before"
            )
        self._diverged = diverged_at >= 0
        remaining = int((~self._diverged).sum())
        now = time.perf_counter()
        rate = None
        if self._last_time is not None:
            rate = len(metrics) * self._samples_per_step / (now - self._last_time)
        self._last_time = now
        if not self._writes or not remaining:
            return remaining
        means = jax.tree.map(lambda *steps: np.mean(np.stack(steps), axis=0), *metrics)
        alive = ~self._diverged
        shown = ("loss_resp", "loss_sem", "grad_norm_ram", "grad_norm_sam")
        scalars = {
            name: {field: float(getattr(means, field)[i]) for field in shown}
            for i, name in enumerate(self._names)
            if alive[i]
        }
        self._bar.set_postfix_str(
            f"L_resp {means.loss_resp[alive].mean():.4g}, L_sem {means.loss_sem[alive].mean():.4g}"
            + (f", {rate:.3g} samples/s" if rate else ""),
            refresh=False,
        )
        self._bar.update(len(metrics))
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
        """Adds a validation grid, uint8 `(height, width, 3)`, to TensorBoard.

        The time that the grid took does not count as the steps'.
        """
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
    """A trace of a few steps after compilation, for TensorBoard; without a directory, none."""

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
