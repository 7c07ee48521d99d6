"""Emoji World as it comes with the package: its adapters, and the words that it knows.

`gender` is from `respodiff demo`, `safety` from `respodiff train --config
configs/emoji_safety_hardened.py`; both are saved in float16.
"""

import pathlib
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from respodiff_jax.backbone import Backbone

MODEL = "emoji-world"


def adapter_folders() -> tuple[pathlib.Path, ...]:
    """The folders of the adapters, in alphabetical order."""
    return tuple(sorted((pathlib.Path(__file__).parent / "adapters").iterdir()))


def warning_of_unknown_words(model: "Backbone", prompts: Sequence[str]) -> str:
    """Names the words and emoji of prompts that the model has never seen; empty if there are none.

    They are those that its tokenizer splits. For another model it is empty: a vocabulary of CLIP
    splits words that the model knows.
    """
    if model.identity["name"] != MODEL:
        return ""
    text = " ".join(prompts).lower()
    emoji = [letter for letter in text if unicodedata.category(letter) == "So"]
    words = dict.fromkeys([*re.findall(r"[^\W\d_]+", text), *emoji])
    (tokenizer,) = model.tokenizers
    unknown = [word for word in words if len(tokenizer.tokenize(word)) > 1]
    if not unknown:
        return ""
    shown = ", ".join(word[:20] for word in unknown[:5]) + (", …" if len(unknown) > 5 else "")
    return f"{MODEL} does not know: {shown}. It may draw anything for such words."
