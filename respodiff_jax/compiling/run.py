"""The job behind `respodiff compile`: opens the models, compiles, keeps the results."""

import dataclasses
import importlib.metadata
import json
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from respodiff_jax.backbone import Backbone, load_backbone
from respodiff_jax.compiling import programs
from respodiff_jax.compiling.analysis import analyse, largest_batch
from respodiff_jax.compiling.topologies import Topology, open_topology, parse_topology
from respodiff_jax.errors import UserError
from respodiff_jax.storage import check_output
from respodiff_jax.training.distributed import enable_compilation_cache

RESULTS_FILE = "compile.json"
STEPS = ("train", "sample")
LARGEST = "largest batch"


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A program to compile.

    Attributes:
      config: as from `respodiff_jax.training.config.load_config`.
      topology: for example "v5e:4x4".
      step: "train", "sample", or `LARGEST` for the largest batch that the training step takes.
      batch_per_device: samples of each concept on a device; None is what the config's batch leaves.
    """

    config: ConfigDict
    topology: str
    step: str
    batch_per_device: int | None = None

    @property
    def attention(self) -> str:
        """The implementation that the config means on a TPU."""
        name = self.config.model.attention
        if name == "cudnn":
            raise UserError("config.model.attention is 'cudnn', which no TPU has; use 'auto'")
        return "flash" if name == "auto" else name

    def to_dict(self) -> dict[str, Any]:
        """What a result depends on; JSON-able."""
        versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
        fields = {
            "step": self.step,
            "topology": self.topology,
            "batch_per_device": self.batch_per_device,
            "attention": self.attention,
            "config": self.config.to_dict(),
            "versions": versions,
        }
        return json.loads(json.dumps(fields))


def compile_jobs(
    jobs: Sequence[Job], out: str, again: bool = False, say: Callable[[str], None] = print
) -> Iterator[dict[str, Any]]:
    """Compiles what `out` has no result of yet.

    Args:
      jobs: what to compile.
      out: directory of `compile.json`, to which each result is added as soon as it is there.
      again: compile the steps that it has as well, for the programs themselves.
      say: told what is being done.

    Yields:
      The jobs' results in order: `{"job", "chips", "model", "resolution", "concepts", "result"}`.

    Raises:
      UserError: for a topology, model or batch that does not go, before anything is compiled.
    """
    for job in jobs:
        parse_topology(job.topology)
    file = check_output(out, overwrite=True) / RESULTS_FILE
    known = read_results(file) if file.exists() else []
    slices = {name: open_topology(name) for name in dict.fromkeys(j.topology for j in jobs)}
    opened = [(job, slices[job.topology], *_open(job, slices[job.topology])) for job in jobs]
    for job, topology, config, backbone in opened:
        description = job.to_dict()
        entry = next((e for e in known if e["job"] == description), None)
        if entry is None or (again and job.step != LARGEST):
            say(f"compiling {job.step} of {config.model.name} for {topology.name}")
            if job.step == LARGEST:
                step = description | {"step": "train"}
                found = next((e["result"] for e in known if e["job"] == step), None)
                result = _largest_batch(config, backbone, topology, found, say)
            else:
                result = analyse(_program(job.step, config, backbone, topology), topology.chip)
            new = {
                "job": description,
                "chips": len(topology.devices),
                "model": config.model.name,
                "resolution": config.model.resolution or backbone.default_resolution,
                "concepts": programs.concepts_at_a_time(config, len(topology.devices)),
                "result": result,
            }
            if entry is None:
                known.append(new)
            else:
                known[known.index(entry)] = new
            entry = new
            file.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        yield entry


def read_results(file: pathlib.Path) -> list[dict[str, Any]]:
    """All results of a `compile.json`.

    Raises:
      UserError: if it is none.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        if all({"job", "result"} <= set(entry) for entry in entries):
            return entries
    except (OSError, ValueError, TypeError):
        pass
    raise UserError(f"{file} is not what `respodiff compile` writes; move it away")


def keep_compiled(folder: str) -> None:
    """Keeps what is compiled from here on in JAX's persistent cache.

    A pod whose `JAX_COMPILATION_CACHE_DIR` is a copy of it finds there what it would compile, if
    JAX, libtpu, their flags and the program are the same. Without a TPU it can be written only.
    """
    enable_compilation_cache(folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")


def _open(job: Job, topology: Topology) -> tuple[ConfigDict, Backbone]:
    """The config with the job's batch, and the model's shapes; checks that they fit the slice."""
    config = ConfigDict(job.config.copy_and_resolve_references())
    if job.batch_per_device is not None:
        shards = programs.data_shards(config, len(topology.devices))
        config.train.batch_size = job.batch_per_device * shards
    try:
        backbone = load_backbone(
            config.model.name,
            revision=config.model.revision,
            variant=config.model.variant,
            dtype=config.model.dtype,
            attention="plain",
            abstract=True,
        )
    except ValueError as error:
        raise UserError(
            f"{error} The shapes alone need no files: --config.model.name=random/sd14, random/sd21"
            " or random/sdxl."
        ) from error
    # Chosen for the chip, not for this machine.
    backbone = dataclasses.replace(backbone, attention=job.attention)
    _program(job.step, config, backbone, topology)
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
    step: dict[str, Any] | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The largest batch of each concept; `step` is the result of the config's, if it is known."""
    shards = programs.data_shards(config, len(topology.devices))
    first = config.train.batch_size // shards

    def required(batch_per_device: int) -> int:
        if step is not None and batch_per_device == first:
            return step["memory"]["total"]
        say(f"trying a batch of {batch_per_device}")
        config.train.batch_size = batch_per_device * shards
        program = _program("train", config, backbone, topology)
        program = dataclasses.replace(program, lower_body=None, repeats=None)
        return analyse(program, topology.chip)["memory"]["total"]

    return largest_batch(required, topology.chip.hbm, first)
