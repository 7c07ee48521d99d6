"""Safety on Emoji World: "a scene" away from violence and away from smoking.

respodiff train --config configs/emoji_safety.py --workdir runs/emoji_safety
respodiff evaluate all --adapter runs/emoji_safety --out evaluations/emoji_safety

Each kind of module needs its own learning rates: `recipes.task_config("safety", kind)` has them.
"""

from ml_collections import ConfigDict

from respodiff_jax.emoji import recipes


def get_config() -> ConfigDict:
    return recipes.task_config("safety")
