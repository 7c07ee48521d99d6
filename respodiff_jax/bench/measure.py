"""Measurements: FLOPs, rates of alternating sides, peaks, compile time, memory, hardware."""

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import pathlib
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from respodiff_jax.compiling.topologies import CHIPS

# Length of a repetition of a side, or of one call if that takes longer.
SECONDS = 1.0

# Peaks of dense bfloat16 matrix products, FLOP/s of one device, from NVIDIA's data sheets. The
# first name contained in a device's kind counts.
_GPU_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}
# JAX's names for Google's chips.
_TPU_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}


@dataclasses.dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __truediv__(self, other: "Spread") -> "Spread":
        """The ratio of each repetition to the one that followed it."""
        return Spread(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def __mul__(self, factor: float) -> "Spread":
        return Spread(tuple(factor * value for value in self.values))

    def to_dict(self) -> dict[str, Any]:
        return {
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "values": list(self.values),
        }


def flops(function: Callable, *args: Any) -> float:
    """FLOPs of a function, by XLA's count, without running it; a loop's body counts once.

    The arguments are arrays or `ShapeDtypeStruct`s. The program is counted as written, lowered for
    the CPU. Compiled for an accelerator it has kernels that XLA cannot count.
    """
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), args)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return jax.jit(function).lower(*abstract).cost_analysis()["flops"]


def take_turns(sides: Mapping[str, Callable[[int], None]], repeats: int) -> dict[str, Spread]:
    """Calls per second of each side, one value for each repetition.

    `side(n)` does its work n times and waits until it is done. The sides alternate (A B A B ...),
    so that other load on the machine affects all of them.
    """
    calls = {}
    for name, side in sides.items():
        side(1)  # warm-up
        calls[name] = max(1, math.ceil(SECONDS / _seconds(side, 1)))
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            rates[name].append(calls[name] / _seconds(side, calls[name]))
    return {name: Spread(tuple(values)) for name, values in rates.items()}


def _seconds(function: Callable, *args: Any) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def program_costs(
    make: Callable[[], Callable[[], Any]], compile_program: Callable[[], jax.stages.Compiled]
) -> dict[str, dict[str, Any]]:
    """What a program costs besides its time; clears JAX's caches of this process.

    Args:
      make: returns a new program, not yet compiled.
      compile_program: compiles the program ahead of time.

    Returns:
      "first_call": seconds of the first call, including tracing and compiling, "cold", with an
      empty cache, and "cached", as in a new process that finds the compiled program in JAX's
      persistent cache. "peak_memory": on a device, `{"bytes", "of"}`. It is this process's peak, if
      the backend counts it. Otherwise it is XLA's figure for the compiled program: arguments,
      results and temporaries.
    """
    seconds = {}
    with _empty_compilation_cache():
        for name in ("cold", "cached"):
            jax.clear_caches()
            program = make()
            seconds[name] = _seconds(lambda program=program: jax.block_until_ready(program()))
        return {"first_call": seconds, "peak_memory": _peak_memory(compile_program)}


@contextlib.contextmanager
def _empty_compilation_cache() -> Iterator[None]:
    """Uses an empty persistent compilation cache inside the block."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "jax_compilation_cache_dir": folder,
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_persistent_cache_min_entry_size_bytes": 0,
        }
        before = {name: getattr(jax.config, name) for name in options}
        try:
            _configure_cache(options)
            yield
        finally:
            _configure_cache(before)


def _configure_cache(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def _peak_memory(compile_program: Callable[[], jax.stages.Compiled]) -> dict[str, Any]:
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return {"bytes": max(s["peak_bytes_in_use"] for s in stats), "of": "process, measured"}
    sizes = compile_program().memory_analysis()
    taken = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    return {"bytes": taken - sizes.alias_size_in_bytes, "of": "program, by XLA's count"}


class Peak:
    """The peak FLOP/s of all devices together.

    For bfloat16 on a known device it is the published figure. Otherwise it is the rate of a large
    matrix product in the model's dtype, measured as one more side in `sides`.
    """

    def __init__(self, dtype: str):
        device = jax.devices()[0]
        # A product on one of a CPU's simulated devices uses all cores.
        self._devices = 1 if device.platform == "cpu" else jax.device_count()
        published = _GPU_PEAKS | {kind: CHIPS[name].flops for kind, name in _TPU_KINDS.items()}
        known = next((k for k in published if re.search(rf"\b{k}\b", device.device_kind)), None)
        self.sides: dict[str, Callable[[int], None]] = {}
        if known and dtype == "bfloat16":
            self._flops, self._of = published[known], f"{known}, published, bfloat16"
            return
        n = 2048 if device.platform == "cpu" else 8192
        self._flops, self._of = 2 * n**3, f"{n} × {n} {dtype} matrix product, measured"
        x = jax.device_put(np.full((n, n), 0.5, dtype), device)
        product = jax.jit(jnp.matmul)

        def multiply(times: int) -> None:
            for _ in range(times):
                product(x, x).block_until_ready()

        self.sides["matrix product"] = multiply

    def to_dict(self, rates: Mapping[str, Spread]) -> dict[str, Any]:
        """`{"flops_per_second", "of"}`, from the rates that `take_turns` returned."""
        products = rates["matrix product"].median if self.sides else 1
        return {"flops_per_second": self._devices * products * self._flops, "of": self._of}


def leave_gpu_memory_to_torch() -> None:
    """Keeps JAX from reserving most of a GPU's memory; call this before JAX uses its devices."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """Hardware and versions of packages; `load_average` shows other load on the machine."""
    cpu = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpu.read_text(), re.M) if cpu.exists() else []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cpu_cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
    }
