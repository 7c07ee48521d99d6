"""Results of `respodiff compile` for the eye: a few lines each, and all of them as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from respodiff_jax.compiling.run import LARGEST

_HEADER = (
    *("model", "slice", "program", "a chip's batch", "HBM, GiB", "TFLOP", "traffic, GB"),
    *("at best, s", "binds", "at best, per s", "concepts an hour", "exchanged, MB"),
)


def summary(entry: Mapping[str, Any]) -> str:
    """A result in a few lines; all figures are of one chip."""
    job, result = entry["job"], entry["result"]
    lines = [f"{_what(entry)} on {job['topology']} ({entry['chips']} chips)"]
    if job["step"] == LARGEST:
        tried = ", ".join(f"{b}: {_gib(n)} GiB" for b, n in sorted(_batches(result)))
        limit = "" if result["exact"] else " or more"
        return "\n".join([*lines, f"  {result['largest']}{limit} samples a concept ({tried})"])
    memory = result["memory"]
    lines[0] += f", {result['batch_per_device']} samples a chip"
    verdict = "fits" if result["fits"] else "DOES NOT FIT"
    lines.append(
        f"  memory      {_gib(memory['total'])} GiB of {_gib(memory['available'])}: {verdict}"
    )
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
    if "transposed_bytes" in result:
        transposed = result["transposed_bytes"]
        copied = result["rearranged_bytes"] - transposed
        lines.append(
            f"              {copied / 1e9:.1f} GB of it copies to another layout,"
            f" {transposed / 1e9:.1f} GB transposes and casts by themselves"
        )
    rate = result["batch_per_device"] / bound["seconds"]
    lines.append(f"  {bound['bound']} binds: at best {rate:.4g} samples/s a chip")
    if job["step"] == "train":
        hourly, train = concepts_an_hour(entry), job["config"]["train"]
        lines.append(
            f"              {hourly:.4g} concepts an hour a chip, of {train['steps']} steps with"
            f" batch size {train['batch_size']}"
        )
    if loop := result["loop"]:
        lines.append(f"  loop        counted {loop['repeats']:g} times")
    if kernels := result["kernels_without_flops"]:
        lines.append(f"  {kernels} Pallas kernels whose arithmetic is not counted")
    ops = ", ".join(f"{op} {_mb(n['bytes'])}" for op, n in exchange["by_op"].items()) or "nothing"
    lines.append(f"  exchange    {ops}; gradients are {_mb(exchange['gradients'])}")
    verdict = {True: "yes", False: "NO", None: "no: they are sharded"}[exchange["no_weights_moved"]]
    lines.append(f"  base weights stay where they are: {verdict}")
    lines.append(f"  compiled in {result['compile_seconds']:g} s")
    return "\n".join(lines)


def concepts_an_hour(entry: Mapping[str, Any]) -> float:
    """How many concepts a chip trains in an hour at best: what the roofline leaves of it.

    `3600 batch_per_device / (seconds of a step * train.steps * train.batch_size)`: devices that
    share a concept's batch train a part of it each.
    """
    train, result = entry["job"]["config"]["train"], entry["result"]
    rate = result["batch_per_device"] / result["roofline"]["seconds"]
    return 3600 * rate / (train["steps"] * train["batch_size"])


def markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    """All results as a Markdown table, and what the columns mean."""
    rows = [_row(entry) for entry in entries if entry["job"]["step"] != LARGEST]
    lines = [_line(_HEADER), _line(["---"] * len(_HEADER)), *map(_line, rows)]
    versions = sorted({_versions(entry) for entry in entries})
    lines += [
        "",
        f"Compiled ahead of time with {'; '.join(versions)}, run on no TPU. All figures are of one"
        " chip and one step (of one batch, for sampling). *HBM*: needed, of what there is."
        " *TFLOP*: XLA's, and of attention kernels their matrix products. *Traffic*: between HBM"
        " and chip, each instruction's operands and results once, but for those that the compiler"
        " keeps on the chip. *At best*: the longer of FLOPs at peak and traffic at full"
        " bandwidth, exchanges not counted. *Concepts an hour*: of the config's steps and batch"
        " size, copies that fill up a wave counted. *Exchanged*: in collectives, as large as what"
        " they are of when whole.",
    ]
    largest = [entry for entry in entries if entry["job"]["step"] == LARGEST]
    if largest:
        header = ["model", "slice", "program", "a concept's largest batch on a chip"]
        lines += ["", _line(header), _line(["---"] * 4)]
    for entry in largest:
        result = entry["result"]
        limit = str(result["largest"]) + ("" if result["exact"] else " or more")
        lines.append(_line([_model(entry), entry["job"]["topology"], _program(entry), limit]))
    return "\n".join(lines) + "\n"


def _row(entry: Mapping[str, Any]) -> list[str]:
    result = entry["result"]
    memory = result["memory"]
    row = [
        _model(entry),
        entry["job"]["topology"],
        _program(entry),
        str(result["batch_per_device"]),
    ]
    fits = "" if result["fits"] else ", does not fit"
    row.append(f"{_gib(memory['total'])} of {_gib(memory['available'])}{fits}")
    if "roofline" not in result:
        return row + ["–"] * (len(_HEADER) - len(row))
    bound = result["roofline"]
    return [
        *row,
        f"{result['flops'] / 1e12:.2f}",
        f"{result['bytes'] / 1e9:.1f}",
        f"{bound['seconds']:.3g}",
        bound["bound"],
        f"{result['batch_per_device'] / bound['seconds']:.3g}",
        f"{concepts_an_hour(entry):.4g}" if entry["job"]["step"] == "train" else "–",
        f"{result['exchange']['bytes'] / 1e6:.2f}",
    ]


def _what(entry: Mapping[str, Any]) -> str:
    return f"{_model(entry)}, {_program(entry)}"


def _model(entry: Mapping[str, Any]) -> str:
    dtype = entry["job"]["config"]["model"]["dtype"]
    return f"{entry['model']}, {entry['resolution']} px, {dtype}"


def _program(entry: Mapping[str, Any]) -> str:
    job = entry["job"]
    config = job["config"]
    if job["step"] == "sample":
        return f"sample, {config['log']['grid_steps']} steps, {job['attention']}"
    strategy = "fsdp" if config["parallel"]["fsdp"] else config["parallel"]["strategy"]
    concepts = f"{entry['concepts']} concept{'s' * (entry['concepts'] > 1)}"
    words = ("train", concepts, config["rollout"]["kind"], strategy, job["attention"])
    return ", ".join(words)


def _versions(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {n}" for name, n in entry["job"]["versions"].items())


def _batches(result: Mapping[str, Any]) -> list[tuple[int, int]]:
    return [(int(batch), n) for batch, n in result["tried"].items()]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _gib(n: float) -> str:
    return f"{n / 2**30:.2f}"


def _mb(n: float) -> str:
    return f"{n / 1e6:.2f} MB"
