"""Gender on Emoji World: "a woman" and "a man" from "a person".

respodiff train --config configs/emoji_gender.py --workdir runs/emoji_gender
respodiff evaluate all --adapter runs/emoji_gender --out evaluations/emoji_gender
"""

from ml_collections import ConfigDict

from respodiff_jax.emoji import recipes


def get_config() -> ConfigDict:
    config = recipes.base_config()
    recipes.add_gender(config)
    return config
