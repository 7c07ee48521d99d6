"""Gender on Emoji World: "a woman" and "a man" from "a person".

    respodiff train --config configs/emoji_gender.py --workdir runs/emoji_gender
    respodiff evaluate all --adapter runs/emoji_gender --out evaluations/emoji_gender

Other kinds of modules need other learning rates: use `recipes.task_config("gender", kind)`.
"""

from ml_collections import ConfigDict

from respodiff_jax.emoji import recipes


def get_config() -> ConfigDict:
    return recipes.task_config("gender")
