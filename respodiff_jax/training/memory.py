"""How much memory a training needs, estimated before weights are read and anything is compiled."""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import numpy as np
from ml_collections import ConfigDict

from respodiff_jax.backbone import Backbone
from respodiff_jax.backbone.memory import estimate_bytes, nbytes
from respodiff_jax.generation.sampling import default_batch_size, sampling_bytes
from respodiff_jax.method.concepts import Concept
from respodiff_jax.method.embedding import concept_shapes
from respodiff_jax.method.state import StepSpec, init_state
from respodiff_jax.method.train_step import train_step
from respodiff_jax.training.parallel import Placement

REMEDIES = (
    "set train.concepts_per_device to 1 and train.remat to True, or lower train.batch_size,"
    " model.resolution or, for the grids, log.grid_every to 0"
)


def training_bytes(
    config: ConfigDict,
    model: Backbone,
    spec: StepSpec,
    placement: Placement,
    concepts: Sequence[Concept],
    size: int,
) -> Mapping[str, int]:
    """About how many bytes a device needs, by what they hold.

    Args:
      config: the training's.
      model: may be abstract.
      spec, placement: of the step.
      concepts: all concepts of the training.
      size: the number that are trained together.
    """
    resolution = spec.latent_shape[0] * model.vae_factor
    samples = placement.batch_size // placement.data_shards
    arrays = concept_shapes(model, concepts, resolution, size // placement.concept_shards)
    state = jax.eval_shape(partial(init_state, spec, seed=0, batch_size=samples), arrays)
    ids = jax.ShapeDtypeStruct((samples,), np.int32)
    frozen = {"unet": model.params["unet"]}
    needed = {
        "the model": nbytes(model.params),
        "modules and optimisers": nbytes(state),
        "a step": estimate_bytes(partial(train_step, spec), state, frozen, arrays, ids),
    }
    if config.log.grid_every:
        batch_size = default_batch_size(2**20, 1, resolution)
        grid = sampling_bytes(model, resolution, batch_size)
        needed["a step"] = max(needed["a step"], grid)  # never at once
    return needed
