"""Validation grids: pictures of a run's concepts, drawn while it trains, in `grids/`."""

import collections
import io
import itertools
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from PIL import Image

from respodiff_jax.adapters import Adapter
from respodiff_jax.adapters.card import GRID_FILE
from respodiff_jax.backbone import Conditioning, equal_batches
from respodiff_jax.generation.sampling import default_batch_size, initial_noise
from respodiff_jax.images import grid, to_png
from respodiff_jax.method.concepts import Concept
from respodiff_jax.method.modules import Steering
from respodiff_jax.storage import PathLike, write_whole
from respodiff_jax.training.monitoring import RunLog
from respodiff_jax.training.parallel import Placement
from respodiff_jax.training.record import is_workdir

# Grids are drawn for the first MAX_GRIDS concepts of a run.
MAX_GRIDS = 8


class ValidationGrids:
    """Pictures of each concept: base, RAM + SAM and RAM only, a column for each seed.

    The columns take turns with prompts: `log.grid_prompts` for fairness concepts, if there are any,
    else the concept's neutral prompts.

    Args:
      workdir: of the run.
      config: the training's.
      concepts: of the run.
      size: concepts in the training state, copies included.
      encode: prompts -> their conditioning, `(P, ...)`.
      sample: `make_sampler`'s function on the placement's devices.
      placement: the devices.
      latent_shape: `(h, w, c)`.
      resolution: in pixels.
    """

    ROWS = ("base", "RAM + SAM", "RAM only")
    RAM_SCALES, SAM_SCALES = np.array([0, 1, 1], np.float32), np.array([0, 1, 0], np.float32)

    def __init__(
        self,
        workdir: epath.Path,
        config: ConfigDict,
        concepts: Sequence[Concept],
        size: int,
        encode: Callable[[list[str]], Conditioning],
        sample: Callable,
        placement: Placement,
        latent_shape: tuple[int, int, int],
        resolution: int,
    ):
        self._directory = workdir / "grids"
        self._config, self._steps = config.log, config.train.steps
        self._concepts = concepts[:MAX_GRIDS]
        self._prompts = [self._columns(concept) for concept in self._concepts]
        distinct = sorted({"", *itertools.chain(*self._prompts)})
        table = jax.tree.map(np.asarray, encode(distinct))
        rows = np.array([[distinct.index(text) for text in own] for own in self._prompts])
        self._cond = jax.tree.map(lambda x: x[rows], table)
        self._sample, self._placement = sample, placement
        self._empty = placement.replicate(jax.tree.map(lambda x: x[:1], table))  # "" is the first
        self._noise = np.asarray(initial_noise(range(config.log.grid_images), latent_shape))
        # The number of modules is the same in every wave, diverged concepts included, so the
        # sampler compiles once.
        self._num_modules = min(size, MAX_GRIDS)
        # The batch of `generate`: a grid fits into memory where training does.
        most = self._num_modules * len(self.ROWS) * config.log.grid_images
        self._batch_size = default_batch_size(most, jax.device_count(), resolution)

    def _columns(self, concept: Concept) -> list[str]:
        """The prompt of each column."""
        shared = () if concept.is_safety else self._config.grid_prompts
        prompts = shared or concept.neutral_prompts
        return [prompts[i % len(prompts)] for i in range(self._config.grid_images)]

    def due(self, step: int) -> bool:
        """Whether to draw grids after this step."""
        return step == self._steps or step % self._config.grid_every == 0

    def missing(self, step: int, adapter: Adapter) -> bool:
        """Whether grids of that step are missing, as process 0 sees it; a barrier."""
        found = len(list(self._directory.glob(f"{step:07d}_*.png")))
        some = np.array(found < len(self._shown(adapter)))
        return bool(multihost_utils.broadcast_one_to_all(some))

    def _shown(self, adapter: Adapter) -> list[int]:
        return [i for i, c in enumerate(self._concepts) if c.name in adapter.names]

    def write(self, step: int, frozen: dict, adapter: Adapter, log: RunLog) -> None:
        """Samples and writes a grid for each concept of the adapter; every process takes part."""
        shown = self._shown(adapter)
        images = self._images(frozen, adapter, shown) if shown else ()
        if jax.process_index() != 0:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        for i, rows in zip(shown, images, strict=True):
            concept = self._concepts[i]
            title = f"{concept.name}, step {step}"
            captions = [self._prompts[i]] * len(self.ROWS)
            picture = grid(rows, row_labels=self.ROWS, captions=captions, title=title)
            # A file name has at most 255 bytes.
            name = re.sub(r"\W+", "_", concept.name).encode()[:100].decode(errors="ignore")
            write_whole(self._directory / f"{step:07d}_{i:02d}_{name}.png", to_png(picture))
            log.write_grid(step, concept.name, np.asarray(picture.convert("RGB")))

    def _images(self, frozen: dict, adapter: Adapter, shown: Sequence[int]) -> np.ndarray:
        """Images `(len(shown), 3, grid_images, height, width, 3)`, in batches over all devices."""
        columns = np.zeros(self._num_modules, int)
        columns[shown] = [adapter.names.index(self._concepts[i].name) for i in shown]
        modules = jax.tree.map(lambda x: x[columns], (adapter.ram, adapter.sam))
        modules = self._placement.replicate(modules)
        shape = len(shown), len(self.ROWS), len(self._noise)
        concept, row, seed = (index.ravel() for index in np.indices(shape))
        concept = np.array(shown)[concept]
        own = np.eye(self._num_modules, dtype=np.float32)[concept]
        ram_scale = own * self.RAM_SCALES[row, None]
        sam_scale = own * self.SAM_SCALES[row, None]
        limits = jax.tree.map(
            lambda last: np.tile(last[columns], (len(row), 1)), adapter.max_timesteps
        )
        weights = ram_scale, sam_scale, limits
        guidance_scale = np.float32(self._config.grid_guidance_scale)
        images = []
        for now, _ in equal_batches(len(seed), self._batch_size):
            cond = jax.tree.map(lambda x, now=now: x[concept[now], seed[now]], self._cond)
            chosen = jax.tree.map(lambda x, now=now: x[now], weights)
            noise, cond, chosen = self._placement.place_by_device(
                (self._noise[seed[now]], cond, chosen)
            )
            steerings = (Steering(*modules, *chosen),)
            batch, _ = self._sample(frozen, noise, cond, self._empty, steerings, guidance_scale)
            images.append(self._placement.fetch(batch))
        return np.concatenate(images)[: len(seed)].reshape(*shape, *images[0].shape[1:])


def newest_grids(workdir: PathLike, step: int | None = None) -> bytes | None:
    """A PNG of a run's newest validation grids (up to a step), one concept's below the other's.

    None where there are none.
    """
    files = collections.defaultdict(list)
    for path in sorted((epath.Path(workdir) / "grids").glob("[0-9]*.png"), key=lambda p: p.name):
        files[int(path.name.split("_")[0])].append(path)
    newest = max((s for s in files if step is None or s <= step), default=None)
    contents = [io.BytesIO(path.read_bytes()) for path in files.get(newest, ())]
    if not contents:
        return None
    pictures = [Image.open(content).convert("RGB") for content in contents]
    size = max(p.width for p in pictures), sum(p.height for p in pictures)
    whole = Image.new("RGB", size, "white")
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    return to_png(whole)


def sample_grid(source: PathLike, step: int | None = None) -> bytes | None:
    """The sample pictures of a run (up to a step) or of an adapter directory, a PNG or None."""
    if is_workdir(source):
        return newest_grids(source, step)
    file = epath.Path(source) / GRID_FILE
    return file.read_bytes() if file.is_file() else None
