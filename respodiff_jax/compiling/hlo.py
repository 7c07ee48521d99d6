"""Collectives, kernels and memory traffic of a compiled program, read from its HLO text."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BODY = re.compile(r"body=%?([\w.\-]+)")
# With its layout, where "S(1)" says that it is kept on the chip and not in HBM.
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_ON_CHIP = re.compile(r"S\([1-9]")
_NAME = re.compile(r"%([\w.\-]+)")

# Kernels of Splash attention by part of their names -> matrix products.
_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}

# What the compiler makes of a collective that computation overlaps with: several fusions, each of
# which holds a copy of the instruction.
_COPIES = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')

# What moves nothing by itself, and what reads no more of its operands than it gives.
_NO_TRAFFIC = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("while", "conditional", "call", "opt-barrier", "partition-id", "replica-id"),
)
_READS_A_PART = ("slice", "dynamic-slice", "gather")
TRANSPOSING = {"transpose", "convert"}
REARRANGING = {"copy", *TRANSPOSING}  # copies are from one layout to another

Array = tuple[str, tuple[int, ...]]  # dtype, dims


class _Value(NamedTuple):
    """An operand or result, and whether it is on the chip."""

    array: Array
    on_chip: bool


class _Instruction(NamedTuple):
    """`rest` is what stands behind the opcode."""

    computation: str
    name: str
    opcode: str
    rest: str
    operands: tuple[_Value, ...]
    results: tuple[_Value, ...]

    @property
    def callees(self) -> list[str]:
        branches = [n for names in _BRANCHES.findall(self.rest) for n in _NAME.findall(names)]
        return [*_CALLED.findall(self.rest), *branches]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      op: one of `COLLECTIVES`.
      operands: what each device puts in.
      results: what each device gets.
      in_loop: within a loop's body, that is as often as the loop runs.
    """

    op: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    in_loop: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the whole: of what all-gather gives, and what the others are given."""
        return max(_nbytes(self.operands), _nbytes(self.results))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One call of a Pallas kernel, into which XLA's own counts do not look.

    Attributes:
      name: the instruction's, which has the kernel's in it.
      operands, results: arrays.
    """

    name: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of operands and results, each once."""
        return _nbytes(self.operands) + _nbytes(self.results)

    @property
    def flops(self) -> int | None:
        """Of the matrix products in Splash attention; None of another kernel.

        Queries are `(..., heads, D, T)`, keys `(..., heads, D, S)`; in front are the concepts of a
        device. Forward there are two products of `T x S x D` a head, backward five: the scores
        again, and the gradients of all but them.
        """
        products = next((n for part, n in _SPLASH.items() if part in self.name), None)
        if products is None:
            return None
        query, key = [dims for dtype, dims in self.operands if dtype in ("bf16", "f32")][:2]
        return 2 * products * math.prod(query) * key[-1]


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program.

    Args:
      text: `compiled.as_text()`; an asynchronous collective is counted once, where it starts.
    """
    found, called, loops = {}, {}, set()
    for i in _instructions(text):
        called.setdefault(i.computation, set()).update(i.callees)
        loops.update(_BODY.findall(i.rest) if i.opcode == "while" else ())
        op = i.opcode.removesuffix("-start")
        if op not in COLLECTIVES:
            continue
        operands, results = _arrays(i.operands), _arrays(i.results)
        if len(results) > len(operands):  # one that starts gives its operands and more as well
            results = results[len(operands) : 2 * len(operands)]
        copies = _COPIES.search(i.rest)
        key = copies.groups() if copies else (i.computation, i.name)
        found.setdefault(key, (op, operands, results, i.computation))
    looping = _reachable(loops, called)
    return [Collective(*parts, where in looping) for *parts, where in found.values()]


def kernels(text: str) -> list[Kernel]:
    """The calls of Pallas kernels in a compiled program."""
    return [
        Kernel(i.name, _arrays(i.operands), _arrays(i.results))
        for i in _instructions(text)
        if 'custom_call_target="tpu_custom_call"' in i.rest
    ]


