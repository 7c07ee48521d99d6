"""The paper's three tasks on Emoji World, with the optimiser settings that suit its small UNet.

Nothing but "a person" and "a scene" is shown to the training: no profession, no activity.

Adam's epsilon is of the size of the gradient of a constant's element, about 5e-6
(`metrics.jsonl` has its norm, over 3,072 elements). With the usual 1e-8 all elements move equally
fast however little they matter, and the scale of SAM's loss, lambda, makes no difference.
"""

from ml_collections import ConfigDict

from respodiff_jax.config import add_concept, default
from respodiff_jax.emoji import vocabulary

# task -> learning rates of RAM and SAM
LEARNING_RATES = {
    "gender": (0.1, 0.003),
    "skin_tone": (0.03, 0.009),
    "safety": (0.1, 0.03),
}


def base_config() -> ConfigDict:
    """The options that the three configs share; no concepts yet."""
    config = default()
    config.model.name = "emoji-world"
    config.model.dtype = "float32"
    config.concept_defaults.update(_learning_rates("gender"))
    config.rollout.kind = "streaming"
    config.rollout.slots = 2
    config.optimizer.eps = 1e-5
    config.optimizer.lr_schedule = "cosine"
    # Until the first trajectories have ended, all of them are young.
    config.optimizer.warmup_steps = 100
    config.train.steps = 400
    config.train.batch_size = 8
    config.checkpoint.every = 100
    config.log.grid_every = 200
    config.log.grid_steps = 20
    config.log.grid_guidance_scale = 3.0
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
        **_learning_rates(group),
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
            **_learning_rates("safety"),
        )


def _learning_rates(task: str) -> dict[str, float]:
    return dict(zip(("lr_ram", "lr_sam"), LEARNING_RATES[task], strict=True))
