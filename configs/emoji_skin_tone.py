"""Skin tone on Emoji World: light, medium and dark from "a person".

respodiff train --config configs/emoji_skin_tone.py --workdir runs/emoji_skin_tone
respodiff evaluate all --adapter runs/emoji_skin_tone --out evaluations/emoji_skin_tone
"""

from ml_collections import ConfigDict

from respodiff_jax.emoji import recipes


def get_config() -> ConfigDict:
    config = recipes.base_config()
    recipes.add_skin_tone(config)
    return config
