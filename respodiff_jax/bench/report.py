"""A benchmark's result, as JSON and as a Markdown table."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from respodiff_jax.bench.measure import Spread


@dataclasses.dataclass(frozen=True)
class Side:
    """The measurements of one implementation; None where not measured.

    Attributes:
      name: the implementation.
      rate: samples or images per second.
      evaluations: UNet evaluations per training sample, by FLOPs.
      flops: FLOPs per sample or image.
      utilisation: `rate` times `flops`, as a share of the devices' peak.
      first_call, peak_memory: from `measure.program_costs`.
    """

    name: str
    rate: Spread
    evaluations: float | None = None
    flops: float | None = None
    utilisation: float | None = None
    first_call: Mapping[str, float] | None = None
    peak_memory: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a benchmark.

    Attributes:
      what: "train" or "generate".
      unit: what `rate` counts, "samples" or "images".
      workload: the settings measured.
      environment, peak: from `measure.environment` and `measure.Peak`.
      sides: the measurements of this package, then of PyTorch.
    """

    what: str
    unit: str
    workload: Mapping[str, Any]
    environment: Mapping[str, Any]
    peak: Mapping[str, Any]
    sides: tuple[Side, ...]

    def write(self, path: str | os.PathLike) -> None:
        """Writes all numbers as JSON."""
        content = dataclasses.asdict(self)
        for entry, side in zip(content["sides"], self.sides, strict=True):
            entry["rate"] = side.rate.to_dict()
        if len(self.sides) == 2:
            content["speedup"] = (self.sides[0].rate / self.sides[1].rate).to_dict()
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        pathlib.Path(path).write_text(text, encoding="utf-8")

    def __str__(self) -> str:
        """A Markdown table, and below it the workload and the machine."""
        others = self.sides[1:]
        rows = [("", *(side.name for side in self.sides), *("ratio" for _ in others))]

        def add(label, field, text, ratio=False):
            values = [getattr(side, field) for side in self.sides]
            if any(value is not None for value in values):
                cells = ["–" if value is None else text(value) for value in values]
                ratios = [text(values[0] / value) if ratio else "" for value in values[1:]]
                rows.append((label, *cells, *ratios))

        add(f"{self.unit}/s: median (range)", "rate", _range, ratio=True)
        add("UNet evaluations per sample", "evaluations", "{:.2f}".format, ratio=True)
        add("FLOP utilisation", "utilisation", "{:.1%}".format)
        add("peak memory", "peak_memory", lambda m: f"{m['bytes'] / 2**20:.0f} MiB ({m['of']})")
        add("first call, compiling", "first_call", lambda c: f"{c['cold']:.1f} s")
        add("first call, cached", "first_call", lambda c: f"{c['cached']:.1f} s")
        env = self.environment
        versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
        return "\n".join(
            [
                *_table(rows),
                "",
                ", ".join(f"{key} {value}" for key, value in self.workload.items()),
                f"{env['devices']} × {env['device']} ({env['platform']}); {env['cpu']},"
                f" {env['cpu_cores']} cores, {env['memory_gib']} GiB; load average before:"
                f" {env['load_average']}; {versions}",
                f"peak: {self.peak['flops_per_second'] / 1e12:.3g} TFLOP/s ({self.peak['of']})",
            ]
        )


def _range(spread: Spread) -> str:
    return f"{spread.median:.3g} ({min(spread.values):.3g}–{max(spread.values):.3g})"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |"
        for row in rows
    ]
    return [head, f"|{'|'.join('-' * (width + 2) for width in widths)}|", *body]
