"""Collectives and kernels of a compiled program, read from its HLO text."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")

# Kernels of Splash attention by part of their names -> matrix products.
_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}

# What the compiler makes of a collective that computation overlaps with: several fusions, each of
# which holds a copy of the instruction.
_COPIES = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')


Array = tuple[str, tuple[int, ...]]  # dtype, dims


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

        Queries are `(heads, D, T)`, keys `(heads, D, S)`. Forward there are two products of
        `T x S x D` a head, backward five: the scores again, and the gradients of all but them.
        """
        products = next((n for part, n in _SPLASH.items() if part in self.name), None)
        if products is None:
            return None
        query, key = [dims for dtype, dims in self.operands if dtype in ("bf16", "f32")][:2]
        heads, head_dim, tokens = query
        return 2 * products * heads * head_dim * tokens * key[2]


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program.

    Args:
      text: `compiled.as_text()`; an asynchronous collective is counted once, where it starts.
    """
    found, called, loops = {}, {}, set()
    for computation, name, opcode, rest, operands, results in _instructions(text):
        inside = called.setdefault(computation, set())
        inside.update(_CALLED.findall(rest))
        inside.update(n for names in _BRANCHES.findall(rest) for n in _NAME.findall(names))
        loops.update(_BODY.findall(rest) if opcode == "while" else ())
        op = opcode.removesuffix("-start")
        if op not in COLLECTIVES:
            continue
        if len(results) > len(operands):  # one that starts gives its operands and more as well
            results = results[len(operands) : 2 * len(operands)]
        copies = _COPIES.search(rest)
        key = copies.groups() if copies else (computation, name)
        found.setdefault(key, (op, operands, results, computation))
    looping = _reachable(loops, called)
    return [Collective(*parts, where in looping) for *parts, where in found.values()]


def kernels(text: str) -> list[Kernel]:
    """The calls of Pallas kernels in a compiled program."""
    return [
        Kernel(name, operands, results)
        for _, name, _, rest, operands, results in _instructions(text)
        if 'custom_call_target="tpu_custom_call"' in rest
    ]


def _instructions(text: str) -> Iterator[tuple[str, str, str, str, tuple, tuple]]:
    """(computation, name, opcode, what stands behind it, operands, results) of each."""
    shapes: dict[str, tuple[Array, ...]] = {}
    computation = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            computation, shapes = header[1], {}
        elif instruction := _INSTRUCTION.match(line):
            name, shape, opcode, rest = instruction.groups()
            shapes[name] = _arrays(shape)
            arguments = re.split(r"\)(?:, |$)", rest, maxsplit=1)[0]
            operands = tuple(a for n in _NAME.findall(arguments) for a in shapes.get(n, ()))
            yield computation, name, opcode, rest, operands, shapes[name]


def _reachable(start: Iterable[str], called: dict[str, set[str]]) -> set[str]:
    reached, open_ = set(), list(start)
    while open_:
        if (name := open_.pop()) not in reached:
            reached.add(name)
            open_ += called.get(name, ())
    return reached


def _arrays(shape: str) -> tuple[Array, ...]:
    found = _ARRAY.findall(shape)
    return tuple((dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in found)


def _nbytes(arrays: Iterable[Array]) -> int:
    return sum(_bits(dtype) * math.prod(dims) // 8 for dtype, dims in arrays)


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)  # f8e4m3fn has 8; a token has none
    return 8 if dtype == "pred" else int(digits[0]) if digits else 0
