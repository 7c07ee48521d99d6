"""Collectives and kernels of a compiled program, read from its HLO text."""

import dataclasses
import math
import re
from collections.abc import Iterable

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")

# What the compiler makes of a collective that computation overlaps with: several fusions, each of
# which holds a copy of the instruction.
_COPIES = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      op: one of `COLLECTIVES`.
      operands: `(dtype, dims)` of what each device puts in.
      in_loop: within a loop's body, that is as often as the loop runs.
    """

    op: str
    operands: tuple[tuple[str, tuple[int, ...]], ...]
    in_loop: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the operands, which each device puts in."""
        return sum(_bits(dtype) * math.prod(dims) // 8 for dtype, dims in self.operands)


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program.

    Args:
      text: `compiled.as_text()`; an asynchronous collective is counted once, where it starts.
    """
    found, shapes, called, loops = {}, {}, {}, set()
    computation = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            computation, shapes = header[1], {}
            continue
        if not (instruction := _INSTRUCTION.match(line)):
            continue
        name, shape, opcode, rest = instruction.groups()
        shapes[name] = shape
        inside = called.setdefault(computation, set())
        inside.update(_CALLED.findall(rest))
        inside.update(n for names in _BRANCHES.findall(rest) for n in _NAME.findall(names))
        loops.update(_BODY.findall(rest) if opcode == "while" else ())
        op = opcode.removesuffix("-start")
        if op not in COLLECTIVES:
            continue
        arguments = re.split(r"\)(?:, |$)", rest, maxsplit=1)[0]
        operands = tuple(
            array for n in _NAME.findall(arguments) for array in _arrays(shapes.get(n, ""))
        )
        copies = _COPIES.search(rest)
        key = copies.groups() if copies else (computation, name)
        found.setdefault(key, (op, operands, computation))
    looping = _reachable(loops, called)
    return [Collective(op, operands, where in looping) for op, operands, where in found.values()]


def kernels(text: str) -> int:
    """Calls of Pallas kernels, into which XLA does not look."""
    return text.count('custom_call_target="tpu_custom_call"')


def _reachable(start: Iterable[str], called: dict[str, set[str]]) -> set[str]:
    reached, open_ = set(), list(start)
    while open_:
        if (name := open_.pop()) not in reached:
            reached.add(name)
            open_ += called.get(name, ())
    return reached


def _arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    found = _ARRAY.findall(shape)
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in found]


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)  # f8e4m3fn has 8; a token has none
    return 8 if dtype == "pred" else int(digits[0]) if digits else 0
