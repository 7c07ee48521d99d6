"""Command-line inputs that several verbs share: adapters, models, prompts, scales."""

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
      step: checkpoint of a workdir with a single run; None is the newest.
      only: names of the concepts to take; none means all.
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
        raise UserError(f"--step needs a training workdir, but {path} has no run.json")
    hub_id = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@(\S+))?", path)
    if hub_id and not pathlib.Path(path).exists():
        from respodiff_jax.adapters.hub import fetch

        return load_adapter(fetch(*hub_id.groups()))
    return load_adapter(path)


def check_only(names: Sequence[str]) -> None:
    """Checks that --only repeats no name."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--only names {twice} more than once")


def is_workdir(path: str) -> bool:
    """Whether the path is the directory of a run, not of an adapter."""
    from respodiff_jax.storage import open_path
    from respodiff_jax.training.checkpoint import RUN_FILE

    folder = open_path(path)
    return (folder / RUN_FILE).exists() and not (folder / "adapter_config.json").exists()


def add_model_arguments(parser: argparse.ArgumentParser) -> Any:
    """Adds the options of `open_adapter` and `open_backbone` as a group.

    Returns:
      `add_argument` of the group, to add more options.
    """
    add = parser.add_argument_group("model and adapter").add_argument
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR",
        help="adapter directory, training workdir or hub id; may be repeated to combine concepts",
    )
    add("--model", metavar="NAME", help="diffusers folder or hub id (default: the adapter's)")
    add("--revision", help="branch, tag or commit of a hub id (default: the adapter's)")
    add("--variant", help="variant of the weight files, for example fp16")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of the model (default: float32 on a CPU, else bfloat16)",
    )
    return add


def open_backbone(
    args: argparse.Namespace, model: str, trained_on: Mapping[str, Any], abstract: bool = False
) -> "Backbone":
    """Loads the model of a command; --revision and --variant default to those of the training."""
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
    """The prompts of the command line, followed by those of the file."""
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
        raise UserError("there are no prompts; give --prompt TEXT or a --prompts-file with prompts")
    return prompts


def read_scales(
    option: str, entries: Sequence[str], optional: bool = False
) -> dict[str, float | None]:
    """Parses `NAME=NUMBER` entries; a name may contain "=".

    Args:
      option: name of the option, for messages.
      entries: values of the option.
      optional: whether `NAME` alone is allowed; its scale is then None.
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
