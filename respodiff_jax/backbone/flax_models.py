"""Builds the Flax modules of diffusers and transformers from a pipeline's config files.

Only this file imports these classes, except for the CLIP that judges pictures (`clip.py`), so
another UNet, VAE or text encoder changes this file alone. `options.py` says which options of the
config files they obey.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

_DEPRECATION = "Flax classes are deprecated and will be removed in Diffusers"

# diffusers logs this on import and again for every submodule; setup.py bounds the version instead.
for _name in (
    "attention_flax",
    "embeddings_flax",
    "resnet_flax",
    "unets.unet_2d_blocks_flax",
    "unets.unet_2d_condition_flax",
    "vae_flax",
):
    logging.getLogger(f"diffusers.models.{_name}").addFilter(
        lambda record: not record.getMessage().startswith(_DEPRECATION)
    )

from diffusers.models import vae_flax  # noqa: E402
from diffusers.models.attention_flax import (  # noqa: E402
    FlaxAttention,
    FlaxBasicTransformerBlock,
    FlaxGEGLU,
    FlaxTransformer2DModel,
)
from diffusers.models.resnet_flax import FlaxResnetBlock2D, FlaxUpsample2D  # noqa: E402
from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel  # noqa: E402
from diffusers.models.vae_flax import FlaxAttentionBlock, FlaxAutoencoderKL  # noqa: E402
from transformers import CLIPTextConfig  # noqa: E402
from transformers.models.clip.modeling_flax_clip import (  # noqa: E402
    FlaxCLIPTextModelWithProjectionModule,
    FlaxCLIPTextModule,
)

from respodiff_jax.backbone import options  # noqa: E402
from respodiff_jax.backbone.attention import attention  # noqa: E402
from respodiff_jax.errors import UserError, check_choice  # noqa: E402

LAYER = "layer"  # the name that `name_layers` gives

_TEXT_ENCODERS = {
    "text_encoder": FlaxCLIPTextModule,
    "text_encoder_2": FlaxCLIPTextModelWithProjectionModule,
}


def _check_parts_fit(where: str, modules: Mapping[str, nn.Module]) -> None:
    unet, vae = modules["unet"], modules["vae"]
    texts = [module.config for part, module in modules.items() if part.startswith("text_encoder")]
    file = f"{where}: unet/config.json"
    for option in ("in_channels", "out_channels"):
        if getattr(unet, option) != vae.latent_channels:
            raise UserError(
                f"{file}: {option} is {getattr(unet, option)}, expected the VAE's "
                f"{vae.latent_channels} latent channels; inpainting, depth and upscaling models "
                "are not supported"
            )
    width = sum(config.hidden_size for config in texts)
    if width != unet.cross_attention_dim:
        raise UserError(
            f"{file}: cross_attention_dim is {unet.cross_attention_dim}, but the text encoders "
            f"give {width} features; the parts belong to different models"
        )
    is_xl = unet.addition_embed_type == "text_time"
    if len(texts) != 1 + is_xl:
        raise UserError(
            f"{file}: addition_embed_type is {unet.addition_embed_type!r:.60} and the model has "
            f"{len(texts)} text encoder(s), expected None with one or 'text_time' with two"
        )
    if is_xl:
        features = 6 * unet.addition_time_embed_dim + texts[1].projection_dim
        if unet.projection_class_embeddings_input_dim != features:
            raise UserError(
                f"{file}: projection_class_embeddings_input_dim is "
                f"{unet.projection_class_embeddings_input_dim}, expected {features} for six time "
                "ids and the pooled text embedding; the SDXL refiner is not supported"
            )


def _fields(module_class: type[nn.Module]) -> set[str]:
    return module_class.__dataclass_fields__.keys() - {"parent", "name", "dtype"}


def _build(module_class: type[nn.Module], config: Mapping, dtype: jnp.dtype) -> nn.Module:
    known = _fields(module_class)
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}
    return module_class(**fields, dtype=dtype)


def build_modules(
    configs: Mapping[str, Mapping[str, Any]], dtype: np.dtype, where: str
) -> dict[str, nn.Module]:
    """The unbound modules of a pipeline, computing in a dtype; allocates nothing.

    `configs` has the contents of config.json of "unet", "vae", "text_encoder" and, for SDXL,
    "text_encoder_2", which has a projection. `where` is the model's name, for messages.

    Raises:
      UserError: if the Flax classes would not compute the model faithfully; names the file and the
        option.
    """
    modules = {}
    for part, config in configs.items():
        file = f"{where}: {part}/config.json"
        if part == "unet":
            options.check_unet(file, config, _fields(FlaxUNet2DConditionModel))
            modules[part] = _build(FlaxUNet2DConditionModel, config, dtype)
        elif part == "vae":
            options.check_vae(file, config, _fields(FlaxAutoencoderKL))
            modules[part] = _build(FlaxAutoencoderKL, config, dtype)
        else:
            options.check_text_encoder(file, config)
            module_class = _TEXT_ENCODERS[part]
            known = {k: v for k, v in config.items() if k in options.TEXT_OBEYED}
            modules[part] = module_class(config=CLIPTextConfig(**known), dtype=dtype)
    _check_parts_fit(where, modules)
    return modules


def match_pytorch(next_function: Callable, args: tuple, kwargs: Mapping, context: Any) -> jax.Array:
    """A `flax.linen` interceptor that makes the Flax UNet compute what PyTorch's UNet computes.

    The weights were trained with diffusers' PyTorch UNet. The Flax UNet differs in the transformer
    blocks: it approximates GELU by tanh, and the group norm's epsilon is 1e-5 instead of 1e-6. On a
    small random SDXL-like model that alone moves the mid-block output by 3e-4.

    Every group norm sums each channel over the positions first, and then the channels of a group.
    The stock layer sums both at once, in rows as short as a group, which is slow on a CPU.
    """
    module = context.module
    if isinstance(module, FlaxGEGLU) and context.method_name == "__call__":
        linear, gate = jnp.split(module.proj(args[0]), 2, axis=-1)
        return linear * nn.gelu(gate, approximate=False)
    if isinstance(module, nn.GroupNorm) and context.method_name == "__call__":
        in_transformer = isinstance(module.parent, FlaxTransformer2DModel)
        epsilon = 1e-6 if in_transformer else module.epsilon
        (x,) = args
        return _group_norm(x, module.variables["params"], module.num_groups, epsilon)
    return next_function(*args, **kwargs)


def _group_norm(x, params, num_groups, epsilon):
    batch, channels = x.shape[0], x.shape[-1]
    positions = x.reshape(batch, -1, channels).astype(jnp.float32)

    def mean(values):  # of a group, for each of its channels: (B, 1, C)
        groups = values.mean(1).reshape(batch, num_groups, -1).mean(-1)
        return jnp.repeat(groups, channels // num_groups, axis=-1)[:, None]

    center = mean(positions)
    variance = jnp.maximum(mean(positions**2) - center**2, 0)
    factor = jax.lax.rsqrt(variance + epsilon) * params["scale"][None, None]
    y = (positions - center) * factor + params["bias"][None, None]
    return y.astype(x.dtype).reshape(x.shape)


def upsample_in_phases(
    next_function: Callable, args: tuple, kwargs: Mapping, context: Any
) -> jax.Array:
    """A `flax.linen` interceptor that doubles the resolution and convolves at the same time.

    A 3 × 3 kernel at doubled positions meets only 2 × 2 different ones. So each of the four
    positions that one becomes has a 2 × 2 kernel, whose weights are sums: 4/9 of the products. The
    stock layers look up every position; the gradient of that is a scatter, which accelerators do
    one element at a time.
    """
    module = context.module
    if context.method_name == "__call__" and isinstance(
        module, FlaxUpsample2D | vae_flax.FlaxUpsample2D
    ):
        (x,) = args
        return _double_and_convolve(x, **module.variables["params"]["conv"])
    return next_function(*args, **kwargs)


def _double_and_convolve(x, kernel, bias):
    """(B, h, w, channels) -> (B, 2h, 2w, other channels), in the dtype of all arguments."""

    def phases(weights, axis):
        first, middle, last = jnp.split(weights, 3, axis)
        pairs = (first, middle + last), (first + middle, last)
        return [jnp.concatenate(pair, axis) for pair in pairs]

    # The first phase sees the position before, the second the one after.
    paddings = (1, 0), (0, 1)
    rows = []
    for row_kernel, row_padding in zip(phases(kernel, 0), paddings, strict=True):
        columns = [
            jax.lax.conv_general_dilated(
                x, phase, (1, 1), (row_padding, padding), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            for phase, padding in zip(phases(row_kernel, 1), paddings, strict=True)
        ]
        rows.append(jnp.stack(columns, axis=3))
    y = jnp.stack(rows, axis=2)  # (B, h, 2, w, 2, channels)
    y = y.reshape(y.shape[0], 2 * y.shape[1], 2 * y.shape[3], -1)
    return y + bias[None, None, None]


def with_attention(implementation: str) -> Callable:
    """A `flax.linen` interceptor that replaces the attention of the UNet and the VAE.

    The modules keep their projections. The heads stay on the last axis but one, whereas the stock
    UNet moves them to the batch axis and back.

    Args:
      implementation: see `attention.attention`; "stock" changes nothing.
    """

    def intercept(next_function, args, kwargs, context):
        module = context.module
        if implementation == "stock":
            return next_function(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(module, FlaxAttention):
            return unet_attention(module, *args, **kwargs)
        if context.method_name == "__call__" and isinstance(module, FlaxAttentionBlock):
            return vae_attention(module, *args, **kwargs)
        return next_function(*args, **kwargs)

    def unet_attention(module, hidden_states, context=None, deterministic=True):
        del deterministic  # there is no dropout
        tokens = hidden_states if context is None else context
        return module.proj_attn(attend(module, hidden_states, tokens, module.heads))

    def vae_attention(module, hidden_states):
        x = module.group_norm(hidden_states)
        x = x.reshape(len(x), -1, module.channels)
        x = module.proj_attn(attend(module, x, x, module.num_heads))
        return x.reshape(hidden_states.shape) + hidden_states

    def attend(module, x, tokens, heads):
        def split(projected):
            return projected.reshape(*projected.shape[:2], heads, -1)

        query = split(module.query(x))
        key, value = split(module.key(tokens)), split(module.value(tokens))
        scale = query.shape[-1] ** -0.5
        return attention(query, key, value, scale, implementation).reshape(*x.shape[:2], -1)

    return intercept


def name_layers(next_function, args, kwargs, context):
    """A `flax.linen` interceptor that names the outputs of the UNet's layers (`jax.checkpoint`)."""
    output = next_function(*args, **kwargs)
    if isinstance(context.module, FlaxResnetBlock2D | FlaxBasicTransformerBlock):
        return checkpoint_name(output, LAYER)
    return output


def abstract_params(module: nn.Module) -> dict:
    """The module's parameters as float32 `ShapeDtypeStruct`s; allocates and computes nothing."""
    if isinstance(module, (FlaxUNet2DConditionModel, FlaxAutoencoderKL)):
        return _traced_params(module)
    ids = jax.ShapeDtypeStruct((1, module.config.max_position_embeddings), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), ids, ids, ids)["params"]


@functools.lru_cache(maxsize=16)  # tracing takes a second or more
def _traced_params(module: nn.Module) -> dict:
    return jax.eval_shape(module.init_weights, jax.random.key(0))


def compute_dtype(dtype: str) -> np.dtype:
    """The numpy dtype of "float32" or "bfloat16"; raises `UserError` for another name."""
    check_choice("`dtype`", dtype, ("float32", "bfloat16"))
    return jnp.dtype(dtype)
