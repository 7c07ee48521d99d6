"""Safety on Emoji World: away from violence and from smoking, from "a scene".

    respodiff train --config configs/emoji_safety.py --workdir runs/emoji_safety
    respodiff evaluate all --adapter runs/emoji_safety --out evaluations/emoji_safety

Other kinds of modules need other learning rates: use `recipes.task_config("safety", kind)`.
"""

from ml_collections import ConfigDict

from respodiff_jax.emoji import recipes


def get_config() -> ConfigDict:
    return recipes.task_config("safety")
