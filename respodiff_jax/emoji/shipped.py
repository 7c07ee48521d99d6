"""The adapters of Emoji World that come with the package.

`gender` is from `respodiff demo`, `safety` from `respodiff train --config configs/emoji_safety.py`;
both are saved in float16.
"""

import pathlib

MODEL = "emoji-world"


def adapter_folders() -> tuple[pathlib.Path, ...]:
    """The folders of the adapters, in alphabetical order."""
    return tuple(sorted((pathlib.Path(__file__).parent / "adapters").iterdir()))
