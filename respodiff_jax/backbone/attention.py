"""Attention of the frozen models: plain, in chunks, or by a fused kernel.

Self-attention over 64 × 64 positions has 4096 × 4096 scores for each head of each image. Writing
these scores to memory and reading them back, for the softmax and for the gradient, is most of the
memory traffic of a training step. A fused kernel keeps the scores on the chip:

* `flash`, on TPU: Pallas' Splash attention, forward and backward.
* `cudnn`, on NVIDIA: cuDNN's flash attention, through `jax.nn.dot_product_attention`.

Where there is no such kernel, `chunked` computes some queries of one head at a time, and computes
their scores again for the gradient (Rabe and Staats 2021, arXiv 2112.05682). The scores of all
queries are then never in memory at once, and those of a chunk are few enough for a CPU's cache.

Small attentions, as in the UNet's lower levels, are `plain` everywhere. `stock`, for comparison,
leaves diffusers' module unchanged, with scores and softmax in the model's dtype.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention

from respodiff_jax.errors import UserError, check_choice

IMPLEMENTATIONS = ("auto", "plain", "chunked", "flash", "cudnn", "stock")

# From this many scores a head on, a fused kernel pays: fewer, 1 MiB in float32, stay on the chip
# anyway. 64 × 64 positions attending to the 77 tokens of a prompt have more, 32 × 32 fewer.
_FUSED_FROM_SCORES = 2**18
# From this many scores a head on, `chunked` works in chunks: 2048 × 2048 positions. Shorter
# sequences, as in models of less than 384 pixels, keep the bits of `plain`.
_CHUNKED_FROM_SCORES = 2**22
_CHUNK_SCORES = 2**22  # of a head, for all pictures, in a chunk: 16 MiB in float32
_CUDNN_TILE = 64  # keys that cuDNN's kernels read together
_LANES = 128  # the width of a TPU register; the kernel's blocks are multiples of it


def choose_attention(implementation: str, dtype: np.dtype) -> str:
    """The attention implementation to use, of `IMPLEMENTATIONS`, for a model in this dtype.

    For "auto" it is "flash" or "cudnn" where this backend has it, else "chunked".

    Raises:
      UserError: for an unknown name, or if this backend or dtype does not have the implementation.
    """
    check_choice("`attention`", implementation, IMPLEMENTATIONS)
    backend = jax.default_backend()
    fastest = "flash" if backend == "tpu" else "cudnn" if _has_cudnn(dtype) else "chunked"
    if implementation == "auto":
        return fastest
    if implementation not in ("plain", "chunked", "stock", fastest):
        needs = {"flash": "a TPU", "cudnn": "bfloat16 and an NVIDIA GPU (Ampere or newer)"}
        raise UserError(
            f"`attention` is {implementation!r}, which needs {needs[implementation]}; this is"
            f" {backend} with {jnp.dtype(dtype).name}: use 'auto' or 'plain'"
        )
    return implementation


def _has_cudnn(dtype: np.dtype) -> bool:
    # "8.0" on NVIDIA, "gfx90a" and the like on AMD.
    capability = getattr(jax.devices()[0], "compute_capability", "")
    is_ampere = re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= 8
    return jax.default_backend() == "gpu" and is_ampere and dtype == jnp.bfloat16


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float, implementation: str = "plain"
) -> jax.Array:
    """`softmax(scale * query key^T) value` for each head; the softmax is float32.

    XLA cannot partition a fused kernel: where devices share a batch, call this inside `pmap` or
    `shard_map`.

    Args:
      query: float32 or bfloat16 (batch, T, heads, head_dim).
      key, value: (batch, S, heads, head_dim), in the dtype of the query.
      scale: the factor of the scores.
      implementation: "plain", "chunked", "flash" or "cudnn"; small attentions are plain in any
        case, and "cudnn" is chunked for head dimensions that cuDNN cannot take.

    Returns:
      (batch, T, heads, head_dim), in the dtype of the query.
    """
    tokens, keys, head_dim = query.shape[1], key.shape[1], key.shape[3]
    fits = head_dim % 8 == 0 and head_dim <= 128  # on Hopper also up to 256
    if implementation == "cudnn" and not fits:
        implementation = "chunked"
    smallest = _CHUNKED_FROM_SCORES if implementation == "chunked" else _FUSED_FROM_SCORES
    if implementation == "plain" or tokens * keys < smallest:
        return _plain(query, key, value, scale)
    core = {"chunked": _chunked, "flash": _flash, "cudnn": _cudnn}[implementation]
    return core(query, key, value, scale)


def _plain(query, key, value, scale):
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    scores = jnp.einsum("bhtd,bhsd->bhts", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scale * scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhts,bhsd->bhtd", weights, value).transpose(0, 2, 1, 3)


def _chunked(query, key, value, scale):
    """`_plain`, for one head and a chunk of its queries after the other; each sees all keys."""
    batch, tokens, _, head_dim = query.shape
    limit = max(_CHUNK_SCORES // (batch * key.shape[1]), 1)
    size = max(n for n in range(1, min(limit, tokens) + 1) if tokens % n == 0)

    def of_head(arrays):
        query, key, value = (x[:, :, None] for x in arrays)

        @partial(jax.checkpoint, prevent_cse=False)  # within a loop, nothing is merged anyway
        def attend(chunk):
            return _plain(chunk, key, value, scale)

        chunks = query.reshape(batch, tokens // size, size, 1, head_dim).swapaxes(0, 1)
        return jax.lax.map(attend, chunks).swapaxes(0, 1).reshape(batch, tokens, head_dim)

    heads = jax.lax.map(of_head, [jnp.moveaxis(x, 2, 0) for x in (query, key, value)])
    return jnp.moveaxis(heads, 0, 2)


def _cudnn(query, key, value, scale):
    tokens, keys = query.shape[1], key.shape[1]
    lengths = {}
    if keys % 2:  # a prompt has 77; JAX has no gradient for an odd number
        padding = ((0, 0), (0, -keys % _CUDNN_TILE), (0, 0), (0, 0))
        key, value = jnp.pad(key, padding), jnp.pad(value, padding)
        # Derived from the queries, the lengths have their axis under `vmap`, as JAX requires.
        zeros = 0 * query[:, 0, 0, 0].astype(jnp.int32)
        lengths = {"query_seq_lengths": zeros + tokens, "key_value_seq_lengths": zeros + keys}
    return jax.nn.dot_product_attention(
        query, key, value, scale=scale, implementation="cudnn", **lengths
    )


def _flash(query, key, value, scale):
    """Pallas' Splash attention without a mask."""
    batch, tokens, keys = *query.shape[:2], key.shape[1]
    # The kernel has no scale argument, so the queries are scaled first, and rounded once more.
    query = (scale * query.astype(jnp.float32)).astype(query.dtype)
    query, key, value = map(_heads_first, (query, key, value))
    (heads, padded_tokens, head_dim), padded_keys = query.shape, key.shape[1]
    segments = None
    if padded_keys > keys:  # padding keys are in another segment, so no query attends to them
        segments = splash_attention.SegmentIds(
            q=jnp.zeros(padded_tokens, jnp.int32),
            kv=(jnp.arange(padded_keys) >= keys).astype(jnp.int32),
        )
    mask = splash_attention.FullMask((padded_tokens, padded_keys))
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=_block_sizes(padded_tokens, padded_keys, head_dim * key.dtype.itemsize),
    )
    out = kernel(query, key, value, segments).reshape(batch, -1, padded_tokens, head_dim)
    return out.transpose(0, 2, 1, 3)[:, :tokens]


