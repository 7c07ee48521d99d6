"""Collectives, kernels and memory traffic of a compiled program, read from its HLO text."""

import collections
import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_ENTRY = re.compile(r"^ENTRY %?([\w.\-]+)", re.MULTILINE)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BODY = re.compile(r"body=%?([\w.\-]+)")
# With its layout, in which "S(1)" means kept on the chip, not in HBM.
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_ON_CHIP = re.compile(r"S\([1-9]")
_NAME = re.compile(r"%([\w.\-]+)")

# Part of a Splash attention kernel's name -> number of its matrix products.
_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}

# The compiler turns a collective that overlaps with computation into several fusions, each with a
# copy of the instruction; the copies share these two numbers.
_COPIES = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')

_CONTROL_FLOW = ("while", "conditional", "call")
# Instructions that move nothing themselves, and those that read only what they return.
_NO_TRAFFIC = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *(*_CONTROL_FLOW, "opt-barrier", "partition-id", "replica-id"),
)
_READS_A_PART = ("slice", "dynamic-slice", "gather")
TRANSPOSING = {"transpose", "convert"}
REARRANGING = {"copy", *TRANSPOSING}  # a copy changes the layout
_COMPUTES_NOTHING = {*REARRANGING, "reshape", *_NO_TRAFFIC}

Array = tuple[str, tuple[int, ...]]  # dtype, dims


class _Value(NamedTuple):
    """An operand or result, and whether it is on the chip."""

    array: Array
    on_chip: bool


class _Instruction(NamedTuple):
    """One line of a computation; `rest` is the text behind the opcode."""

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
    """One exchange between devices: each sends the operands and receives the results.

    `op` is one of `COLLECTIVES`. Within a loop's body (`in_loop`) it repeats with the loop.
    """

    op: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    in_loop: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array: the result of an all-gather, the operand of the others."""
        return max(_nbytes(self.operands), _nbytes(self.results))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One call of a Pallas kernel; XLA's cost analysis does not look inside.

    `name` is the instruction's, which contains the kernel's.
    """

    name: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of operands and results, each counted once."""
        return _nbytes(self.operands) + _nbytes(self.results)

    @property
    def flops(self) -> int | None:
        """FLOPs of a Splash attention kernel's matrix products; None for other kernels.

        Queries are `(..., heads, D, T)` and keys `(..., heads, D, S)`; the leading axes are the
        concepts of a device. The forward pass has two products of `T x S x D` a head. The backward
        pass has five: the scores again, and four gradients.
        """
        products = next((n for part, n in _SPLASH.items() if part in self.name), None)
        if products is None:
            return None
        query, key = [dims for dtype, dims in self.operands if dtype in ("bf16", "f32")][:2]
        return 2 * products * math.prod(query) * key[-1]


class HloModule:
    """A compiled program, from its `as_text()`."""

    def __init__(self, text: str):
        self._instructions = list(_parse(text))
        self._entry = _ENTRY.findall(text)

    def collectives(self) -> list[Collective]:
        """All collectives; an asynchronous one counts once, where it starts."""
        found, loops = {}, set()
        for i in self._instructions:
            if i.opcode == "while":
                loops.update(_BODY.findall(i.rest))
            op = i.opcode.removesuffix("-start")
            if op not in COLLECTIVES:
                continue
            operands, results = _arrays(i.operands), _arrays(i.results)
            if len(results) > len(operands):  # a start also returns its operands and a context
                results = results[len(operands) : 2 * len(operands)]
            copies = _COPIES.search(i.rest)
            key = copies.groups() if copies else (i.computation, i.name)
            found.setdefault(key, (op, operands, results, i.computation))
        looping = self._reachable(loops)
        return [Collective(*parts, where in looping) for *parts, where in found.values()]

    def kernels(self) -> list[Kernel]:
        """All calls of Pallas kernels."""
        return [
            Kernel(i.name, _arrays(i.operands), _arrays(i.results))
            for i in self._instructions
            if 'custom_call_target="tpu_custom_call"' in i.rest
        ]

    def traffic(self) -> int:
        """Bytes moved between HBM and the chip; a loop's body counts once.

        Every instruction reads its operands and writes its results once. Arrays that the compiler
        keeps on the chip do not count, although they do in XLA's "bytes accessed". A fusion that
        reads a part of an operand counts as reading all of it.
        """
        return sum(_moved(i) for i in self._executed())

    def rearranged(self, opcodes: Collection[str] = REARRANGING) -> int:
        """The part of `traffic` that computes nothing: copies, transposes and casts.

        They count if they stand alone or are fused with one another, and have at least one of the
        opcodes. Fused with a computation they cost no traffic.
        """
        inside = collections.defaultdict(set)
        for i in self._instructions:
            inside[i.computation].add(i.opcode)

        def only_rearranges(i: _Instruction) -> bool:
            done = {i.opcode}
            if i.opcode == "fusion":
                done = set().union(*(inside[name] for name in i.callees))
            return not done.isdisjoint(opcodes) and done <= _COMPUTES_NOTHING

        return sum(_moved(i) for i in self._executed() if only_rearranges(i))

    def _executed(self) -> list[_Instruction]:
        """Instructions that run one by one, without the insides of fusions."""
        run = self._reachable(self._entry, _CONTROL_FLOW)
        return [i for i in self._instructions if i.computation in run]

    def _reachable(self, start: Iterable[str], opcodes: Collection[str] | None = None) -> set[str]:
        """The computations `start` and all that they call, by instructions with these opcodes."""
        called = collections.defaultdict(list)
        for i in self._instructions:
            if opcodes is None or i.opcode in opcodes:
                called[i.computation] += i.callees
        reached, pending = set(), list(start)
        while pending:
            if (name := pending.pop()) not in reached:
                reached.add(name)
                pending += called[name]
        return reached


def _moved(i: _Instruction) -> int:
    """Bytes that an instruction reads from HBM and writes to it."""
    if i.opcode in _NO_TRAFFIC or i.opcode.endswith("-done"):
        return 0
    operands, results = i.operands, i.results
    if i.opcode == "copy-start":  # returns the copy, its source and a context
        results = results[:1]
    elif i.opcode.endswith("-start"):  # returns its operands first
        results = results[len(operands) :]
    read = sum(_nbytes([value.array]) for value in operands if not value.on_chip)
    written = sum(_nbytes([value.array]) for value in results if not value.on_chip)
    if i.opcode == "slice-start" or i.opcode in _READS_A_PART:
        read = min(read, _nbytes(_arrays(results[:1])))
    if i.opcode == "dynamic-update-slice":  # in place
        part = _nbytes(_arrays(operands[1:2]))
        return min(read, part) + min(written, part)
    return read + written


def _parse(text: str) -> Iterator[_Instruction]:
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


def _values(shape: str) -> tuple[_Value, ...]:
    return tuple(
        _Value(
            (dtype, tuple(int(n) for n in dims.split(",") if n)),
            _ON_CHIP.search(layout) is not None,
        )
        for dtype, dims, layout in _ARRAY.findall(shape)
    )


def _arrays(values: Iterable[_Value]) -> tuple[Array, ...]:
    return tuple(value.array for value in values)


def _nbytes(arrays: Iterable[Array]) -> int:
    return sum(_bits(dtype) * math.prod(dims) // 8 for dtype, dims in arrays)


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)  # f8e4m3fn has 8; a token has none
    return 8 if dtype == "pred" else int(digits[0]) if digits else 0
