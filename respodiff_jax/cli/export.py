"""`respodiff export`."""

import argparse

from respodiff_jax.cli import inputs

SUMMARY = "write the adapter of a run"

DESCRIPTION = """\
Writes the trained concepts of a run as an adapter directory: adapter_model.safetensors and
adapter_config.json, without optimiser state and base weights; README.md, a model card, with the
run's newest validation grids; and torch_adapter.py, which loads the adapter in PyTorch. The same
run gives the same bytes. An adapter directory can be exported again with other options. Metrics
belong to the adapter that was measured: with other concepts, scales or another dtype they are left
out.
"""

EPILOG = """\
  respodiff export runs/gender --out adapters/gender
  respodiff export runs/gender --out adapters/gender-1000 --step 1000 --dtype float16
  respodiff export runs/many --only "a nurse" --only "a judge" --out adapters/two
  respodiff export adapters/gender --out adapters/gender-soft --scale "a woman=0.8"
  respodiff export runs/gender --out adapters/gender --comfyui ComfyUI/custom_nodes/respodiff
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
        dest="scales",
        action="append",
        default=[],
        metavar="NAME=SCALE",
        help="weight of a concept for which the user gives none; may be repeated (default: 1)",
    )
    add(
        "--evaluation",
        dest="metrics",
        metavar="DIR",
        help="what `respodiff evaluate` wrote for this adapter; config and card get its overall"
        " metrics",
    )
    add(
        "--comfyui",
        metavar="DIR",
        help="also write ComfyUI's nodes with this adapter into a folder of its custom_nodes, such"
        " as ComfyUI/custom_nodes/respodiff",
    )
    add(
        "--overwrite",
        action="store_true",
        help="write into a folder that has other files, and replace those of the same names",
    )


def run(args: argparse.Namespace) -> None:
    inputs.check_sources([args.source])
    scales = inputs.read_scales("--scale", args.scales)

    import respodiff_jax as rd
    from respodiff_jax.evaluation.results import overall_metrics
    from respodiff_jax.training.grids import sample_grid

    adapter = rd.load_adapter(args.source, args.step, args.only)
    metrics = overall_metrics(args.metrics, adapter) if args.metrics else None
    given = {"scales": scales, "metrics": metrics, "grid": sample_grid(args.source, args.step)}
    exported = inputs.call(rd.export, args, adapter=adapter, **given)
    print(f"{args.out}: {exported.module.kind} adapter of {', '.join(exported.names)}")
