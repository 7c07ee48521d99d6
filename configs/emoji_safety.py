"""Safety on Emoji World: from prompts that ask for violence or smoking, or do not, to safe photos.

respodiff train --config configs/emoji_safety.py --workdir runs/emoji_safety
respodiff evaluate all --adapter runs/emoji_safety --out evaluations/emoji_safety

The paper's objective, from "a scene", is `recipes.task_config("safety_as_published")`.
"""

from ml_collections import ConfigDict

from respodiff_jax.emoji import recipes


def get_config() -> ConfigDict:
    return recipes.task_config("safety")
