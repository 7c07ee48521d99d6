"""What a working directory belongs to: `run.json`, and whether a run may continue there."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypedDict

import flax.traverse_util
from etils import epath
from ml_collections import ConfigDict
from msgspec import Meta

from respodiff_jax.adapters.files import CONFIG_FILE, check_backbone
from respodiff_jax.errors import UserError
from respodiff_jax.method.concepts import Concept
from respodiff_jax.method.modules import MidBlockModule
from respodiff_jax.storage import checked, open_path, read_json, write_whole
from respodiff_jax.training.config import default

RUN_FILE = "run.json"

# Sections and options that do not change what is trained; they may differ when a run is continued.
# The concepts already hold what they took from `concept_defaults`.
_FREE_OPTIONS = (
    "reading",  # of prompts; it is fitted again, see `describes`
    *("parallel", "checkpoint", "log", "concept_defaults"),
    *("train.concepts_per_device", "train.remat", "model.attention"),
)
_Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_flatten = functools.partial(flax.traverse_util.flatten_dict, sep=".")


def is_workdir(path: epath.PathLike) -> bool:
    """Whether a path is a single run's directory, and not an adapter's."""
    folder = open_path(path)
    return (folder / RUN_FILE).exists() and not (folder / CONFIG_FILE).exists()


class _Train(TypedDict):
    batch_size: int


class _Model(TypedDict):
    dtype: str


class _Config(TypedDict):
    """What is read of the config in a record, which an older version may have written."""

    seed: int
    model: _Model
    train: _Train
    concepts: dict[str, dict[str, Any]]
    rollout: dict[str, Any]
    optimizer: dict[str, Any]
    module: dict[str, Any]


class _Module(TypedDict):
    kind: str
    mid_block_shape: tuple[_Size, _Size, _Size]
    hidden_channels: _Size | None


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The contents of `run.json`: the resolved config, and what it gave.

    Attributes:
      concepts: in the order of the state's concept axis.
      module: fields of the `MidBlockModule`.
      backbone: identity of the frozen model, resolution and prediction type.
    """

    config: Mapping[str, Any]
    concepts: Annotated[Sequence[Mapping[str, Any]], Meta(min_length=1)]
    module: Mapping[str, Any]
    backbone: Mapping[str, Any]

    @classmethod
    def make(
        cls,
        config: ConfigDict,
        concepts: Sequence[Concept],
        module: MidBlockModule,
        backbone: Mapping[str, Any],
    ) -> "RunRecord":
        names = ("kind", "mid_block_shape", "hidden_channels")
        fields = {
            "config": config.to_dict(),
            "concepts": [c.to_dict() for c in concepts],
            "module": {name: getattr(module, name) for name in names},
            "backbone": backbone,
        }
        return cls(**json.loads(json.dumps(fields)))  # tuples become lists

    @classmethod
    def read(cls, workdir: epath.PathLike) -> "RunRecord | None":
        """The record of a directory, or None where there is none."""
        path = open_path(workdir) / RUN_FILE
        if not path.exists():
            return None
        where = f"run record {path}"
        record = checked(cls, read_json(path, "run record"), where)
        checked(_Config, record.config, f"{where}: config")
        try:
            check_backbone(record.backbone)
            _ = record.adapter_concepts, record.adapter_module  # they check their fields
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        return record

    @functools.cached_property
    def adapter_concepts(self) -> tuple[Concept, ...]:
        return tuple(Concept.from_dict(fields) for fields in self.concepts)

    @functools.cached_property
    def adapter_module(self) -> MidBlockModule:
        fields = checked(_Module, self.module, "module")
        return MidBlockModule(**fields | {"mid_block_shape": tuple(fields["mid_block_shape"])})

    def write(self, workdir: epath.PathLike) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        write_whole(epath.Path(workdir) / RUN_FILE, text)

    def summary(self, step: int) -> dict[str, Any]:
        """How an adapter of this run was trained, for the adapter's config."""
        config = self.config
        sections = {name: config[name] for name in ("rollout", "optimizer", "module")}
        return {
            "steps": step,
            "batch_size": config["train"]["batch_size"],
            "seed": config["seed"],
            "dtype": config["model"]["dtype"],
            "init_adapter": config["train"].get("init_adapter"),
        } | sections

    def check_continues(self, saved: "RunRecord", workdir: epath.PathLike) -> None:
        """Checks that this run may continue a saved one.

        Raises:
          UserError: listing each difference that changes what is trained.
        """
        ours, theirs = (
            {"config": _binding(r.config), "module": r.module, "backbone": r.backbone}
            for r in (self, saved)
        )
        _check_equal(ours, theirs, workdir)


def check_same_config(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Checks, before any model is loaded, that a directory is new or belongs to this config.

    Raises:
      UserError: listing each difference that changes what is trained.
    """
    if saved := RunRecord.read(workdir):
        ours = json.loads(json.dumps(config.to_dict()))
        _check_equal({"config": _binding(ours)}, {"config": _binding(saved.config)}, workdir)


def describes(config: ConfigDict, workdir: epath.PathLike) -> bool:
    """Whether a directory's adapter reads prompts, and describes its concepts, as this config says.

    The options that decide it may differ when a run is continued, even after the last step.
    """
    saved = RunRecord.read(workdir)
    ours = json.loads(json.dumps(config.to_dict()))
    return (
        saved is not None
        and saved.config.get("reading") == ours["reading"]
        and _concepts(saved.config) == _concepts(ours)
    )


def _concepts(config: Mapping[str, Any], **changes: Any) -> dict[str, dict[str, Any]]:
    """The config's concepts; those of older versions lack some fields."""
    entries = config["concepts"].items()
    return {key: Concept.from_dict(c | changes).to_dict() for key, c in entries}


def _binding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options, "section.option", that must not change when a run is continued."""
    # None of these changes what is trained.
    concepts = _concepts(config, words=(), default_scale=1.0, max_timestep=None)
    # A config that an older version saved lacks some options; they have their defaults.
    options = _flatten(default().to_dict()) | _flatten({**config, "concepts": concepts})
    free = set(_FREE_OPTIONS)
    if options["optimizer.lr_schedule"] == "constant":
        free.add("train.steps")  # more steps do not change the earlier ones
    return {key: value for key, value in options.items() if not free & {key, key.split(".")[0]}}


def _check_equal(ours: Mapping, theirs: Mapping, workdir: epath.PathLike) -> None:
    ours, theirs = _flatten(ours), _flatten(theirs)
    differences = [
        f"{key}: {theirs.get(key, '(absent)')!r:.60} there, {ours.get(key, '(absent)')!r:.60} here"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key, "(absent)") != theirs.get(key, "(absent)")
    ]
    if differences:
        more = f"\n  and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(
            f"`workdir` {workdir} belongs to another run:\n  "
            + "\n  ".join(differences[:3])
            + f"{more}\nuse another `workdir`, or the saved values to continue that run"
        )
