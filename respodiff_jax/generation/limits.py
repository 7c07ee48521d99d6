"""Numbers that no machine can serve are refused before weights are read."""

import os

import jax

from respodiff_jax.errors import UserError

MAX_IMAGES = 1_000_000  # also the range of seeds of each part of an evaluation


def check_count(count: int) -> None:
    """Raises `UserError` for more images than a call may draw."""
    if count > MAX_IMAGES:
        raise UserError(
            f"{count:,} images in one call, expected at most {MAX_IMAGES:,}; draw them in several"
            " calls, each with its own folder and first seed"
        )


def check_memory(what: str, needed: int, available: int | None = None) -> None:
    """Refuses what cannot fit.

    Args:
      what: a parameter and its value.
      needed: a lower bound of the bytes that it needs.
      available: bytes; None is the memory of all devices.

    Raises:
      UserError: if `needed` is more.
    """
    if available is None:  # of all processes' devices; devices without memory share the machine's
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        limits = [entry["bytes_limit"] for entry in stats if "bytes_limit" in entry]
        available = jax.process_count() * (sum(limits) or host_memory())
    if needed > available:
        raise UserError(
            f"{what} needs {needed / 2**30:,.0f} GiB of memory at least, but there are"
            f" {available / 2**30:,.0f} GiB; give a smaller number"
        )


def host_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
