"""Skin tone on Emoji World: light, medium and dark from "a person".

    respodiff train --config configs/emoji_skin_tone.py --workdir runs/emoji_skin_tone
    respodiff evaluate all --adapter runs/emoji_skin_tone --out evaluations/emoji_skin_tone

Other kinds of modules need other learning rates: use `recipes.task_config("skin_tone", kind)`.
"""

from ml_collections import ConfigDict

from respodiff_jax.emoji import recipes


def get_config() -> ConfigDict:
    return recipes.task_config("skin_tone")
