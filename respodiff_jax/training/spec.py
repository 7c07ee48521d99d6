"""From a config to the plain values that training runs on."""

import math
from functools import partial
from typing import Any

import optax
from ml_collections import ConfigDict

from respodiff_jax.backbone import Backbone, load_backbone
from respodiff_jax.method.adversary import Adversary
from respodiff_jax.method.modules import MidBlockModule
from respodiff_jax.method.rollout import FaithfulRollout, Rollout, StreamingRollout, last_loss_index
from respodiff_jax.method.schedule import Schedule
from respodiff_jax.method.state import StepSpec


def open_model(config: ConfigDict, **changes: Any) -> Backbone:
    """Opens a config's model; `changes` replace options of its `model` section in `load_backbone`.

    Raises:
      UserError: as `load_backbone`.
    """
    options = {name: config.model[name] for name in ("revision", "variant", "dtype", "attention")}
    return load_backbone(config.model.name, **options | changes)


def step_spec(config: ConfigDict, backbone: Backbone, resolution: int | None = None) -> StepSpec:
    """The training step's specification, for a model that may be abstract.

    `config` is as from `load_config`. The resolution is in pixels; None is the config's, else the
    model's own.

    Raises:
      UserError: if the model does not have this resolution or number of DDIM steps.
    """
    resolution = resolution or config.model.resolution or backbone.default_resolution
    schedule = Schedule.from_config(backbone.scheduler_config, config.rollout.num_steps)
    return StepSpec(
        encode=backbone.encode,
        decode=partial(backbone.decode, remat=config.train.remat),
        latent_shape=backbone.latent_shape(resolution),
        module=MidBlockModule(
            kind=config.module.kind,
            mid_block_shape=backbone.mid_block_shape(resolution),
            hidden_channels=config.module.hidden_channels,
            init_scheme=config.module.init,
        ),
        schedule=schedule,
        rollout=make_rollout(config.rollout, schedule),
        rollout_guidance_scale=config.rollout.guidance_scale,
        optimizer=make_optimizer(config.optimizer, config.train.steps),
        ema_decay=config.optimizer.ema_decay,
        adversary=Adversary(**config.adversary) if config.adversary.every else None,
    )


def make_rollout(config: ConfigDict, schedule: Schedule) -> Rollout:
    """The rollout of the config's `rollout` section, along a schedule of its `num_steps`."""
    if config.kind == "faithful":
        return FaithfulRollout(schedule)
    num_indices = last_loss_index(schedule) + 1
    return StreamingRollout(schedule, stride=math.ceil(num_indices / config.trajectory_steps))


def make_lr_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """The factor on all learning rates at each step, by a config's `optimizer` section."""
    decay_steps = steps - config.warmup_steps
    decay = {
        "constant": optax.constant_schedule(1.0),
        "linear": optax.linear_schedule(1.0, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(1.0, decay_steps),
    }[config.lr_schedule]
    if not config.warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, 1.0, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Adam with optional clipping, warm-up and decay, up to the factor `-learning_rate`.

    The learning rate is applied outside: it differs between concepts, and between RAM and SAM.
    `config` is a config's `optimizer` section.
    """
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    return optax.chain(*clip, adam, optax.scale_by_schedule(make_lr_schedule(config, steps)))
