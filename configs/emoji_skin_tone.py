"""Skin tone on Emoji World: light, medium and dark skin from "a person".

respodiff train --config configs/emoji_skin_tone.py --workdir runs/emoji_skin_tone
respodiff evaluate all --adapter runs/emoji_skin_tone --out evaluations/emoji_skin_tone

Each kind of module needs its own learning rates: `recipes.task_config("skin_tone", kind)` has them.
"""

from ml_collections import ConfigDict

from respodiff_jax.emoji import recipes


def get_config() -> ConfigDict:
    return recipes.task_config("skin_tone")
