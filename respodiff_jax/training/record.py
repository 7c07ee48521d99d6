"""What a working directory belongs to: `run.json`, and whether a run may continue there."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from respodiff_jax.adapters.files import CONFIG_FILE
from respodiff_jax.errors import UserError
from respodiff_jax.method.concepts import Concept
from respodiff_jax.method.modules import MidBlockModule
from respodiff_jax.storage import open_path, read_json, write_whole
from respodiff_jax.training.config import default

RUN_FILE = "run.json"

# Options that do not change what is trained; they may differ when a run is continued. The concepts
# already hold what they took from `concept_defaults`.
_FREE_SECTIONS = ("parallel", "checkpoint", "log", "concept_defaults")


def is_workdir(path: epath.PathLike) -> bool:
    """Whether a path is a single run's directory, and not an adapter's."""
    folder = open_path(path)
    return (folder / RUN_FILE).exists() and not (folder / CONFIG_FILE).exists()


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The contents of `run.json`.

    Attributes:
      config: the resolved config.
      concepts: in the order of the state's concept axis.
      module: fields of the `MidBlockModule`.
      backbone: identity of the frozen model, resolution and prediction type.
    """

    config: Mapping[str, Any]
    concepts: Sequence[Mapping[str, Any]]
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
        module_fields = {
            "kind": module.kind,
            "mid_block_shape": list(module.mid_block_shape),
            "hidden_channels": module.hidden_channels,
        }
        record = cls(
            config.to_dict(), [c.to_dict() for c in concepts], module_fields, dict(backbone)
        )
        return cls(**json.loads(json.dumps(dataclasses.asdict(record))))  # tuples become lists

    @classmethod
    def read(cls, workdir: epath.PathLike) -> "RunRecord | None":
        """The record of a directory, or None where there is none."""
        path = open_path(workdir) / RUN_FILE
        if not path.exists():
            return None
        fields = read_json(path, "run record")
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(fields, dict) or sorted(fields) != sorted(known):
            raise UserError(f"{path} is not a run record of this version: expected {known}")
        return cls(**fields)

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


def _binding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that must not change when a run is continued.

    Options that the config lacks, since an older version saved it, have their defaults.
    """
    config = _filled(config, default().to_dict())
    free = {"concepts_per_device", "remat"}
    if (
        config["optimizer"]["lr_schedule"] == "constant"
    ):  # more steps do not change the earlier ones
        free.add("steps")
    train = {k: v for k, v in config["train"].items() if k not in free}
    model = {k: v for k, v in config["model"].items() if k != "attention"}
    binding = {k: v for k, v in config.items() if k not in _FREE_SECTIONS}
    concepts = {key: Concept.from_dict(c).to_dict() for key, c in config["concepts"].items()}
    return binding | {"train": train, "model": model, "concepts": concepts}


def _filled(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    filled = dict(defaults) | dict(config)
    for key, value in defaults.items():
        if isinstance(value, Mapping) and value:
            filled[key] = _filled(filled[key], value)
    return filled


def _check_equal(ours: Mapping, theirs: Mapping, workdir: epath.PathLike) -> None:
    ours, theirs = _flatten(ours), _flatten(theirs)
    differences = [
        f"  {key}: {theirs.get(key, '(absent)')!r} there, {ours.get(key, '(absent)')!r} here"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key, "(absent)") != theirs.get(key, "(absent)")
    ]
    if differences:
        raise UserError(
            f"`workdir` {workdir} belongs to another run:\n"
            + "\n".join(differences)
            + "\nuse another `workdir`, or the saved values to continue that run"
        )


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
