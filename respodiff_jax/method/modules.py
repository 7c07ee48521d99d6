"""RAM and SAM, the two small modules at the frozen UNet's mid-block (paper, section 4.1).

RAM (Responsible Alignment Module, `T_resp`) steers the mid-block output `h` towards the concept,
SAM (Semantic Alignment Module, `T_sem`) keeps the picture faithful to the neutral prompt. Both are
additive: `eps(z_t, y; delta) = g(h + delta)` with `delta = T_resp(h) + T_sem(h)`. They share one
architecture, `MidBlockModule`, in three kinds and their sums.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from respodiff_jax.errors import UserError

KINDS = ("constant", "mlp", "conv")
SUM = "+"
INITS = ("zeros", "uniform")

# One concept's or, with a leading concept axis on each leaf, several concepts' parameters.
Params = Any


class MidBlockModule(nn.Module):
    """`T(h)`, an additive change of the mid-block output.

    * `constant`: a learned tensor of `h`'s shape, independent of `h`, timestep and prompt.
    * `mlp`: dense, SiLU, dense over the channels of each position.
    * `conv`: 3×3 convolution, SiLU, 3×3 convolution.
    * several of them joined by `SUM`, as in `constant+mlp`: their sum, so that concepts of several
      kinds steer in one batch, each with zeros for the other kinds (`adapters.concatenate`).

    Attributes:
      kind: of `KINDS`, one or several joined by `SUM`.
      mid_block_shape: `(H, W, C)` of `h`.
      hidden_channels: inner width of `mlp` and `conv`; None is a quarter of `C`.
      init_scheme: of what is added. "zeros": the untrained module changes nothing. "uniform":
        U(±1/sqrt(10)) for `constant`, as the authors' code initialises it; U(±1/sqrt(fan in)) for
        the output layer of the others.

    Deviation: the authors' constant is a bias-free linear map of a one-hot concept vector, a
    column of which is the tensor here, and starts uniform; ours starts at zero by default.
    """

    kind: str
    mid_block_shape: tuple[int, int, int]
    hidden_channels: int | None = None
    init_scheme: str = "zeros"

    def __post_init__(self):
        kinds = self.kinds if isinstance(self.kind, str) else (self.kind,)
        if not set(kinds) <= set(KINDS) or len(set(kinds)) < len(kinds):
            raise UserError(
                f"module kind is {self.kind!r}, expected one of {', '.join(KINDS)}, or different"
                f" ones joined by {SUM}"
            )
        if self.init_scheme not in INITS:
            raise UserError(
                f"module init is {self.init_scheme!r}, expected one of {', '.join(INITS)}"
            )
        if self.hidden_channels is not None and self.hidden_channels < 1:
            raise UserError(
                f"module hidden_channels is {self.hidden_channels}, expected at least 1"
            )
        super().__post_init__()

    @property
    def kinds(self) -> tuple[str, ...]:
        """What `kind` sums."""
        return tuple(self.kind.split(SUM))

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """`T(h)` for mid-block outputs `(B, H, W, C)`; float32, broadcastable to `h`'s shape."""
        if len(self.kinds) > 1:
            parts = (self.clone(parent=self, kind=kind, name=kind) for kind in self.kinds)
            return sum(part(h) for part in parts)
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

    def init_params(self, key: jax.Array) -> Params:
        """Parameters of one concept."""
        return self.init(key, jnp.zeros((1, *self.mid_block_shape)))["params"]

    def delta(self, params: Params, h: jax.Array) -> jax.Array:
        """`T(h)` of one concept's parameters."""
        return self.apply({"params": params}, h)


class Steering(NamedTuple):
    """What is added at the mid-block of each sample of a batch: weighted concepts.

    Attributes:
      ram: RAM parameters, leaves `(N, ...)`.
      sam: SAM parameters, leaves `(N, ...)`.
      ram_scale: float `(B, N)`, weight of each concept's RAM in each sample.
      sam_scale: float `(B, N)`, likewise for SAM.
    """

    ram: Params
    sam: Params
    ram_scale: jax.Array
    sam_scale: jax.Array


def add_delta(h: jax.Array, delta: jax.Array) -> jax.Array:
    """`h + delta`, added in float32, in `h`'s dtype; a zero delta returns `h` exactly."""
    return (h.astype(jnp.float32) + delta).astype(h.dtype)


def steer(module: MidBlockModule, steering: Steering, h: jax.Array) -> jax.Array:
    """`h + sum_n ram_scale[:, n] RAM_n(h) + sam_scale[:, n] SAM_n(h)` for `h` `(B, H, W, C)`."""

    def weighted(params, scale):
        deltas = jax.vmap(module.delta, in_axes=(0, None))(params, h)  # (N, 1 or B, H, W, C)
        if deltas.shape[1] == 1:  # the same in all samples
            return jnp.einsum("bn,nhwc->bhwc", scale, deltas[:, 0])
        return jnp.einsum("bn,nbhwc->bhwc", scale, deltas)

    delta = weighted(steering.ram, steering.ram_scale) + weighted(steering.sam, steering.sam_scale)
    return add_delta(h, delta)
