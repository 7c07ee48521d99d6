"""Single-file checkpoints, as most community models come: converted once to a diffusers folder."""

import importlib.util
import os
import pathlib
import sys
import tempfile
from typing import Any

from huggingface_hub.utils import WeakFileLock

from respodiff_jax.errors import UserError

SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def models_cache(cache_dir: Any) -> pathlib.Path:
    """The folder of converted and copied models, made if it does not exist."""
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    cache = pathlib.Path(cache_dir or default / "respodiff_jax" / "models")
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def converted(file: pathlib.Path, digest: str, cache_dir: Any) -> pathlib.Path:
    """The diffusers folder of a single-file checkpoint, in the cache under its digest.

    The first call converts the file, with diffusers' own loader, and prints a line on stderr.

    Args:
      file: a checkpoint of Stable Diffusion 1.x, 2.x or XL, in the layout of the original code.
      digest: hexadecimal sha256 of the file.
      cache_dir: as in `load_backbone`.

    Raises:
      UserError: if PyTorch is missing, the file is damaged or of another kind, or its configs are
        neither in the Hugging Face cache nor can be fetched.
    """
    folder = models_cache(cache_dir) / digest[:32]
    with WeakFileLock(folder.with_suffix(".lock")):  # one process of a host converts
        if folder.is_dir():
            return folder
        if lacking := [n for n in ("torch", "accelerate") if importlib.util.find_spec(n) is None]:
            raise UserError(
                f"model {str(file)!r} is a single file, which diffusers converts with"
                f" {' and '.join(lacking)}: pip install -e '.[torch]', or give a diffusers folder"
            )
        from respodiff_jax.backbone.torch_single_file import convert

        print(f"converting {file} once, to {folder}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            convert(file, pathlib.Path(partial, "model"), cache_dir)
            pathlib.Path(partial, "model").replace(folder)
    return folder
