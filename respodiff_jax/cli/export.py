"""`respodiff export`."""

import argparse

SUMMARY = "write a run's adapter"

DESCRIPTION = """\
Writes the concepts that a run has trained as an adapter directory: adapter_model.safetensors and
adapter_config.json, without optimiser state and base weights. The same run gives the same bytes.
"""

EPILOG = """\
  respodiff export runs/gender --out adapters/gender
  respodiff export runs/gender --out adapters/gender-1000 --step 1000
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="training workdir")
    parser.add_argument("--out", required=True, metavar="DIR", help="adapter directory to write")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")


def run(args: argparse.Namespace) -> None:
    from respodiff_jax.adapters import save_adapter
    from respodiff_jax.checkpoint import adapter_from_workdir

    adapter = adapter_from_workdir(args.run, args.step)
    try:
        save_adapter(adapter, args.out)
    except OSError as error:
        raise ValueError(f"--out {args.out} cannot be written: {error}") from error
    print(f"{args.out}: {adapter.module.kind} adapter of {', '.join(adapter.names)}")
