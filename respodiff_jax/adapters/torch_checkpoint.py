"""Reads checkpoints of the authors' code and of SDisc: pickled state dicts, without running them.

RespoDiff's `unet.pth` holds `controlnet.fc1.weight` (RAM) and `controlnet_residual.fc2.weight`
(SAM), each `(C * H * W, number of concept ids)`, rows in C, H, W order. SDisc's holds only the
first. Other tensors, such as the frozen UNet's, are ignored. This file needs PyTorch, not JAX.
"""

import os
import pickletools
import re
import warnings

import numpy as np
import torch

from respodiff_jax.errors import UserError

KEYS = {"ram": "controlnet.fc1.weight", "sam": "controlnet_residual.fc2.weight"}


def read_checkpoint(
    file: str | os.PathLike, shape_chw: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Reads RAM and SAM of every concept id.

    Args:
      file: a state dict saved by `torch.save`.
      shape_chw: (C, H, W) of the mid-block output.

    Returns:
      RAM and SAM, float32 `(number of ids, C, H, W)`. SDisc has no SAM, which is then zero.

    Raises:
      UserError: if the file cannot be read, would run code, or does not hold these tensors.
    """
    if not os.path.isfile(file) or not os.access(file, os.R_OK):
        raise UserError(f"checkpoint {file} cannot be read: no such file, or no permission")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols that are then refused
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for files that are not PyTorch's
        # Any function, or an instruction of pickle that PyTorch does not allow.
        words = r"(?i)unsupported (?:global: GLOBAL|global|operand) (\S+)"
        forbidden = re.search(words, str(error))
        is_code = forbidden and forbidden[1].isdigit() and chr(int(forbidden[1]))
        if forbidden and (not is_code or is_code in pickletools.code2op):
            name = f"the pickle instruction {forbidden[1]}" if is_code else forbidden[1]
            raise UserError(
                f"checkpoint {file} holds {name}, which is not a tensor and could run code"
                " when loaded; nothing was run. Get the file as safetensors, or from another source"
            ) from error
        raise UserError(
            f"checkpoint {file} is damaged, or torch.save did not write it: get it again"
        ) from error
    if not isinstance(state, dict) or KEYS["ram"] not in state:
        found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise UserError(
            f"checkpoint {file} has no {KEYS['ram']}; expected the authors' or SDisc's unet.pth,"
            f" found {str(found)[:200]}"
        )
    ram = _columns(file, state, KEYS["ram"], shape_chw)
    if KEYS["sam"] not in state:
        return ram, np.zeros_like(ram)
    sam = _columns(file, state, KEYS["sam"], shape_chw)
    if len(sam) != len(ram):
        raise UserError(f"checkpoint {file} has {len(ram)} ids for RAM but {len(sam)} for SAM")
    return ram, sam


def _columns(
    file: str | os.PathLike, state: dict, key: str, shape_chw: tuple[int, int, int]
) -> np.ndarray:
    value, size = state[key], int(np.prod(shape_chw))
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise UserError(f"checkpoint {file}: {key} is not a tensor of floats")
    if value.layout != torch.strided or value.is_nested or value.is_meta:
        raise UserError(
            f"checkpoint {file}: {key} is a sparse, nested or meta tensor; save it as a dense one"
        )
    if value.ndim != 2 or len(value) != size:
        raise UserError(
            f"checkpoint {file}: {key} has shape {tuple(value.shape)}, expected ({size}, number of"
            f" ids) for a mid-block (C, H, W) of {tuple(shape_chw)}; set `model` and `resolution`"
            " to those of its training"
        )
    if value.nbytes > value.untyped_storage().nbytes():
        raise UserError(
            f"checkpoint {file}: {key} has shape {tuple(value.shape)}, but the file holds fewer"
            " values (an expanded tensor); save its contiguous()"
        )
    return value.detach().float().T.reshape(-1, *shape_chw).numpy()
