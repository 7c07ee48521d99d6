"""The cost of a compiled program: memory, FLOPs, traffic, collectives, and the roofline."""

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from respodiff_jax.compiling.hlo import TRANSPOSING, Array, Collective, HloModule
from respodiff_jax.compiling.programs import Program
from respodiff_jax.compiling.topologies import Chip

# Bytes of the scalars that devices exchange besides gradients, with the compiler's padding.
_SCALARS = 4096

LARGEST_BATCH = "largest batch"  # `find_largest_batch` as a step of `compile.json`


class OutOfMemory(Exception):
    """The program needs more memory than a device has; `required` is in bytes."""

    def __init__(self, required: int):
        super().__init__(f"{required} bytes")
        self.required = required


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a lowered program; raises `OutOfMemory` if the compiler reports it."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _out_of_memory(str(error)) or error from None


def _out_of_memory(message: str) -> OutOfMemory | None:
    amounts = r"\(([\d.]+)([KMGT])\) exceeds available|Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"
    found = re.search(amounts, message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        return None
    number, unit = found.groups()[:2] if found[1] else found.groups()[2:]
    return OutOfMemory(int(float(number) * 2 ** (10 * ("KMGT".index(unit) + 1))))


def analyse(program: Program, chip: Chip) -> dict[str, Any]:
    """Compiles a program and computes its cost on each device, a chip of this kind.

    Returns:
      `describe`'s result and `compile_seconds`. If the program does not fit, only
      `batch_per_device`, `fits`, `memory` with the required total, and `compile_seconds`.
      `batch_per_device` is `Program.samples_per_device`, by its name in `compile.json`.
    """
    start = time.perf_counter()
    try:
        compiled = _compile(program.lower())
        seconds = round(time.perf_counter() - start, 1)
        body = _cost(_compile(program.lower_body())) if program.lower_body else None
    except OutOfMemory as error:
        return {
            "batch_per_device": program.samples_per_device,
            "fits": False,
            "memory": {"total": error.required + program.unused, "available": chip.hbm},
            "compile_seconds": round(time.perf_counter() - start, 1),
        }
    return describe(program, compiled, chip, body) | {"compile_seconds": seconds}


def describe(
    program: Program,
    compiled: jax.stages.Compiled,
    chip: Chip,
    body: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The cost of a compiled program on each device, as JSON-able values.

    Of `memory`, in bytes, `total` is needed at once, with frozen parameters that the program does
    not use; `peak` is XLA's own figure for the program. `bytes` move between HBM and the chip,
    `rearranged_bytes` are those that compute nothing, `transposed_bytes` those of transposes and
    casts; `xla_bytes` also count accesses on the chip. `exchange` has the bytes of
    `Collective.nbytes`, over all passes of a loop: `only_gradients` means that devices exchange at
    most the gradients and some scalars, `no_weights_moved` that no exchanged array has dtype and
    shape of a frozen parameter.

    The program may be compiled for devices of any kind; it is compared with a chip. `body` is the
    `_cost` of one pass of its loop, if it has one: XLA counts a loop's body once, the result as
    often as it runs.
    """
    module = HloModule(compiled.as_text())
    memory = _memory(program, compiled, chip)
    counted = _cost(compiled)
    repeats = 1 if program.repeats is None else program.repeats
    cost = {key: n + ((repeats - 1) * body[key] if body else 0.0) for key, n in counted.items()}
    return {
        "batch_per_device": program.samples_per_device,
        "fits": memory["total"] <= chip.hbm,
        "memory": memory,
        "counted": counted,
        "loop": None if program.repeats is None else {"repeats": repeats, **(body or {})},
        **cost,
        "kernels_without_flops": sum(kernel.flops is None for kernel in module.kernels()),
        "roofline": roofline(cost["flops"], cost["bytes"], chip),
        "exchange": _exchange(program, module.collectives(), repeats),
    }


def roofline(flops: float, nbytes: float, chip: Chip) -> dict[str, Any]:
    """The least time that a chip needs, and whether it is bound by "compute" or "memory"."""
    compute, memory = flops / chip.flops, nbytes / chip.bandwidth
    return {
        "seconds": max(compute, memory),
        "bound": "compute" if compute >= memory else "memory",
        "compute_seconds": compute,
        "memory_seconds": memory,
    }


def _memory(program: Program, compiled: jax.stages.Compiled, chip: Chip) -> dict[str, int]:
    sizes = compiled.memory_analysis()
    parts = {
        "arguments": sizes.argument_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "outputs": sizes.output_size_in_bytes,
        "aliased": sizes.alias_size_in_bytes,
        "code": sizes.generated_code_size_in_bytes,
    }
    held = sum(parts.values()) - 2 * parts["aliased"]  # itself, and its second count
    return {
        "parameters": program.parameters,
        **parts,
        "unused_parameters": program.unused,
        "peak": sizes.peak_memory_in_bytes,
        "total": held + program.unused,
        "available": chip.hbm,
    }


def _cost(compiled: jax.stages.Compiled) -> dict[str, float]:
    """FLOPs and bytes; XLA counts no FLOPs for kernels, so ours are added."""
    cost, module = compiled.cost_analysis(), HloModule(compiled.as_text())
    kernels = module.kernels()
    return {
        "flops": float(cost["flops"]) + sum(kernel.flops or 0 for kernel in kernels),
        "bytes": float(module.traffic()),
        "rearranged_bytes": float(module.rearranged()),
        "transposed_bytes": float(module.rearranged(TRANSPOSING)),
        "xla_bytes": float(cost["bytes accessed"]) + sum(kernel.nbytes for kernel in kernels),
    }


def _exchange(program: Program, collectives: list[Collective], repeats: float) -> dict[str, Any]:
    by_op: dict[str, dict[str, float]] = {}
    for collective in collectives:
        times = repeats if collective.in_loop else 1
        entry = by_op.setdefault(collective.op, {"count": 0, "bytes": 0})
        entry["count"] += times
        entry["bytes"] += times * collective.nbytes
    total = sum(entry["bytes"] for entry in by_op.values())
    weights = set(map(_canonical, program.weights))
    moved = {_canonical(array) for c in collectives for array in (*c.operands, *c.results)}
    return {
        "bytes": total,
        "by_op": by_op,
        "gradients": program.gradients,
        "only_gradients": total <= program.gradients + _SCALARS,
        "no_weights_moved": moved.isdisjoint(weights),
    }


def _canonical(array: Array) -> Array:
    """Without the order of axes and axes of length 1, which the compiler changes."""
    dtype, dims = array
    return dtype, tuple(sorted(n for n in dims if n > 1))


def find_largest_batch(
    required: Callable[[int], int], available: int, first: int, trials: int = 5
) -> dict[str, Any]:
    """Finds the largest batch of a concept per device that fits, by few compilations from `first`.

    Memory grows about linearly with the batch, so two batches predict the limit. The predicted
    batch is compiled, and its memory improves the prediction, until one batch fits and the next
    does not, or until the trials are used up. `required` gives the bytes that a batch needs,
    `available` are those of a device.

    Returns:
      `{"largest": largest batch that fits, or 0, "exact": whether the next one was found not to
      fit, "tried": {batch: bytes}}`.
    """
    tried: dict[int, int] = {}
    batch = first
    while True:
        tried[batch] = required(batch)
        fitting = max((b for b, n in tried.items() if n <= available), default=0)
        failing = min((b for b in tried if b > fitting), default=None)
        exact = failing == fitting + 1
        if exact or len(tried) == trials:
            return {"largest": fitting, "exact": exact, "tried": tried}
        batch = _next_batch(tried, available, fitting, failing)


def _next_batch(tried: dict[int, int], available: int, fitting: int, failing: int | None) -> int:
    """The limit predicted by the two tried batches nearest to it, between fitting and failing."""
    if len(tried) == 1:
        return 2 * fitting if failing is None else max(failing // 2, 1)
    (b0, n0), (b1, n1) = sorted(
        sorted(tried.items(), key=lambda item: abs(item[1] - available))[:2]
    )
    slope = max((n1 - n0) / (b1 - b0), 1.0)
    batch = int(b0 + (available - n0) / slope)
    return min(max(batch, fitting + 1), 64 * b1 if failing is None else failing - 1)
