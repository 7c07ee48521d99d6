"""The authors' checkpoints and SDisc's: pickled PyTorch state dicts, read without running them.

RespoDiff's `unet.pth` holds `controlnet.fc1.weight` (RAM) and `controlnet_residual.fc2.weight`
(SAM), each `(C * H * W, number of concept ids)`, rows in C, H, W order. SDisc's has the first only.
Other tensors, such as the frozen UNet's, may lie beside them. Needs PyTorch, not JAX.
"""

import os
import pickle

import numpy as np
import torch

KEYS = {"ram": "controlnet.fc1.weight", "sam": "controlnet_residual.fc2.weight"}


def read_checkpoint(
    file: str | os.PathLike, shape_chw: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """RAM and SAM of each concept id.

    Args:
      file: a state dict saved by `torch.save`.
      shape_chw: (C, H, W) of the mid-block output.

    Returns:
      Two float32 arrays `(number of ids, C, H, W)`; SDisc's SAM is zero.

    Raises:
      ValueError: when the file cannot be read, would run code, or does not hold such tensors.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"checkpoint {file} cannot be read: {error}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {file} holds more than tensors, and would run code where it is loaded;"
            f" nothing of it was run: {str(error).splitlines()[0]}"
        ) from error
    except (EOFError, RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"checkpoint {file} is damaged or no PyTorch file: {error}") from error
    if not isinstance(state, dict) or KEYS["ram"] not in state:
        found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"checkpoint {file} has no {KEYS['ram']}; expected the authors' or SDisc's unet.pth,"
            f" found {str(found)[:200]}"
        )
    ram = _columns(file, state, KEYS["ram"], shape_chw)
    if KEYS["sam"] not in state:
        return ram, np.zeros_like(ram)
    sam = _columns(file, state, KEYS["sam"], shape_chw)
    if len(sam) != len(ram):
        raise ValueError(f"checkpoint {file} has {len(ram)} ids for RAM but {len(sam)} for SAM")
    return ram, sam


def _columns(
    file: str | os.PathLike, state: dict, key: str, shape_chw: tuple[int, int, int]
) -> np.ndarray:
    value, size = state[key], int(np.prod(shape_chw))
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise ValueError(f"checkpoint {file}: {key} is not a tensor of floats")
    if value.ndim != 2 or len(value) != size:
        raise ValueError(
            f"checkpoint {file}: {key} has shape {tuple(value.shape)}, expected ({size}, number of"
            f" ids) for a mid-block (C, H, W) of {tuple(shape_chw)}; give the --model and"
            " --resolution that it was trained at"
        )
    return value.float().T.reshape(-1, *shape_chw).numpy()
