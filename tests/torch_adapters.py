"""Adapters of random parameters for tests of the PyTorch side, which need no JAX."""

import diffusers
import torch

from respodiff_jax.torch_adapter import RespoDiffAdapter


def make_adapter(kind="mlp", names=("a woman",), shape=(64, 4, 4), resolution=16, seed=0):
    """A loaded adapter; the group of "a woman" and "a man" is gender, the others are safety's."""
    channels, hidden = shape[0], 16
    kernel = (3, 3) if kind == "conv" else ()
    shapes = {
        "hidden.weight": (hidden, channels, *kernel),
        "hidden.bias": (hidden,),
        "out.weight": (channels, hidden, *kernel),
        "out.bias": (channels,),
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"concepts.{i}.{role}.{key}": torch.randn(size, generator=generator)
        for i in range(len(names))
        for role in ("ram", "sam")
        for key, size in (shapes if kind != "constant" else {"constant": shape}).items()
    }
    gender = ("a woman", "a man")
    config = {
        "module": {
            "kind": kind,
            "mid_block_shape": dict(zip(("channels", "height", "width"), shape, strict=True)),
            "hidden_channels": hidden,
        },
        "backbone": {"name": "tiny", "resolution": resolution, "prediction_type": "epsilon"},
        "concepts": [
            {"name": name, "group": "gender"}
            if name in gender
            else {"name": name, "group": "safety", "unsafe_prompt": name}
            for name in names
        ],
    }
    return RespoDiffAdapter(config, tensors)


def with_small_unet(pipe):
    """The pipeline with a UNet of little more than a mid-block, which compiles fast."""
    torch.manual_seed(0)
    levels = {
        "block_out_channels": (64,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    }
    pipe.unet = diffusers.UNet2DConditionModel.from_config(pipe.unet.config, **levels).eval()
    return pipe
