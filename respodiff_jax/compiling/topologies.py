"""TPU chips, and the slices that programs can be compiled for without a TPU."""

import dataclasses
import difflib
import importlib.util
import math
import re

import jax
from jax.experimental import topologies

from respodiff_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """The capacity of one chip.

    Attributes:
      name: Google's name, with which topology names begin.
      flops: peak of bfloat16 matrix products, FLOP/s.
      bandwidth: memory (HBM) bandwidth, bytes/s.
      hbm: bytes of memory available to a program.
      slices: shapes for rent; v4 and v5p have more.
      pod: number of chips in the largest slice.
      options: compiler options that make each chip one JAX device.
    """

    name: str
    flops: float
    bandwidth: float
    hbm: int
    slices: tuple[str, ...]
    pod: int
    options: tuple[tuple[str, str], ...] = ()


def _gib(n: float) -> int:
    return int(n * 2**30)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    *("8x16x16", "16x16x16"),
)

# Peaks and bandwidths as published: docs.cloud.google.com/tpu/docs/v4 (275 TFLOPs; 32 GiB,
# 1200 GBps), /v5e (197 TFLOPs; 16 GB, 819 GBps), /v5p (459 TFLOPs; 95 GB, 2765 GBps) and /v6e
# (918 TFLOPs; 32 GB, 1600 GBps; earlier versions of the page: 1640). The memory is what libtpu
# 0.0.42 reports as available when a program needs more: a little less than published, except v5p's.
CHIPS = {
    chip.name: chip
    for chip in (
        # Without this option each of v4's two cores is a device, with half of the memory.
        Chip("v4", 275e12, 1200e9, _gib(30.75), _CUBIC, 4096, (("chip_config_name", "megacore"),)),
        Chip("v5e", 197e12, 819e9, _gib(15.75), _FLAT, 256),
        Chip("v5p", 459e12, 2765e9, _gib(95.74), (*_CUBIC, "16x16x24"), 6144),
        Chip("v6e", 918e12, 1600e9, _gib(31.25), _FLAT, 256),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice such as "v5e:4x4"; programs can be compiled for its devices, but not run."""

    name: str
    chip: Chip
    devices: tuple[jax.Device, ...]


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
    """Splits a topology's name into chip and shape.

    Raises:
      UserError: if no such chip or slice exists; the message lists those that do.
    """
    chip_name, _, shape = name.partition(":")
    chip = CHIPS.get(chip_name)
    if chip is None:
        known = [f"{chip.name}:{slice_}" for chip in CHIPS.values() for slice_ in chip.slices]
        close = difflib.get_close_matches(name, known, 1)
        raise UserError(
            f"topology {name!r}: unknown chip {chip_name!r}; expected CHIP:SHAPE with one of"
            f" {', '.join(CHIPS)}" + (f", for example {close[0]}" if close else "")
        )
    sides = tuple(map(int, shape.split("x"))) if re.fullmatch(r"\d+(x\d+)*", shape) else ()
    axes = chip.slices[0].count("x") + 1
    if len(sides) != axes or not 1 <= math.prod(sides) <= chip.pod:
        raise UserError(
            f"topology {name!r}: {chip.name} has no slice {shape!r}; expected {axes} sides with at"
            f" most {chip.pod} chips, such as {', '.join(chip.slices)}"
        )
    return chip, sides


def open_topology(name: str) -> Topology:
    """Opens a topology, CHIP:SHAPE such as "v5e:4x4", to compile for.

    The process needs the environment of `compiling.set_environment`.

    Raises:
      UserError: as `parse_topology`; if libtpu is missing or in use by another process; or if the
        compiler does not support the slice.
    """
    chip, sides = parse_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for TPU needs the package libtpu, which is not installed and works without"
            ' a TPU; install it: pip install -e ".[tpu]"'
        )
    options = dict(chip.options)
    if math.prod(sides) == 1:  # by default a host has 2 × 2 chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        if "lockfile" in str(error) or "already in use" in str(error):
            raise UserError(
                "another process uses libtpu, and only one can at a time; wait until it ends. If"
                f" no process uses libtpu, remove the lock file that one left behind ({error})"
            ) from error
        raise UserError(
            f"topology {name!r} is refused by the compiler ({error}); expected a slice"
            f" such as {', '.join(chip.slices)}"
        ) from error
    return Topology(name, chip, tuple(found.devices))
