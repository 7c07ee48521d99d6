"""Adapters: trained concepts, saved as a small directory without the frozen model."""

from respodiff_jax.adapters.adapter import Adapter, load_adapter, save_adapter
from respodiff_jax.adapters.combined import (
    CombinedAdapter,
    adapter_sha256,
    as_adapters,
    check_fits,
    combine,
    select,
    steerings,
    unconditional,
)

__all__ = [
    "Adapter",
    "CombinedAdapter",
    "adapter_sha256",
    "as_adapters",
    "check_fits",
    "combine",
    "load_adapter",
    "save_adapter",
    "select",
    "steerings",
    "unconditional",
]
