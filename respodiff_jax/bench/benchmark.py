"""The entry point of `respodiff bench train` and `respodiff bench generate`."""

from ml_collections import ConfigDict

from respodiff_jax.bench import measure
from respodiff_jax.bench.generate import bench_generate
from respodiff_jax.bench.report import Report
from respodiff_jax.bench.train import bench_train
from respodiff_jax.errors import UserError, check_choice, check_least
from respodiff_jax.storage import PathLike, check_output_file

BENCHMARKS = {"train": bench_train, "generate": bench_generate}


def benchmark(
    what: str,
    config: ConfigDict,
    *,
    against: str | None = None,
    repeats: int = 5,
    out: PathLike | None = None,
) -> Report:
    """Measures speed, memory and compile time of a config on this machine.

    Args:
      what: "train" for the training step, "generate" for sampling with the config's model.
      config: as from `respodiff_jax.training.config.load_config`.
      against: "torch" also measures PyTorch on the same model, in alternation: for "train" the
        published procedure, for "generate" diffusers' pipeline. On a GPU, call this before JAX
        uses its devices, or JAX leaves PyTorch no memory.
      repeats: repetitions of each side.
      out: JSON file for all numbers.

    Returns:
      The result; as a string it is a Markdown table.

    Raises:
      UserError: for a wrong argument, before anything is measured; for a mistake in the config or
        the model; if PyTorch is missing.
    """
    check_choice("`what`", what, BENCHMARKS)
    if against not in (None, "torch"):
        raise UserError(f"`against` is {against!r}, expected 'torch' or None")
    check_least("`repeats`", repeats)
    file = None if out is None else check_output_file(out, "out")
    if against:
        measure.leave_gpu_memory_to_torch()
    report = BENCHMARKS[what](config, against == "torch", repeats)
    if file is not None:
        report.write(file)
    return report
