"""Inception features as clean-fid computes them (Parmar et al., 2022), for FID and KID.

clean-fid brings PyTorch; both are imported only here, and only when FID is wanted. The weights are
never downloaded: without them in clean-fid's own place, there is no FID.
"""

import functools
import importlib.metadata
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from respodiff_jax.backbone.files import sha256
from respodiff_jax.errors import UserError

WEIGHTS = pathlib.Path("/tmp/inception-2015-12-05.pt")


class Inception:
    """clean-fid's feature extractor in its mode "clean", on the CPU: JAX holds the accelerators.

    Raises:
      UserError: if the package, or the weights at `WEIGHTS`, are missing.
    """

    def __init__(self):
        if not WEIGHTS.is_file():
            raise UserError(f"clean-fid's Inception weights are missing; put them at {WEIGHTS}")
        try:
            from cleanfid import fid, inception_torchscript
        except (ImportError, OSError, RuntimeError) as error:  # also a torchvision of another torch
            raise UserError(
                f"clean-fid cannot be used ({error}); see pip install -e '.[eval]'"
            ) from error
        model = inception_torchscript.InceptionV3W(str(WEIGHTS.parent), download=False)
        self._features: Callable[..., np.ndarray] = functools.partial(
            fid.get_files_features,
            model=model.eval(),
            num_workers=0,
            batch_size=32,
            device="cpu",
            mode="clean",
            description="inception",
        )
        self.identity: Mapping[str, Any] = {
            "package": "clean-fid",
            "version": importlib.metadata.version("clean-fid"),
            "sha256": sha256(WEIGHTS),
        }

    def __call__(self, paths: Sequence[str | os.PathLike]) -> np.ndarray:
        """Features of N picture files, `(N, 2048)`."""
        return self._features([str(path) for path in paths])
