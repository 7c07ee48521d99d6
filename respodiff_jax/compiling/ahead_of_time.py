"""Compiles the steps of configs for TPU topologies, and keeps the results in `compile.json`."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from respodiff_jax.backbone import Backbone
from respodiff_jax.compiling import programs
from respodiff_jax.compiling.analysis import LARGEST_BATCH, analyse, find_largest_batch
from respodiff_jax.compiling.report import markdown, summary
from respodiff_jax.compiling.topologies import Topology, open_topology, parse_topology
from respodiff_jax.errors import UserError, check_choice, check_least
from respodiff_jax.storage import PathLike, check_output, check_output_file, write_whole
from respodiff_jax.training.distributed import enable_compilation_cache
from respodiff_jax.training.spec import open_model

RESULTS_FILE = "compile.json"
STEPS = ("train", "sample")


@dataclasses.dataclass(frozen=True, eq=False)
class Compilation:
    """One program to compile.

    `step` is "train", "sample", or `LARGEST_BATCH` for the largest batch of the training step.
    `batch_per_device` counts samples of each concept; None follows the config's batch size.
    """

    config: ConfigDict
    topology: str
    step: str
    batch_per_device: int | None = None

    @property
    def attention(self) -> str:
        """The attention implementation that the config selects on a TPU."""
        name = self.config.model.attention
        if name == "cudnn":
            raise UserError("config.model.attention is 'cudnn', which no TPU has; use 'auto'")
        return "flash" if name == "auto" else name

    def to_dict(self) -> dict[str, Any]:
        """Everything that the result depends on, JSON-able."""
        fields = {
            "step": self.step,
            "topology": self.topology,
            "batch_per_device": self.batch_per_device,
            "attention": self.attention,
            "config": self.config.to_dict(),
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        }
        return json.loads(json.dumps(fields))


def compile_steps(
    configs: Sequence[ConfigDict],
    topologies: Sequence[str],
    out: PathLike,
    *,
    step: str = "both",
    batch_per_device: int | None = None,
    largest_batch: bool = False,
    table: PathLike | None = None,
    cache: PathLike | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Compiles the training and the sampling step of configs for TPUs, without a TPU.

    Every pair of a config and a topology is compiled, unless `out` has its result. The process
    needs the environment of `compiling.set_environment`.

    Args:
      configs: as from `respodiff_jax.training.config.load_config`.
      topologies: slices CHIP:SHAPE, for example "v5e:4x4".
      out: directory of `compile.json`, to which each result is added when it is known.
      step: "train", "sample" or "both".
      batch_per_device: samples of each concept on a device; by default what the config's
        `train.batch_size` leaves.
      largest_batch: also find the training step's largest `batch_per_device` that fits.
      table: Markdown file for all results in `out`.
      cache: directory for the compiled programs. A pod whose `JAX_COMPILATION_CACHE_DIR` is a copy
        of it need not compile them, if JAX, libtpu, their flags and the program are the same. Steps
        with a known result are compiled again.
      say: called with progress and with a summary of each result.

    Returns:
      The results `{"job", "chips", "model", "resolution", "concepts", "result"}`, in order.

    Raises:
      UserError: for a wrong topology, model, batch or file, before anything is compiled.
    """
    if batch_per_device is not None:
        check_least("`batch_per_device`", batch_per_device)
    check_choice("`step`", step, (*STEPS, "both"))
    table_file = None if table is None else check_output_file(table, "table")
    steps = STEPS if step == "both" else (step,)
    if largest_batch:
        steps = (*steps, LARGEST_BATCH)
    compilations = [
        Compilation(config, topology, name, batch_per_device)
        for config in configs
        for topology in topologies
        for name in steps
    ]
    for topology in topologies:
        parse_topology(topology)
    file = check_output(out) / RESULTS_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    if cache is not None:
        keep_compiled(os.fspath(cache))
    entries = []
    for entry in _compile(compilations, file, again=cache is not None, say=say):
        say(summary(entry))
        entries.append(entry)
    if table_file:
        results = read_results(file)
        table_file.write_text(markdown(results), encoding="utf-8")
        say(f"{table}: {len(results)} results")
    return entries


