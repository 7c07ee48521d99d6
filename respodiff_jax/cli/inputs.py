"""Command-line inputs that several verbs share: adapters, models, prompts, scales."""

import argparse
import contextlib
import inspect
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from respodiff_jax.errors import UserError

if TYPE_CHECKING:
    from respodiff_jax.adapters import Adapter
    from respodiff_jax.backbone import Backbone


def add_model_arguments(parser: argparse.ArgumentParser) -> Any:
    """Adds the options that choose adapters and a model.

    Returns:
      `add_argument` of their group, to add more options.
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


def call(function: Callable[..., Any], args: argparse.Namespace, **given: Any) -> Any:
    """Calls a function of the API with the options named like its parameters."""
    options = vars(args) | given
    known = inspect.signature(function).parameters
    return function(**{name: options[name] for name in known if name in options})


def check_file(option: str, path: str) -> None:
    """Checks that a file exists, before the imports of a verb."""
    if not pathlib.Path(path).is_file():
        raise UserError(f"{option} {path}: no such file")


def check_sources(sources: Sequence[str]) -> None:
    """Checks that each source is a folder, on gs:// or like a hub id, and is given once."""
    if twice := sorted({source for source in sources if sources.count(source) > 1}):
        raise UserError(f"--adapter {twice[0]} is given twice; give each adapter once")
    for source in sources:
        is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+(@[^/]+)?", source)
        if not source.startswith("gs://") and not pathlib.Path(source).is_dir() and not is_hub_id:
            raise UserError(
                f"adapter {source!r}: no such folder, and not a hub id like 'owner/name'"
            )


def add_sampling_arguments(
    parser: argparse.ArgumentParser, steps: int | None = None, guidance: float | None = None
) -> Any:
    """Adds the options of sampling.

    Args:
      parser: of a verb.
      steps: default number of steps; None is that of `--preset`.
      guidance: default guidance scale; None is that of `--suite`.

    Returns:
      `add_argument` of their group, to add more options.
    """
    add = parser.add_argument_group("sampling").add_argument
    add(
        "--steps",
        dest="num_steps",
        type=int,
        default=steps,
        metavar="N",
        help="sampling steps (default: " + str(steps or "the preset's") + ")",
    )
    add(
        "--sampler",
        choices=("ddim", "ddim-diffusers", "dpm++", "euler"),
        help="ddim is the paper's (default); dpm++ needs fewer steps; ddim-diffusers differs from"
        " ddim where diffusers' timesteps are uneven",
    )
    add(
        "--guidance",
        dest="guidance_scale",
        type=float,
        default=guidance,
        metavar="SCALE",
        help="guidance scale (default: " + str(guidance or "the suite's") + ")",
    )
    add("--resolution", type=int, metavar="PIXELS", help="default: the adapter's, or the model's")
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="images at a time over all devices (default: by resolution)",
    )
    return add


def use_cores(args: argparse.Namespace) -> None:
    """Makes each core a device if the model is small; see `distributed.use_cores`.

    Call it before adapters are loaded, since loading may start JAX. It reads the model's name from
    the file of a local adapter or working directory.
    """
    from respodiff_jax.storage import read_json
    from respodiff_jax.training import distributed

    name = args.model
    for file in ("adapter_config.json", "run.json"):
        path = pathlib.Path(*args.adapter[:1], file)
        if not name and args.adapter and path.is_file():
            with contextlib.suppress(UserError, LookupError, TypeError):  # loading reports these
                name = str(read_json(path, "adapter")["backbone"]["name"])
    distributed.use_cores(name, getattr(args, "batch_size", None))


def open_model(args: argparse.Namespace, adapters: "Sequence[Adapter]") -> "Backbone":
    """Opens the model, by default that of the first adapter; does not read its weights yet."""
    import respodiff_jax as rd

    adapter = adapters[0] if adapters else None
    return call(rd.load_model, args, name=args.model, adapter=adapter, abstract=True)


def read_prompts(given: Sequence[str], file: str | None) -> list[str]:
    """The prompts of the command line, followed by those of the file."""
    from respodiff_jax.data.prompt_files import Column, read_table
    from respodiff_jax.storage import read_text

    prompts = list(given)
    if file is not None:
        path = pathlib.Path(file)
        if path.suffix.lower() == ".csv":
            rows = read_table(path, {"prompt": Column(may_be_blank=True)})
            found = [row["prompt"] for row in rows]
        else:
            found = [line.strip() for line in read_text(path, "--prompts-file").split("\n")]
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
