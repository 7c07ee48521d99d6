"""`respodiff export`."""

import argparse
from typing import TYPE_CHECKING, Any

from respodiff_jax.cli import inputs
from respodiff_jax.errors import UserError

if TYPE_CHECKING:
    from respodiff_jax.adapters import Adapter

SUMMARY = "write the adapter of a run"

DESCRIPTION = """\
Writes the trained concepts of a run as an adapter directory: adapter_model.safetensors and
adapter_config.json, without optimiser state and base weights; README.md, a model card, with the
run's newest sample grids; and torch_adapter.py, which loads the adapter in PyTorch. The same run
gives the same bytes. An adapter directory can be exported again with other options. Metrics belong
to the adapter that was measured: with other concepts, scales or another dtype they are left out.
"""

EPILOG = """\
  respodiff export runs/gender --out adapters/gender
  respodiff export runs/gender --out adapters/gender-1000 --step 1000 --dtype float16
  respodiff export runs/many --only "a nurse" --only "a judge" --out adapters/two
  respodiff export adapters/gender --out adapters/gender-soft --scale "a woman=0.8"
  respodiff export adapters/gender --out adapters/measured --evaluation evaluations/gender
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="RUN", help="training workdir, or adapter directory")
    add("--out", required=True, metavar="DIR", help="adapter directory to write")
    add("--step", type=int, metavar="N", help="checkpoint of the run (default: the newest)")
    add(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="a concept to take (default: all); may be repeated",
    )
    add(
        "--dtype",
        choices=("float32", "float16"),
        help="dtype of the file (default: float32, or that of the adapter directory)",
    )
    add(
        "--scale",
        action="append",
        default=[],
        metavar="NAME=SCALE",
        help="weight of a concept for which the user gives none; may be repeated (default: 1)",
    )
    add(
        "--evaluation",
        metavar="DIR",
        help="what `respodiff evaluate` wrote for this adapter; config and card get its overall"
        " metrics",
    )


def run(args: argparse.Namespace) -> None:
    import dataclasses

    from respodiff_jax.adapters.card import export_adapter

    adapter = inputs.open_adapter(args.source, args.step, args.only)
    scales = inputs.read_scales("--scale", args.scale)
    if unknown := sorted(set(scales) - set(adapter.names)):
        raise UserError(f"--scale names {unknown}, the adapter has {', '.join(adapter.names)}")
    changed = dataclasses.replace(
        adapter,
        dtype=args.dtype or adapter.dtype,
        default_scales=tuple(
            scales.get(name, scale)
            for name, scale in zip(adapter.names, adapter.default_scales, strict=True)
        ),
    )
    same = (changed.dtype, changed.default_scales) == (adapter.dtype, adapter.default_scales)
    if args.evaluation and not same:
        raise UserError(
            f"--evaluation {args.evaluation} did not measure what --dtype or --scale changes here:"
            " export without --evaluation, evaluate the result, then export that with --evaluation"
        )
    metrics = _measured(args.evaluation, adapter) if args.evaluation else adapter.metrics
    adapter = dataclasses.replace(changed, metrics=metrics if same else None)
    try:
        export_adapter(adapter, args.out, _grid(args.source, args.step))
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {error}") from error
    print(f"{args.out}: {adapter.module.kind} adapter of {', '.join(adapter.names)}")


def _measured(folder: str, adapter: "Adapter") -> list[dict[str, Any]]:
    """The metrics of an evaluation of the adapter, over all pictures."""
    from respodiff_jax.adapters.files import METRIC_KEYS
    from respodiff_jax.evaluation.results import load_results
    from respodiff_jax.evaluation.run import adapter_sha256

    results = load_results(folder)
    measured = (results.made.get("adapter") or {}).get("sha256")
    if measured != adapter_sha256(adapter):
        raise UserError(
            f"--evaluation {folder} measured another adapter (sha256 {measured}): evaluate the one"
            f" that is exported, {', '.join(adapter.names)}"
        )
    return [
        {key: getattr(measurement, key) for key in METRIC_KEYS}
        for measurement in results.measurements
        if measurement.subject is None
    ]


def _grid(source: str, step: int | None) -> bytes | None:
    """The sample picture of a workdir or an adapter directory, or None."""
    from respodiff_jax.adapters.card import GRID_FILE
    from respodiff_jax.storage import open_path
    from respodiff_jax.training.monitoring import newest_grids

    if inputs.is_workdir(source):
        return newest_grids(source, step)
    file = open_path(source) / GRID_FILE
    return file.read_bytes() if file.is_file() else None
