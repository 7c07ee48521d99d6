"""What several verbs read from the command line: adapters, prompts, scales."""

import csv
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from respodiff_jax.adapters import Adapter


def open_adapter(path: str) -> "Adapter":
    """Reads an adapter directory, or the newest state of a training workdir."""
    from respodiff_jax.adapters import CONFIG_FILE, load_adapter
    from respodiff_jax.checkpoint import adapter_from_workdir

    folder = pathlib.Path(path)
    if not (folder / CONFIG_FILE).exists() and (folder / "run.json").exists():
        return adapter_from_workdir(path)
    return load_adapter(path)


def read_prompts(given: Sequence[str], file: str | None) -> list[str]:
    """The prompts of the command line, then those of the file."""
    prompts = list(given)
    if file is not None:
        try:
            with open(file, encoding="utf-8-sig", newline="") as lines:
                if pathlib.Path(file).suffix.lower() == ".csv":
                    table = csv.DictReader(lines)
                    if "prompt" not in (table.fieldnames or ()):
                        raise ValueError(
                            f"--prompts-file {file} has no column 'prompt', only {table.fieldnames}"
                        )
                    found = [row["prompt"] or "" for row in table]
                else:
                    found = [line.strip() for line in lines]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"--prompts-file {file} cannot be read: {error}") from error
        prompts += [prompt for prompt in found if prompt.strip()]
    if not prompts:
        raise ValueError("no prompts; give --prompt TEXT or a --prompts-file that is not empty")
    return prompts


def read_scales(
    option: str, entries: Sequence[str], default: float | None = None
) -> dict[str, float]:
    """`NAME=NUMBER` entries as a mapping; a name may itself contain "="."""
    scales: dict[str, float] = {}
    for entry in entries:
        name, _, number = entry.rpartition("=")
        try:
            name, scale = name.strip(), float(number)
        except ValueError:
            name, scale = entry.strip(), default
        if not name or scale is None:
            raise ValueError(f"{option}: {entry!r} is not NAME=NUMBER")
        if name in scales:
            raise ValueError(f"{option} names {name!r} twice")
        scales[name] = scale
    return scales
