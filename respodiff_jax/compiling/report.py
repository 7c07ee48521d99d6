"""Results of `respodiff compile` as text: a few lines for each, and a table of all."""

from collections.abc import Mapping, Sequence
from typing import Any

from respodiff_jax.compiling.analysis import LARGEST_BATCH

_HEADER = (
    *("model", "slice", "program", "samples per chip", "HBM, GiB", "TFLOP", "traffic, GB"),
    *("at best, s", "bound by", "samples/s", "concepts/hour", "exchanged, MB"),
)
_LARGEST_HEADER = ("model", "slice", "program", "largest batch of a concept per chip")

_LEGEND = """\
Compiled ahead of time with {versions}; not run on a TPU. All figures are for one chip and one \
step, or for sampling one batch. *HBM*: required, of the available memory. *TFLOP*: XLA's count, \
and the matrix products of attention kernels. *Traffic*: between HBM and chip; each instruction's \
operands and results count once, those that the compiler keeps on the chip do not. *At best*: the \
longer of FLOPs at peak and traffic at full bandwidth, without exchanges; *samples/s* and \
*concepts/hour* follow from it. *Concepts/hour*: with the config's steps and batch size; copies \
that fill up a wave count as concepts. *Exchanged*: bytes of the collectives' whole arrays."""


def summary(entry: Mapping[str, Any]) -> str:
    """A result in a few lines; all figures are for one chip."""
    job, result = entry["job"], entry["result"]
    title = f"{_model(entry)}, {_program(entry)} on {job['topology']} ({entry['chips']} chips)"
    if job["step"] == LARGEST_BATCH:
        tried = sorted((int(batch), n) for batch, n in result["tried"].items())
        sizes = ", ".join(f"{batch}: {_gib(n)} GiB" for batch, n in tried)
        return f"{title}\n  {_limit(result)} samples a concept ({sizes})"
    memory = result["memory"]
    verdict = "fits" if result["fits"] else "DOES NOT FIT"
    lines = [
        f"{title}, {result['batch_per_device']} samples a chip",
        f"  memory      {_gib(memory['total'])} GiB of {_gib(memory['available'])}: {verdict}",
    ]
    if "roofline" not in result:
        return "\n".join(lines)
    bound, exchange = result["roofline"], result["exchange"]
    parts = ("parameters", "arguments", "temporaries", "outputs", "aliased", "code", "peak")
    lines.append("              " + ", ".join(f"{part} {_gib(memory[part])}" for part in parts))
    for name, amount, seconds in (
        ("arithmetic", f"{result['flops'] / 1e12:.2f} TFLOP", bound["compute_seconds"]),
        ("traffic", f"{result['bytes'] / 1e9:.1f} GB", bound["memory_seconds"]),
    ):
        lines.append(f"  {name:11} {amount}, {1e3 * seconds:.4g} ms at best")
    transposed = result["transposed_bytes"]
    copied = result["rearranged_bytes"] - transposed
    lines.append(
        f"              including {copied / 1e9:.1f} GB of copies to another layout and"
        f" {transposed / 1e9:.1f} GB of transposes and casts"
    )
    lines.append(f"  bound by    {bound['bound']}: at best {_rate(result):.4g} samples/s a chip")
    if job["step"] == "train":
        hourly, train = concepts_per_hour(entry), job["config"]["train"]
        lines.append(
            f"              {hourly:.4g} concepts/hour a chip, with {train['steps']} steps of"
            f" batch size {train['batch_size']}"
        )
    if loop := result["loop"]:
        lines.append(f"  loop        its body counts {loop['repeats']:g} times")
    if kernels := result["kernels_without_flops"]:
        lines.append(f"  {kernels} Pallas kernels whose FLOPs are not counted")
    ops = ", ".join(f"{op} {_mb(n['bytes'])}" for op, n in exchange["by_op"].items()) or "nothing"
    lines.append(f"  exchange    {ops}; gradients are {_mb(exchange['gradients'])}")
    lines.append(
        f"  base weights stay where they are: {'yes' if exchange['no_weights_moved'] else 'NO'}"
    )
    lines.append(f"  compiled in {result['compile_seconds']:g} s")
    return "\n".join(lines)


def concepts_per_hour(entry: Mapping[str, Any]) -> float:
    """The concepts that a chip trains in an hour, by the roofline.

    `3600 samples_per_device / (seconds of a step * train.steps * train.batch_size)`: a device that
    shares a concept's batch trains a part of that concept.
    """
    train = entry["job"]["config"]["train"]
    return 3600 * _rate(entry["result"]) / (train["steps"] * train["batch_size"])


def markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    """All results as a Markdown table, and the meaning of its columns."""
    versions = {
        ", ".join(f"{name} {n}" for name, n in entry["job"]["versions"].items())
        for entry in entries
    }
    rows, limits = [], []
    for entry in entries:
        if entry["job"]["step"] == LARGEST_BATCH:
            limits.append([*_key(entry), _limit(entry["result"])])
        else:
            rows.append(_row(entry))
    lines = [*_table(_HEADER, rows), "", _LEGEND.format(versions="; ".join(sorted(versions)))]
    if limits:
        lines += ["", *_table(_LARGEST_HEADER, limits)]
    return "\n".join(lines) + "\n"


def _row(entry: Mapping[str, Any]) -> list[str]:
    result = entry["result"]
    memory = result["memory"]
    fits = "" if result["fits"] else ", does not fit"
    row = [
        *_key(entry),
        str(result["batch_per_device"]),
        f"{_gib(memory['total'])} of {_gib(memory['available'])}{fits}",
    ]
    if "roofline" not in result:
        return row + ["–"] * (len(_HEADER) - len(row))
    return [
        *row,
        f"{result['flops'] / 1e12:.2f}",
        f"{result['bytes'] / 1e9:.1f}",
        f"{result['roofline']['seconds']:.3g}",
        result["roofline"]["bound"],
        f"{_rate(result):.3g}",
        f"{concepts_per_hour(entry):.4g}" if entry["job"]["step"] == "train" else "–",
        f"{result['exchange']['bytes'] / 1e6:.2f}",
    ]


def _key(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    return _model(entry), entry["job"]["topology"], _program(entry)


def _model(entry: Mapping[str, Any]) -> str:
    dtype = entry["job"]["config"]["model"]["dtype"]
    return f"{entry['model']}, {entry['resolution']} px, {dtype}"


def _program(entry: Mapping[str, Any]) -> str:
    job = entry["job"]
    config = job["config"]
    if job["step"] == "sample":
        return f"sample, {config['log']['grid_steps']} steps, {job['attention']}"
    parallel = config["parallel"]  # files of older versions may have fsdp
    strategy = "fsdp" if parallel.get("fsdp") else parallel["strategy"]
    concepts = f"{entry['concepts']} concept{'s' * (entry['concepts'] > 1)}"
    words = ("train", concepts, config["rollout"]["kind"], strategy, job["attention"])
    return ", ".join(words)


def _rate(result: Mapping[str, Any]) -> float:
    """Samples per second, by the roofline."""
    return result["batch_per_device"] / result["roofline"]["seconds"]


def _limit(result: Mapping[str, Any]) -> str:
    return f"{result['largest']}{'' if result['exact'] else ' or more'}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _gib(n: float) -> str:
    return f"{n / 2**30:.2f}"


def _mb(n: float) -> str:
    return f"{n / 1e6:.2f} MB"
