"""The measured model: opened in JAX, saved for PyTorch, and the FLOPs of one evaluation."""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import pathlib
import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from respodiff_jax.backbone import Backbone, Conditioning, save_backbone
from respodiff_jax.bench import measure
from respodiff_jax.compiling.programs import concepts_at_a_time
from respodiff_jax.errors import UserError
from respodiff_jax.method.concepts import Concept
from respodiff_jax.method.embedding import EmbeddedConcepts, embed_concepts
from respodiff_jax.method.state import StepSpec, TrainState, init_state
from respodiff_jax.training.config import concepts_from
from respodiff_jax.training.run import fill_up
from respodiff_jax.training.spec import open_model, step_spec


def with_plain_attention(backbone: Backbone) -> Backbone:
    """The model for counting FLOPs, which XLA cannot count inside fused attention."""
    return dataclasses.replace(backbone, attention="plain")


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """What a config trains, on the host. If it trains in waves, this is the first wave."""

    config: ConfigDict
    concepts: tuple[Concept, ...]
    backbone: Backbone
    resolution: int
    spec: StepSpec
    arrays: EmbeddedConcepts
    state: TrainState

    @classmethod
    def of(cls, config: ConfigDict) -> "Setup":
        """Opens the model of a config.

        Raises:
          UserError: for a mistake in the config or the model.
        """
        all_concepts = concepts_from(config)
        count = concepts_at_a_time(config, jax.device_count())
        concepts = fill_up(all_concepts[:count], count)
        backbone = open_model(config)
        resolution = config.model.resolution or backbone.default_resolution
        spec = step_spec(config, backbone, resolution)
        max_neutral = max(len(concept.neutral_prompts) for concept in all_concepts)
        arrays = embed_concepts(backbone, concepts, resolution, max_neutral)
        state = init_state(spec, arrays, config.seed, config.train.batch_size)
        return cls(config, concepts, backbone, resolution, spec, arrays, state)

    @property
    def frozen(self) -> dict[str, Any]:
        return {"unet": self.backbone.params["unet"]}


def torch_side(against_torch: bool = True) -> ModuleType | None:
    """Imports `bench.torch_side`; returns None unless `against_torch`.

    Raises:
      UserError: if PyTorch is missing or has not JAX's device, or JAX runs on several GPUs.
    """
    if not against_torch:
        return None
    try:
        module = importlib.import_module("respodiff_jax.bench.torch_side")
    except ImportError as error:
        raise UserError(
            f'the comparison needs PyTorch ({error}); install it: pip install -e ".[torch]"'
        ) from error
    device = module.device_for(jax.default_backend())
    if device is None:
        raise UserError(
            f"JAX runs on {jax.default_backend()}, but this PyTorch"
            f" ({importlib.metadata.version('torch')}) has no such device; compare on a CPU with"
            " JAX_PLATFORMS=cpu, or install a PyTorch for your GPU"
        )
    if device != "cpu" and jax.device_count() > 1:
        raise UserError(
            f"PyTorch is measured on one GPU, and JAX has {jax.device_count()}; compare with one:"
            " CUDA_VISIBLE_DEVICES=0"
        )
    return module


@contextlib.contextmanager
def diffusers_folder(backbone: Backbone) -> Iterator[pathlib.Path]:
    """A temporary diffusers folder with the model's weights, from which PyTorch can load them."""
    with tempfile.TemporaryDirectory() as folder:
        save_backbone(backbone, folder, dtype=backbone.dtype.name)
        yield pathlib.Path(folder)


def environment(torch: bool) -> dict[str, Any]:
    packages = ("jax", "jaxlib", "flax", "diffusers", "transformers")
    return measure.environment(packages + ("torch",) * torch)


def forward_flops(
    model: Backbone | StepSpec,
    params: Any,
    latents: jax.ShapeDtypeStruct,
    prompt: Conditioning,
    prompts: int = 1,
) -> float:
    """FLOPs of one plain forward pass of the UNet on a batch of latents, `(B, h, w, c)`.

    Each latent has `prompts` prompts. `prompt` is one of them, without a batch axis. Arguments are
    arrays or their shapes.
    """

    def forward(params, z, timesteps, cond):
        return model.decode(params, *model.encode(params, z, timesteps, cond))

    batch_size = latents.shape[0]
    timesteps = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    samples = prompts * batch_size
    cond = jax.tree.map(lambda x: jax.ShapeDtypeStruct((samples, *x.shape), x.dtype), prompt)
    return measure.flops(forward, params, latents, timesteps, cond)
