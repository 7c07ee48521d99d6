"""How much memory a program needs, estimated before anything is compiled, and how much there is."""

import math
import pathlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

_GIB = 2**30
SMALL = 2**28  # bytes of parameters; the programs of smaller models are not worth the tracing
# Results that always take memory of their own; other operations may overwrite an argument.
_MATERIALISED = {"dot_general", "conv_general_dilated"}
_LOOPS = {"scan", "while"}
# Limit and usage of a container's memory, in both versions of Linux' control groups.
_CGROUPS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def nbytes(tree: Any) -> int:
    """The bytes of the arrays, or shapes, in a tree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def is_small(params: Any) -> bool:
    """Whether a model needs no estimate: its parameters have less than 256 MiB."""
    return nbytes(params) < SMALL


def estimate_bytes(function: Callable, *args: Any) -> int:
    """About how many bytes the intermediate results of a program take at its peak.

    It traces the program and compiles nothing. It adds up what is alive between the operations, in
    the order in which they are written; arguments are not counted. Compilers fuse and reorder
    operations, so they need more or less (`tests/backbone/test_memory.py` compares).

    Args:
      function: a function that JAX can trace.
      *args: trees of arrays or of `ShapeDtypeStruct`s.
    """
    return _peak(jax.make_jaxpr(function)(*args).jaxpr)


def _peak(jaxpr: core.Jaxpr) -> int:
    last_use = {v: n for n, e in enumerate(jaxpr.eqns) for v in _variables(e.invars)}
    last_use |= dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
    alive: dict[core.Var, int] = {}
    live = peak = 0
    for number, equation in enumerate(jaxpr.eqns):
        name = equation.primitive.name
        inner = max(map(_peak, core.jaxprs_in_params(equation.params)), default=0)
        # A broadcast is computed where its result is used.
        made = {
            v: 0 if name == "broadcast_in_dim" else _size(v)
            for v in equation.outvars
            if v in last_use
        }
        done = {v for v in _variables(equation.invars) if last_use[v] == number} & alive.keys()
        freed, new = sum(alive[v] for v in done), sum(made.values())
        overwritten = 0 if inner or name in _MATERIALISED else min(freed, new)
        # A loop's results are stacked beside those of its body; other programs make their own.
        here = new + inner if name in _LOOPS else max(new - overwritten, inner)
        peak = max(peak, live + here)
        live += new - freed
        alive |= made
        for v in done:
            del alive[v]
    return peak


def _variables(atoms: Iterable[Any]) -> set[core.Var]:
    return {atom for atom in atoms if isinstance(atom, core.Var)}


def _size(variable: core.Var) -> int:
    shape, dtype = variable.aval.shape, variable.aval.dtype
    is_half = dtype == jnp.bfloat16 and jax.default_backend() == "cpu"  # it computes in float32
    return math.prod(shape) * (4 if is_half else getattr(dtype, "itemsize", 4))


def available_bytes() -> int | None:
    """Memory that each device of this process may still take; None where it is not known.

    Devices of the CPU share the machine's memory.
    """
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        stats = devices[0].memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else limit - stats.get("bytes_in_use", 0)
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        sizes = dict(line.split()[:2] for line in lines)
        free = int(sizes["MemAvailable:"]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    for limit, usage in _CGROUPS:
        try:
            read = [
                int(pathlib.Path("/sys/fs/cgroup", name).read_text()) for name in (limit, usage)
            ]
        except (OSError, ValueError):  # there is no such group, or it has no limit
            continue
        free = min(free, read[0] - read[1])
    return free // len(devices)


def report_memory(needed: Mapping[str, int], remedies: str) -> str:
    """A line on the memory that each device needs and has; warns if it may not suffice.

    Args:
      needed: bytes by what they hold; they are needed at the same time.
      remedies: what to change where memory is short.
    """
    total, available = sum(needed.values()), available_bytes()
    parts = ", ".join(f"{what} {size / _GIB:.1f}" for what, size in needed.items())
    has = "" if available is None else f"; {available / _GIB:.1f} GiB are free"
    line = f"memory: about {total / _GIB:.1f} GiB a device ({parts}){has}"
    if available is not None and total > available:
        warnings.warn(f"{line}. The process may be killed; {remedies}", stacklevel=3)
    return line