def read_results(file: pathlib.Path) -> list[dict[str, Any]]:
    """Reads a `compile.json`; raises `UserError` if the file is something else."""
    try:
        entries = json.loads(file.read_bytes())
    except (OSError, ValueError):
        entries = None
    if isinstance(entries, list) and all(
        isinstance(entry, dict) and {"job", "result"} <= entry.keys() for entry in entries
    ):
        return entries
    raise UserError(f"{file} is not what `respodiff compile` writes; move it away")


def keep_compiled(folder: str) -> None:
    """Keeps every program compiled from now on in JAX's persistent cache.

    Without a TPU the cache can be written, but not read.
    """
    enable_compilation_cache(folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")


def _compile(
    compilations: Sequence[Compilation],
    file: pathlib.Path,
    again: bool,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Yields the results in order, after adding new ones to `file`; `again` ignores known steps."""
    known = read_results(file) if file.exists() else []
    # All models and topologies are opened and checked before anything is compiled.
    slices = {c.topology: open_topology(c.topology) for c in compilations}
    opened = [(c, slices[c.topology], *_open(c, slices[c.topology])) for c in compilations]
    for compilation, topology, config, backbone in opened:
        job, step = compilation.to_dict(), compilation.step
        found = _find(known, job)
        if found and not (again and step != LARGEST_BATCH):
            yield found
            continue
        say(f"compiling {step} of {config.model.name} for {topology.name}")
        entry = found or {
            "job": job,
            "chips": len(topology.devices),
            "model": config.model.name,
            "resolution": config.model.resolution or backbone.default_resolution,
            "concepts": programs.concepts_at_a_time(config, len(topology.devices)),
        }
        if step == LARGEST_BATCH:
            trained = _find(known, job | {"step": "train"})
            entry["result"] = _largest_batch(config, backbone, topology, trained, say)
        else:
            entry["result"] = analyse(_program(step, config, backbone, topology), topology.chip)
        if found is None:
            known.append(entry)
        write_whole(file, json.dumps(known, indent=2) + "\n")
        yield entry


def _find(known: Sequence[dict[str, Any]], job: Mapping[str, Any]) -> dict[str, Any] | None:
    return next((entry for entry in known if entry["job"] == job), None)


def _open(compilation: Compilation, topology: Topology) -> tuple[ConfigDict, Backbone]:
    """Sets the config's batch size and opens the model's shapes; checks both for the slice."""
    config = ConfigDict(compilation.config.copy_and_resolve_references())
    if compilation.batch_per_device is not None:
        shards = programs.data_shards(config, len(topology.devices))
        config.train.batch_size = compilation.batch_per_device * shards
    try:
        # This machine need not have the attention.
        backbone = open_model(config, attention="plain", abstract=True)
    except UserError as error:
        raise UserError(
            f"{error} To compile without files, set config.model.name to random/sd14, random/sd21"
            " or random/sdxl."
        ) from error
    backbone = dataclasses.replace(backbone, attention=compilation.attention)
    _program(compilation.step, config, backbone, topology)
    return config, backbone


def _program(
    step: str, config: ConfigDict, backbone: Backbone, topology: Topology
) -> programs.Program:
    make = programs.sampling if step == "sample" else programs.training
    return make(config, backbone, topology.devices)


def _largest_batch(
    config: ConfigDict,
    backbone: Backbone,
    topology: Topology,
    trained: Mapping[str, Any] | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The largest batch of each concept; `trained` is the config's own training step, if known."""
    shards = programs.data_shards(config, len(topology.devices))
    first = config.train.batch_size // shards

    def required(batch_per_device: int) -> int:
        if trained is not None and batch_per_device == first:
            return trained["result"]["memory"]["total"]
        say(f"trying a batch of {batch_per_device}")
        config.train.batch_size = batch_per_device * shards
        program = _program("train", config, backbone, topology)
        program = dataclasses.replace(program, lower_body=None, repeats=None)
        return analyse(program, topology.chip)["memory"]["total"]

    return find_largest_batch(required, topology.chip.hbm, first)
