"""Gender on Emoji World: "a woman" and "a man" from "a person".

respodiff train --config configs/emoji_gender.py --workdir runs/emoji_gender
respodiff evaluate all --adapter runs/emoji_gender --out evaluations/emoji_gender

Each kind of module needs its own learning rates: `recipes.task_config("gender", kind)` has them.
"""

from ml_collections import ConfigDict

from respodiff_jax.emoji import recipes


def get_config() -> ConfigDict:
    return recipes.task_config("gender")