def _heads_first(x):
    """(batch, T, heads, head_dim) -> (batch * heads, T padded to a multiple of 128, head_dim)."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % _LANES), (0, 0), (0, 0)))
    return x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1], x.shape[3])


def _block_sizes(tokens: int, keys: int, row_bytes: int) -> splash_attention.BlockSizes:
    """Blocks such that two of each array fit into 16 MiB of vector memory.

    The blocks of keys are as large as possible, because the kernel reads the keys again for every
    block of queries, unless one block holds all keys. `SEQ_MINOR` lays positions along the lanes; a
    head dimension of 40 would fill only 40 of the 128 lanes.
    """
    block_kv = _block(keys, 2**20 // row_bytes)
    block_kv_dkv = _block(keys, min(2048, 2**18 // row_bytes))
    layout = splash_attention.QKVLayout.SEQ_MINOR
    return splash_attention.BlockSizes(
        block_q=_block(tokens, 512),
        block_kv=block_kv,
        block_kv_compute=_block(block_kv, 512),
        block_q_dkv=_block(tokens, 512),
        block_kv_dkv=block_kv_dkv,
        block_kv_dkv_compute=_block(block_kv_dkv, 512),
        use_fused_bwd_kernel=True,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )


def _block(length: int, limit: int) -> int:
    """The largest multiple of 128 that divides `length` and is at most `limit`; at least 128."""
    count = length // _LANES
    return _LANES * max(n for n in range(1, max(limit // _LANES, 1) + 1) if count % n == 0)
