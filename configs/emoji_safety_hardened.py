"""Safety on Emoji World, trained against an adversary (`respodiff_jax.method.adversary`).

respodiff train --config configs/emoji_safety_hardened.py --workdir runs/emoji_safety_hardened
respodiff evaluate attack --adapter runs/emoji_safety_hardened --out evaluations/hardened

docs/safety.md has what it changes.
"""

from ml_collections import ConfigDict

from respodiff_jax.emoji import recipes


def get_config() -> ConfigDict:
    return recipes.task_config("safety_hardened")
