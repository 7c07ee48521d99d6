"""Numbers of a compiled program: memory, arithmetic, traffic, exchanges, and the roofline."""

import re
import time
from collections.abc import Callable
from typing import Any

import jax

from respodiff_jax.compiling import hlo
from respodiff_jax.compiling.programs import Program
from respodiff_jax.compiling.topologies import Chip

# Scalars that devices exchange beside gradients, and what the compiler pads them to.
_SCALARS = 4096


class OutOfMemory(Exception):
    """The compiler found that a program does not fit; `required` is in bytes."""

    def __init__(self, required: int):
        super().__init__(f"{required} bytes")
        self.required = required


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles.

    Raises:
      OutOfMemory: if the compiler says so.
    """
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
    """Compiles a program and says what it costs on each device.

    Args:
      program: to compile.
      chip: that the devices are.

    Returns:
      A JSON-able description; see `describe` and `loop_cost`. Of a program that does not fit only
      `batch_per_device`, `fits`, `memory` with what it requires, and `compile_seconds`.
    """
    start = time.perf_counter()
    try:
        compiled = compile_lowered(program.lower())
        seconds = round(time.perf_counter() - start, 1)
        body = _cost(compile_lowered(program.lower_body())) if program.lower_body else None
    except OutOfMemory as error:
        return {
            "batch_per_device": program.batch_per_device,
            "fits": False,
            "memory": {"total": error.required + program.unused, "available": chip.hbm},
            "compile_seconds": round(time.perf_counter() - start, 1),
        }
    return describe(program, compiled, chip, body) | {"compile_seconds": seconds}


def describe(
    program: Program,
    compiled: jax.stages.Compiled,
    chip: Chip,
    body: dict[str, float] | None = None,
) -> dict[str, Any]:
    """What a compiled program costs on each device.

    Args:
      program: that was compiled.
      compiled: for devices of any kind.
      chip: to compare with.
      body: what `_cost` counts in one pass of the program's loop, if it has one.
        Counts have a loop's body once; what is returned has it as often as it runs.
    """
    memory = _memory(program, compiled, chip)
    counted = _cost(compiled)
    repeats = 1 if program.repeats is None else program.repeats
    more = {key: (repeats - 1) * body[key] if body else 0.0 for key in counted}
    cost = {key: counted[key] + more[key] for key in counted}
    text = compiled.as_text()
    return {
        "batch_per_device": program.batch_per_device,
        "fits": memory["total"] <= chip.hbm,
        "memory": memory,
        "counted": counted,
        "loop": None if program.repeats is None else {"repeats": repeats, **(body or {})},
        **cost,
        "kernels_without_flops": sum(kernel.flops is None for kernel in hlo.kernels(text)),
        "roofline": roofline(cost["flops"], cost["bytes"], chip),
        "exchange": _exchange(program, hlo.collectives(text), repeats),
    }


def roofline(flops: float, nbytes: float, chip: Chip) -> dict[str, Any]:
    """The least time that a chip needs, and whether arithmetic ("compute") or memory binds."""
    compute, memory = flops / chip.flops, nbytes / chip.bandwidth
    return {
        "seconds": max(compute, memory),
        "bound": "compute" if compute >= memory else "memory",
        "compute_seconds": compute,
        "memory_seconds": memory,
    }


def _memory(program: Program, compiled: jax.stages.Compiled, chip: Chip) -> dict[str, int]:
    """Bytes; `total` is all that must be there at once, with parameters that are not the
    program's, `peak` XLA's own figure for the program."""
    sizes = compiled.memory_analysis()
    parts = {
        "arguments": sizes.argument_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "outputs": sizes.output_size_in_bytes,
        "aliased": sizes.alias_size_in_bytes,
        "code": sizes.generated_code_size_in_bytes,
    }
    held = sum(parts.values()) - 2 * parts["aliased"]  # those outputs are in arguments' place
    return {
        "parameters": program.parameters,
        **parts,
        "unused_parameters": program.unused,
        "peak": sizes.peak_memory_in_bytes,
        "total": held + program.unused,
        "available": chip.hbm,
    }


def _cost(compiled: jax.stages.Compiled) -> dict[str, float]:
    """FLOPs and bytes.

    FLOPs are XLA's and, of the kernels, which it counts as nothing, our own; bytes those from and
    to HBM, those of them that are only rearranged, and of these what is transposed or cast. XLA's
    bytes count what is kept on the chip as well.
    """
    cost, text = compiled.cost_analysis(), compiled.as_text()
    kernels = hlo.kernels(text)
    return {
        "flops": float(cost["flops"]) + sum(kernel.flops or 0 for kernel in kernels),
        "bytes": float(hlo.traffic(text)),
        "rearranged_bytes": float(hlo.rearranged(text)),
        "transposed_bytes": float(hlo.rearranged(text, hlo.TRANSPOSING)),
        "xla_bytes": float(cost["bytes accessed"]) + sum(kernel.nbytes for kernel in kernels),
    }


def _exchange(
    program: Program, collectives: list[hlo.Collective], repeats: float
) -> dict[str, Any]:
    """What devices exchange; bytes are those of `Collective.nbytes`, in all passes of a loop.

    `only_gradients` says that there is no more than the gradients and some scalars;
    `no_weights_moved` that nothing has dtype and shape of a frozen parameter, None where they
    are sharded and have to move.
    """
    by_op: dict[str, dict[str, float]] = {}
    for collective in collectives:
        times = repeats if collective.in_loop else 1
        entry = by_op.setdefault(collective.op, {"count": 0, "bytes": 0})
        entry["count"] += times
        entry["bytes"] += times * collective.nbytes
    total = sum(entry["bytes"] for entry in by_op.values())
    moved = [array for c in collectives for array in (*c.operands, *c.results)]
    return {
        "bytes": total,
        "by_op": by_op,
        "gradients": program.gradients,
        "only_gradients": total <= program.gradients + _SCALARS,
        "no_weights_moved": None
        if program.sharded
        else not any(_same_shape(array, program.weights) for array in moved),
    }


def _same_shape(array, weights) -> bool:
    """Whether it may be one of them; the compiler transposes, and adds axes of length 1."""

    def squeezed(array):
        dtype, dims = array
        return dtype, sorted(n for n in dims if n > 1)

    return squeezed(array) in [squeezed(weight) for weight in weights]


def largest_batch(
    required: Callable[[int], int], available: int, first: int, trials: int = 5
) -> dict[str, Any]:
    """The largest batch per device that fits, by few compilations.

    Memory grows about linearly with the batch: two batches tell where the limit is, and what is
    found there is compiled, and the next if need be, until the limit lies between two neighbours
    or the trials are used up.

    Args:
      required: bytes that a batch per device takes.
      available: bytes that there are.
      first: batch to begin with.
      trials: the most batches to try.

    Returns:
      `{"largest": the largest batch that was found to fit, or 0, "exact": whether the next does
      not, "tried": {batch: bytes}}`.
    """
    tried = {first: required(first)}
    while len(tried) < trials:
        fitting = max((b for b, n in tried.items() if n <= available), default=0)
        failing = min((b for b, n in tried.items() if n > available), default=None)
        if failing == fitting + 1:
            break
        batch = _next_batch(tried, available, fitting, failing)
        tried[batch] = required(batch)
    fitting = max((b for b, n in tried.items() if n <= available), default=0)
    return {"largest": fitting, "exact": tried.get(fitting + 1, 0) > available, "tried": tried}


def _next_batch(tried: dict[int, int], available: int, fitting: int, failing: int | None) -> int:
    """Where two tried batches, the nearest to the limit, meet it; within what is still open."""
    if len(tried) == 1:
        (batch,) = tried
        return 2 * batch if failing is None else max(batch // 2, 1)
    (b0, n0), (b1, n1) = sorted(
        sorted(tried.items(), key=lambda item: abs(item[1] - available))[:2]
    )
    slope = max((n1 - n0) / (b1 - b0), 1.0)
    batch = int(b0 + (available - n0) / slope)
    return min(max(batch, fitting + 1), 64 * b1 if failing is None else failing - 1)