def traffic(text: str) -> int:
    """Bytes that a compiled program moves between HBM and the chip; loops are run once.

    Every instruction reads its operands and writes its results once. What the compiler keeps on the
    chip, where it also copies ahead what is read next, is not counted; XLA's own "bytes accessed"
    does count it. A fusion that needs but a part of an operand is counted with all of it.
    """
    return sum(_moved(i) for i in _executed(list(_instructions(text)), text))


def rearranged(text: str, opcodes: Set[str] = REARRANGING) -> int:
    """The part of `traffic` of what computes nothing: copies, transposes and casts of arrays, by
    themselves or fused with one another. Those fused with a computation cost no traffic.

    Args:
      text: `compiled.as_text()`.
      opcodes: one of them has to be there.
    """
    instructions = list(_instructions(text))
    inside: dict[str, set[str]] = {}
    for i in instructions:
        inside.setdefault(i.computation, set()).add(i.opcode)

    def only_rearranges(i: _Instruction) -> bool:
        done = {i.opcode}
        if i.opcode == "fusion":
            done = set().union(*(inside.get(name, ()) for name in i.callees))
        return bool(done & opcodes) and done <= REARRANGING | {"reshape", *_NO_TRAFFIC}

    return sum(_moved(i) for i in _executed(instructions, text) if only_rearranges(i))


def _executed(instructions: Sequence[_Instruction], text: str) -> list[_Instruction]:
    """Those that run as they stand: not the insides of fusions."""
    called: dict[str, set[str]] = {}
    for i in instructions:
        if i.opcode in ("while", "conditional", "call"):
            called.setdefault(i.computation, set()).update(i.callees)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    run = _reachable([entry[1]], called) if entry else set()
    return [i for i in instructions if i.computation in run]


def _moved(i: _Instruction) -> int:
    """Bytes from and to HBM."""
    if i.opcode in _NO_TRAFFIC or i.opcode.endswith("-done"):
        return 0
    operands, results = i.operands, i.results
    if i.opcode == "copy-start":  # gives the copy, what it is of, and a context
        results = results[:1]
    elif i.opcode.endswith("-start"):  # gives its operands first
        results = results[len(operands) :]
    read = sum(_nbytes([value.array]) for value in operands if not value.on_chip)
    written = sum(_nbytes([value.array]) for value in results if not value.on_chip)
    if i.opcode == "slice-start" or i.opcode in _READS_A_PART:
        read = min(read, _nbytes(_arrays(results[:1])))
    if i.opcode == "dynamic-update-slice":  # in place
        part = operands[1:2]
        return min(read, _nbytes(_arrays(part))) + min(written, _nbytes(_arrays(part)))
    return read + written


def _instructions(text: str) -> Iterator[_Instruction]:
    shapes: dict[str, tuple[_Value, ...]] = {}
    computation = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            computation, shapes = header[1], {}
        elif instruction := _INSTRUCTION.match(line):
            name, shape, opcode, rest = instruction.groups()
            shapes[name] = _values(shape)
            arguments = re.split(r"\)(?:, |$)", rest, maxsplit=1)[0]
            operands = tuple(v for n in _NAME.findall(arguments) for v in shapes.get(n, ()))
            yield _Instruction(computation, name, opcode, rest, operands, shapes[name])


def _reachable(start: Iterable[str], called: dict[str, set[str]]) -> set[str]:
    reached, open_ = set(), list(start)
    while open_:
        if (name := open_.pop()) not in reached:
            reached.add(name)
            open_ += called.get(name, ())
    return reached


def _values(shape: str) -> tuple[_Value, ...]:
    return tuple(
        _Value(
            (dtype, tuple(int(n) for n in dims.split(",") if n)),
            _ON_CHIP.search(layout) is not None,
        )
        for dtype, dims, layout in _ARRAY.findall(shape)
    )


def _arrays(values: Sequence[_Value]) -> tuple[Array, ...]:
    return tuple(value.array for value in values)


def _nbytes(arrays: Iterable[Array]) -> int:
    return sum(_bits(dtype) * math.prod(dims) // 8 for dtype, dims in arrays)


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)  # f8e4m3fn has 8; a token has none
    return 8 if dtype == "pred" else int(digits[0]) if digits else 0
