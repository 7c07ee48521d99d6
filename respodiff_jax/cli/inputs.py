"""What several verbs read from the command line: adapters, prompts, scales."""

import argparse
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from respodiff_jax.errors import UserError

if TYPE_CHECKING:
    from respodiff_jax.adapters import Adapter
    from respodiff_jax.backbone import Backbone


def open_adapter(path: str, step: int | None = None, only: Sequence[str] = ()) -> "Adapter":
    """Reads an adapter.

    Args:
      path: an adapter directory, a training workdir, or "owner/name" or "owner/name@revision" on
        the Hugging Face hub.
      step: of a workdir that is a single run; by default the newest.
      only: names of the concepts to take; by default all.
    """
    from respodiff_jax.adapters import select
    from respodiff_jax.training.waves import is_batch, load_batch

    check_only(only)
    if step is None and is_batch(path):
        return load_batch(path, only)
    adapter = _open_whole(path, step)
    return select(adapter, only) if only else adapter


def _open_whole(path: str, step: int | None) -> "Adapter":
    from respodiff_jax.adapters import load_adapter
    from respodiff_jax.training.checkpoint import adapter_from_workdir

    if is_workdir(path):
        return adapter_from_workdir(path, step)
    if step is not None:
        raise UserError(f"--step is of a training workdir, but {path} is none: it has no run.json")
    hub_id = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@(\S+))?", path)
    if hub_id and not pathlib.Path(path).exists():
        from respodiff_jax.adapters.hub import fetch

        return load_adapter(fetch(*hub_id.groups()))
    return load_adapter(path)


def check_only(names: Sequence[str]) -> None:
    """Checks that --only names nothing twice."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--only names {twice} more than once")


def is_workdir(path: str) -> bool:
    """Whether this is a run's directory, and not an adapter's."""
    from respodiff_jax.storage import open_path
    from respodiff_jax.training.checkpoint import RUN_FILE

    folder = open_path(path)
    return (folder / RUN_FILE).exists() and not (folder / "adapter_config.json").exists()


def add_model_arguments(parser: argparse.ArgumentParser) -> Any:
    """The options that `open_adapter` and `open_backbone` read; returns their group's
    `add_argument`, for more."""
    add = parser.add_argument_group("model and adapter").add_argument
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR",
        help="adapter directory, training workdir or hub id; may be repeated to use concepts of"
        " several",
    )
    add("--model", metavar="NAME", help="diffusers folder or hub id (default: the adapter's)")
    add("--revision", help="of a hub id: branch, tag or commit (default: the adapter's)")
    add("--variant", help="of the weight files, for example fp16")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the model (default: bfloat16, on a CPU float32)",
    )
    return add


def open_backbone(
    args: argparse.Namespace, model: str, trained_on: Mapping[str, Any], abstract: bool = False
) -> "Backbone":
    """The model of a command with --revision, --variant and --dtype, by default as in training."""
    import jax

    from respodiff_jax.backbone import load_backbone

    same = model == trained_on.get("name")
    return load_backbone(
        model,
        revision=args.revision or (trained_on["revision"] if same else None),
        variant=args.variant or (trained_on["variant"] if same else None),
        dtype=args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"),
        abstract=abstract,
    )


def read_prompts(given: Sequence[str], file: str | None) -> list[str]:
    """The prompts of the command line, then those of the file."""
    from respodiff_jax.data.prompt_files import Column, read_table

    prompts = list(given)
    if file is not None:
        path = pathlib.Path(file)
        if path.suffix.lower() == ".csv":
            rows = read_table(path, {"prompt": Column(may_be_blank=True)})
            found = [row["prompt"] for row in rows]
        else:
            try:
                lines = path.read_text(encoding="utf-8-sig").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"--prompts-file {file} cannot be read: {error}") from error
            found = [line.strip() for line in lines]
        prompts += [prompt for prompt in found if prompt.strip()]
    if not prompts:
        raise UserError("no prompts; give --prompt TEXT or a --prompts-file that is not empty")
    return prompts


def read_scales(
    option: str, entries: Sequence[str], optional: bool = False
) -> dict[str, float | None]:
    """`NAME=NUMBER` entries as a mapping; a name may itself contain "=".

    If numbers are `optional`, `NAME` alone gives None.
    """
    scales: dict[str, float | None] = {}
    for entry in entries:
        name, _, number = entry.rpartition("=")
        try:
            name, scale = name.strip(), float(number)
        except ValueError:
            name, scale = entry.strip(), None
        if not name or (scale is None and not optional):
            raise UserError(f"{option}: {entry!r} is not NAME=NUMBER")
        if name in scales:
            raise UserError(f"{option} names {name!r} twice")
        scales[name] = scale
    return scales
