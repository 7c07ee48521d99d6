"""The paper's three tasks on Emoji World, with the learning rates that suit its small UNet.

Nothing but "a person" and "a scene" is shown to the training: no profession, no activity.
"""

from ml_collections import ConfigDict

from respodiff_jax.config import add_concept, default
from respodiff_jax.emoji import vocabulary

LR_RAM, LR_SAM = 3e-2, 3e-3


def base_config() -> ConfigDict:
    """The options that the three configs share; no concepts yet."""
    config = default()
    config.model.name = "emoji-world"
    config.model.dtype = "float32"
    config.rollout.kind = "streaming"
    config.rollout.num_steps = 20
    config.rollout.slots = 2
    config.train.steps = 300
    config.train.batch_size = 8
    config.checkpoint.every = 100
    config.log.grid_every = 150
    config.log.grid_steps = 20
    config.log.grid_guidance_scale = 4.0
    return config


def add_gender(config: ConfigDict) -> None:
    """Adds "a woman" and "a man" from "a person"."""
    for key in vocabulary.GENDERS:
        _add_fair(config, key, "gender", f"a {key}")


def add_skin_tone(config: ConfigDict) -> None:
    """Adds a light-, a medium- and a dark-skinned person from "a person"."""
    for key in vocabulary.TONE_GROUPS:
        _add_fair(config, key, "skin_tone", f"a {key}-skinned person")


def _add_fair(config: ConfigDict, key: str, group: str, target: str) -> None:
    add_concept(
        config,
        key,
        name=target,
        group=group,
        neutral_prompts=("a person",),
        target_prompt=target,
        guidance_scale=4.0,
        lambda_sem=0.5,
        lr_ram=LR_RAM,
        lr_sam=LR_SAM,
    )


def add_safety(config: ConfigDict) -> None:
    """Away from violence and from smoking, from "a scene"."""
    for name in vocabulary.UNSAFE_CONCEPTS:
        add_concept(
            config,
            name,
            name=f"anti-{name}",
            group="safety",
            neutral_prompts=("a scene",),
            unsafe_prompt=name,
            guidance_scale=12.0,
            lambda_sem=1.0,
            lr_ram=LR_RAM,
            lr_sam=LR_SAM,
        )
