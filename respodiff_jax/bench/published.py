"""Trains a config by the published procedure in PyTorch (`torch_side`), and writes adapters."""

import pathlib
import time
from typing import TYPE_CHECKING

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from respodiff_jax.adapters import Adapter
from respodiff_jax.adapters.card import export_adapter
from respodiff_jax.bench import measure
from respodiff_jax.bench import model as model_lib
from respodiff_jax.bench.model import Setup
from respodiff_jax.compiling.programs import concepts_at_a_time
from respodiff_jax.errors import UserError
from respodiff_jax.method.concepts import HYPER_PARAMETERS
from respodiff_jax.storage import PathLike, local_path
from respodiff_jax.training.config import concepts_from
from respodiff_jax.training.spec import make_lr_schedule

if TYPE_CHECKING:
    from respodiff_jax.bench import torch_side


def make_training(setup: Setup) -> "torch_side.Training":
    """The published procedure with a setup's model, prompts, initial RAM and SAM, hyper-parameters.

    Raises:
      UserError: if PyTorch is not installed or does not support the device.
    """
    torch_side, config = model_lib.torch_side(), setup.config
    device = torch_side.device_for(jax.default_backend())
    with model_lib.diffusers_folder(setup.backbone) as folder:
        unet, scheduler = torch_side.load_unet(
            folder, config.rollout.num_steps, config.model.dtype, device
        )

    def conditions(tree, *index):
        return torch_side.Conditions.of(jax.tree.map(lambda x: x[index], tree), device)

    arrays, concepts = setup.arrays, []
    trained = setup.state.concepts
    for n, concept in enumerate(setup.concepts):
        if concept.has_counterparts or len(set(concept.own_prompts)) > 1:
            raise UserError(
                f"concept {concept.name!r} has a target prompt for each neutral prompt, but the"
                " published procedure has one; compare a config of the paper's concepts"
            )
        ram, sam = jax.tree.map(lambda x, n=n: x[n], (trained.ram, trained.sam))
        ram, sam = (torch_side.TorchModule(config.module.kind, p).to(device) for p in (ram, sam))
        procedure = torch_side.Procedure(
            unet,
            scheduler,
            ram,
            sam,
            **{name: getattr(concept, name) for name in HYPER_PARAMETERS},
            rollout_guidance_scale=config.rollout.guidance_scale,
            betas=(config.optimizer.b1, config.optimizer.b2),
            eps=config.optimizer.eps,
        )
        num_neutral = int(arrays.num_neutral[n])
        neutral = conditions(arrays.neutral, n, slice(num_neutral))
        own, empty = conditions(arrays.own, n, slice(1)), conditions(arrays.empty, slice(n, n + 1))
        prompts = torch_side.Prompts(
            neutral=neutral,
            target_cond=neutral if concept.is_safety else own.rows([0] * num_neutral),
            target_uncond=own if concept.is_safety else empty,
            empty=empty,
        )
        concepts.append((procedure, prompts))
    height, width, channels = setup.spec.latent_shape
    shape = channels, height, width
    return torch_side.Training(concepts, shape, config.train.batch_size, config.seed)


def train(config: ConfigDict, workdir: PathLike) -> pathlib.Path:
    """Trains a config by the published procedure in PyTorch, to compare the adapters.

    Every trajectory starts from pure noise; `rollout.kind` is ignored. An adapter is written every
    `checkpoint.every` steps and at the end, to `000100/` and so on. Its `training` has the seconds
    of training so far.

    Deviation: the authors' learning rates are constant; here they follow the config's schedule.

    Returns:
      The folder of the last adapter.

    Raises:
      UserError: for an option that the procedure does not have, a `workdir` that is not empty, a
        mistake in the config or the model; if PyTorch is missing, or a loss is no longer finite.
    """
    measure.leave_gpu_memory_to_torch()
    optimizer = config.optimizer
    for name in ("clip_norm", "ema_decay"):
        if optimizer[name] is not None:
            raise UserError(
                f"config.optimizer.{name} is {optimizer[name]!r}, but the published procedure has"
                " none; set it to None"
            )
    if config.train.init_adapter is not None:
        raise UserError(
            f"config.train.init_adapter is {config.train.init_adapter!r}, but the published"
            " procedure trains from scratch; set it to None"
        )
    count, total = concepts_at_a_time(config, jax.device_count()), len(concepts_from(config))
    if count != total:
        raise UserError(
            f"the published procedure trains all {total} concepts together,"
            f" but with config.train.concepts_per_device and these devices {count} train at a time;"
            " set it to None, and use one device"
        )
    synchronise = model_lib.torch_side().synchronise
    out = local_path(workdir, "`workdir`")
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise UserError(f"`workdir` is {workdir}, which is not empty; expected a new folder")
    setup = Setup.of(config)
    training = make_training(setup)
    lr_schedule = make_lr_schedule(optimizer, config.train.steps)
    seconds = 0.0
    for step in tqdm(range(1, config.train.steps + 1), "torch", unit="step", disable=None):
        training.scale_learning_rates(float(lr_schedule(step - 1)))
        start = time.perf_counter()
        losses = training.step()
        synchronise()
        seconds += time.perf_counter() - start
        for concept, pair in zip(setup.concepts, losses, strict=True):
            if not np.isfinite([float(loss) for loss in pair]).all():
                raise UserError(
                    f"{concept.name!r} at step {step}: losses are {pair}; lower the learning rates"
                )
        if step % config.checkpoint.every == 0 or step == config.train.steps:
            folder = out / f"{step:06d}"
            export_adapter(_adapter(setup, training, step, seconds), folder)
    return folder


def _adapter(setup: Setup, training: "torch_side.Training", step: int, seconds: float) -> Adapter:
    def stacked(role):
        params = [getattr(procedure, role).flax() for procedure, _ in training.concepts]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *params)

    config = setup.config
    return Adapter(
        concepts=setup.concepts,
        module=setup.spec.module,
        ram=stacked("ram"),
        sam=stacked("sam"),
        backbone=setup.backbone.trained_at(setup.resolution),
        training={
            "procedure": "published, PyTorch",
            "steps": step,
            "seconds": round(seconds, 1),
            "batch_size": config.train.batch_size,
            "seed": config.seed,
            "dtype": config.model.dtype,
        },
    )
