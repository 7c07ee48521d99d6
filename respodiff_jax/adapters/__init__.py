"""Adapters: trained concepts as a small directory, apart from the frozen model."""

from respodiff_jax.adapters.adapter import (
    Adapter,
    check_fits,
    concatenate,
    load_adapter,
    save_adapter,
    select,
)

__all__ = ["Adapter", "check_fits", "concatenate", "load_adapter", "save_adapter", "select"]
