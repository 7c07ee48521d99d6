"""Adapters: trained concepts, saved as a small directory without the frozen model."""

from respodiff_jax.adapters.adapter import (
    Adapter,
    check_fits,
    concatenate,
    load_adapter,
    save_adapter,
    select,
)

__all__ = ["Adapter", "check_fits", "concatenate", "load_adapter", "save_adapter", "select"]
