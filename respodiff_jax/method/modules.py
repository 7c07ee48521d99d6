"""RAM and SAM, the two small modules at the frozen UNet's mid-block (paper, section 4.1).

RAM (Responsible Alignment Module, `T_resp`) steers the mid-block output `h` towards the concept,
SAM (Semantic Alignment Module, `T_sem`) keeps the picture faithful to the neutral prompt. Both are
additive: `eps(z_t, y; delta) = g(h + delta)` with `delta = T_resp(h) + T_sem(h)`. They share one
architecture, `MidBlockModule`, in three kinds.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32, Key, Real

from respodiff_jax.errors import check_choice, check_least

KINDS = ("constant", "mlp", "conv")
INITS = ("zeros", "uniform")

# Parameters of one concept or, with a leading concept axis on every leaf, of several.
Params = Any
MidBlock = Float[ArrayLike, "B H W C"]


class MidBlockModule(nn.Module):
    """`T(h)`, an additive change of the mid-block output.

    * `constant`: a learned tensor of `h`'s shape, independent of `h`, timestep and prompt.
    * `mlp`: dense, SiLU, dense over the channels of each position.
    * `conv`: 3×3 convolution, SiLU, 3×3 convolution.

    Attributes:
      kind: one of `KINDS`.
      mid_block_shape: `(H, W, C)` of `h`.
      hidden_channels: inner width of `mlp` and `conv`; None is a quarter of `C`.
      init_scheme: how the output layer starts. "zeros": the untrained module changes nothing.
        "uniform": U(±1/sqrt(10)) for `constant`, as in the authors' code; U(±1/sqrt(fan in)) for
        `mlp` and `conv`.

    Raises:
      UserError: for an unknown kind or init_scheme, or fewer than 1 hidden channel.

    Deviation: the authors' constant is a bias-free linear map of a one-hot concept vector and
    starts uniform. One column of that map is the tensor here, which starts at zero by default.
    """

    kind: str
    mid_block_shape: tuple[int, int, int]
    hidden_channels: int | None = None
    init_scheme: str = "zeros"

    def __post_init__(self):
        check_choice("module kind", self.kind, KINDS)
        check_choice("module init", self.init_scheme, INITS)
        if self.hidden_channels is not None:
            check_least("module hidden_channels", self.hidden_channels)
        super().__post_init__()

    @nn.compact
    def __call__(self, h: MidBlock) -> Float32[ArrayLike, "#B H W C"]:
        """`T(h)`, with one sample for all if it is independent of `h`."""
        channels = self.mid_block_shape[-1]
        hidden = self.hidden_channels or max(channels // 4, 1)
        if self.kind == "constant":
            return self.param("constant", self._init(10), self.mid_block_shape)[None]
        h = h.astype(jnp.float32)
        if self.kind == "mlp":
            x = nn.silu(nn.Dense(hidden, name="hidden")(h))
            init = self._init(hidden)
            return nn.Dense(channels, name="out", kernel_init=init, bias_init=init)(x)
        x = nn.silu(nn.Conv(hidden, (3, 3), name="hidden")(h))
        init = self._init(9 * hidden)
        return nn.Conv(channels, (3, 3), name="out", kernel_init=init, bias_init=init)(x)

    def _init(self, fan_in: int):
        if self.init_scheme == "zeros":
            return nn.initializers.zeros
        limit = fan_in**-0.5
        return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
            key, shape, dtype, -limit, limit
        )

    def init_params(self, key: Key[Array, ""]) -> Params:
        """Parameters of one concept."""
        return self.init(key, jnp.zeros((1, *self.mid_block_shape)))["params"]

    def delta(self, params: Params, h: MidBlock) -> Float32[ArrayLike, "#B H W C"]:
        """`T(h)` of one concept's parameters."""
        return self.apply({"params": params}, h)


class Steering(NamedTuple):
    """The weighted concepts of one module that steer each sample of a batch.

    Attributes:
      ram, sam: their parameters, leaves `(N, ...)`.
      ram_scale, sam_scale: weight of each concept's RAM and SAM in each sample.
      max_timestep: the largest timestep at which each concept steers a sample; None: no limit.
    """

    ram: Params
    sam: Params
    ram_scale: Float32[ArrayLike, "B N"]
    sam_scale: Float32[ArrayLike, "B N"]
    max_timestep: Float32[ArrayLike, "B N"] | None = None


def add_delta(h: MidBlock, delta: Float32[ArrayLike, "#B H W C"]) -> MidBlock:
    """`h + delta`, added in float32, in `h`'s dtype; a zero delta returns `h` exactly."""
    return (h.astype(jnp.float32) + delta).astype(h.dtype)


def steer(
    modules: Sequence[MidBlockModule],
    steerings: Sequence[Steering],
    timesteps: Real[ArrayLike, "B"],
    h: MidBlock,
) -> MidBlock:
    """`h + sum_n ram_scale[:, n] RAM_n(h) + sam_scale[:, n] SAM_n(h)`, over all modules.

    Args:
      modules: architectures, one for each steering.
      steerings: weighted concepts. Those whose `max_timestep` is exceeded are left out.
      timesteps: each sample's.
      h: mid-block output.
    """

    def weighted(module, params, scale, max_timestep):
        deltas = jax.vmap(module.delta, in_axes=(0, None))(params, h)  # (N, 1 or B, H, W, C)
        if max_timestep is not None:
            acts = jnp.asarray(timesteps)[None] <= max_timestep.T  # (N, B)
            deltas = jnp.where(acts[..., None, None, None], deltas, 0)
        if deltas.shape[1] == 1:  # the same for all samples
            return jnp.einsum("bn,nhwc->bhwc", scale, deltas[:, 0])
        return jnp.einsum("bn,nbhwc->bhwc", scale, deltas)

    deltas = [
        weighted(module, s.ram, s.ram_scale, s.max_timestep)
        + weighted(module, s.sam, s.sam_scale, s.max_timestep)
        for module, s in zip(modules, steerings, strict=True)
    ]
    return add_delta(h, sum(deltas)) if deltas else h
