"""Where a pipeline's files are: in a diffusers folder, here or on Google Cloud Storage, or in the
Hugging Face cache; are all there?"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Collection
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock

from respodiff_jax.backbone.weights import read_index
from respodiff_jax.errors import UserError
from respodiff_jax.storage import is_remote, open_path

_STEMS = {
    "diffusers": ("diffusion_pytorch_model", "diffusion_flax_model"),
    "transformers": ("model", "flax_model"),
}
_INDEX = "model_index.json"
_SCHEDULER = "scheduler/scheduler_config.json"
_TOKENIZER_FILES = ("vocab.json", "merges.txt")
_TOKENIZER_OPTIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Models that come with the package.
_EMBEDDED = {"emoji-world": pathlib.Path(__file__).parent.parent / "emoji" / "model"}
_CLIP_CONFIGS = ("config.json", "preprocessor_config.json")


@dataclasses.dataclass(frozen=True)
class PipelineFiles:
    """A complete set of files: what is small is read, weights are paths.

    `configs` and `weights` are keyed by part: "unet", "vae", "text_encoder" and, for SDXL,
      "text_encoder_2".
    """

    name: str
    revision: str | None
    index: dict[str, Any]
    configs: dict[str, dict[str, Any]]
    weights: dict[str, list[pathlib.Path]]
    tokenizers: list[pathlib.Path]
    scheduler_config: dict[str, Any]


@functools.lru_cache
def sha256(*files: pathlib.Path) -> str:
    """Hexadecimal digest of files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def choose_weights(names: Collection[str], part: str, variant: str | None) -> list[str]:
    """Which of a part's files to read: one file, or an index followed by its shards; [] if there
    are none.

    Safetensors come before msgpack; without a `variant` the plain files come before fp16.
    """
    stem, flax_stem = _STEMS["transformers" if part.startswith("text_encoder") else "diffusers"]
    for v in (variant,) if variant else (None, "fp16"):
        infix = f".{v}" if v else ""
        if f"{stem}{infix}.safetensors" in names:
            return [f"{stem}{infix}.safetensors"]
        index = f"{stem}.safetensors.index{infix}.json"
        if index in names:
            # Both orders of variant and number are in use.
            v, number = re.escape(infix), r"-\d+-of-\d+"
            shard = re.compile(f"{stem}({v}{number}|{number}{v})\\.safetensors")
            return [index, *sorted(n for n in names if shard.fullmatch(n))]
    return [f"{flax_stem}.msgpack"] if f"{flax_stem}.msgpack" in names and not variant else []


def _parts(index: dict) -> list[str]:
    present = [p for p in ("text_encoder", "text_encoder_2") if (index.get(p) or [None])[0]]
    return ["unet", "vae", *present]


def _snapshot(
    name: str,
    revision: str | None,
    cache_dir: Any,
    wanted: Callable[[Collection[str]], Collection[str]],
) -> pathlib.Path:
    """A hub model's folder in the cache: what is not there is fetched, if there is a network.

    `wanted` chooses from the names of all the model's files; without a network, of none.
    """
    available, reason = None, "the hub is not asked in offline mode (HF_HUB_OFFLINE)"
    if not constants.HF_HUB_OFFLINE:
        try:
            available = huggingface_hub.HfApi().list_repo_files(name, revision=revision)
        except OSError as error:  # no network, no such model or revision, or no permission
            reason = str(error)
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=list(wanted(available or ())),
            local_files_only=available is None,
        )
    except OSError as error:
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"model {name!r}{at} is neither a folder nor in the Hugging Face cache, and cannot be "
            f"fetched: {reason if available is None else error}. Give a folder, check the name, or "
            "download it first where there is a network."
        ) from error
    return pathlib.Path(folder)


def _pipeline_files(available: Collection[str], variant: str | None) -> list[str]:
    wanted = [_INDEX, _SCHEDULER]
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        inside = [n.removeprefix(f"{part}/") for n in available if n.startswith(f"{part}/")]
        wanted += [f"{part}/{n}" for n in ("config.json", *choose_weights(inside, part, variant))]
    for tokenizer in ("tokenizer", "tokenizer_2"):
        wanted += [f"{tokenizer}/{n}" for n in _TOKENIZER_FILES + _TOKENIZER_OPTIONS]
    return wanted


def local_folder(name: str) -> pathlib.Path:
    """The folder that a model's name means, if it is one: an embedded model's, or a path."""
    return _EMBEDDED.get(name) or pathlib.Path(name).expanduser()


def _fetch_remote(
    name: str, cache_dir: Any, wanted: Callable[[Collection[str]], Collection[str]]
) -> pathlib.Path:
    """A copy on this machine of the files that are `wanted` of a folder on Google Cloud Storage.

    It is kept; a folder that has changed since is copied again.

    Raises:
      UserError: if there are none or they cannot be read.
    """
    root = open_path(name)
    try:
        files = [file for pattern in ("*", "*/*") for file in root.glob(pattern)]
        available = {file.relative_to(root).as_posix(): file for file in files}
        chosen = {path: available[path] for path in wanted(available) if path in available}
        stats = {path: file.stat() for path, file in chosen.items()}
    except Exception as error:  # gcsfs and Google's authentication raise kinds of their own
        raise UserError(f"model {name!r} cannot be read: {error}") from error
    if not chosen:
        raise UserError(f"model {name!r}: no such folder, or none with a model's files.")
    state = [name, *((path, stat.length, stat.mtime) for path, stat in sorted(stats.items()))]
    default_cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    cache = pathlib.Path(cache_dir or default_cache / "respodiff_jax" / "models")
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]
    with WeakFileLock(folder.with_suffix(".lock")):  # of the processes of a host one copies
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as partial:
                for path, file in chosen.items():
                    copy = pathlib.Path(partial, "model", path)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    with file.open("rb") as source, copy.open("wb") as target:
                        shutil.copyfileobj(source, target, 1 << 26)
                pathlib.Path(partial, "model").replace(folder)
    return folder


def _find_folder(
    name: str,
    revision: str | None,
    cache_dir: Any,
    wanted: Callable[[Collection[str]], Collection[str]],
) -> tuple[pathlib.Path, str | None]:
    """A local folder, a remote one's copy, or a hub model's in the cache and its commit."""
    folder = local_folder(name)
    if is_remote(name) or folder.is_dir():
        if revision is not None:
            raise UserError(
                f"revision={revision!r} applies to hub models, but {name!r} is a folder."
            )
        return _fetch_remote(name, cache_dir, wanted) if is_remote(name) else folder, None
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise UserError(f"model {name!r}: no such folder, and not a hub id like 'owner/model'.")
    folder = _snapshot(name, revision, cache_dir, wanted)
    return folder, folder.name


def _read_json(file: pathlib.Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}.") from error


def find_pipeline(
    name: str, *, revision: str | None = None, variant: str | None = None, cache_dir: Any = None
) -> PipelineFiles:
    """Finds every file of a Stable Diffusion pipeline, fetching from the hub what is not there.

    Raises:
      UserError: if there is no such model, it is of another kind, or files are missing; names all
        of them.
    """
    folder, commit = _find_folder(
        name, revision, cache_dir, lambda available: _pipeline_files(available, variant)
    )
    if not (folder / _INDEX).is_file():
        raise UserError(f"{name}: not a diffusers pipeline, {_INDEX} is missing in {folder}.")
    index = _read_json(folder / _INDEX)
    if "unet" not in index or not (index.get("text_encoder") or [None])[0]:
        raise UserError(
            f"{name}: a {index.get('_class_name')} without a unet and a text_encoder; expected a "
            "Stable Diffusion 1.x, 2.x or XL base model."
        )
    parts = _parts(index)
    missing, weights = [], {}
    for part in parts:
        if not (folder / part / "config.json").is_file():
            missing.append(f"{part}/config.json")
        inside = [f.name for f in (folder / part).glob("*")]
        chosen = choose_weights(inside, part, variant)
        if chosen and chosen[0].endswith(".json"):
            chosen = read_index(folder / part / chosen[0])
            missing += [f"{part}/{shard}" for shard in chosen if shard not in inside]
        if not chosen:
            missing.append(_no_weights(part, inside, variant))
        weights[part] = [folder / part / n for n in chosen]
    tokenizers = [folder / p.replace("text_encoder", "tokenizer") for p in parts[2:]]
    missing += [
        f"{t.name}/{n}" for t in tokenizers for n in _TOKENIZER_FILES if not (t / n).is_file()
    ]
    if not (folder / _SCHEDULER).is_file():
        missing.append(_SCHEDULER)
    if missing:
        raise UserError(
            f"{name}: the model is incomplete in {folder}; missing: {'; '.join(missing)}."
        )
    return PipelineFiles(
        name=name,
        revision=commit,
        index=index,
        configs={part: _read_json(folder / part / "config.json") for part in parts},
        weights=weights,
        tokenizers=tokenizers,
        scheduler_config=_read_json(folder / _SCHEDULER),
    )


def find_clip(
    name: str, *, revision: str | None = None, cache_dir: Any = None
) -> tuple[pathlib.Path, str | None, list[pathlib.Path]]:
    """Finds a CLIP's folder, its commit on the hub (None for a folder) and its weight files.

    Raises:
      UserError: if there is no such model or files are missing; names all of them.
    """

    def wanted(available):
        files = (*_CLIP_CONFIGS, *_TOKENIZER_FILES, *_TOKENIZER_OPTIONS)
        return [*files, *choose_weights(available, "text_encoder", None)]

    folder, commit = _find_folder(name, revision, cache_dir, wanted)
    inside = [file.name for file in folder.iterdir()]
    chosen = choose_weights(inside, "text_encoder", None)
    if chosen and chosen[0].endswith(".json"):
        chosen = read_index(folder / chosen[0])
    missing = sorted({*_CLIP_CONFIGS, *_TOKENIZER_FILES, *chosen} - set(inside))
    if not chosen:
        missing.append("model.safetensors or flax_model.msgpack")
    if missing:
        raise UserError(
            f"{name}: the CLIP is incomplete in {folder}; missing: {', '.join(missing)}."
        )
    return folder, commit, [folder / file for file in chosen]


def _no_weights(part: str, inside: Collection[str], variant: str | None) -> str:
    stem = _STEMS["transformers" if part.startswith("text_encoder") else "diffusers"][0]
    wanted = f"{part}/{stem}{f'.{variant}' if variant else ''}.safetensors"
    pickled = sorted(n for n in inside if n.endswith(".bin"))
    others = sorted(n for n in inside if n.endswith((".safetensors", ".msgpack")))
    if others:
        return f"{wanted} (there is {', '.join(others)}; choose another variant)"
    if pickled:
        return (
            f"{wanted} (there is only the pickled {pickled[0]}; convert it where torch is "
            "installed: DiffusionPipeline.from_pretrained(model).save_pretrained(folder))"
        )
    return wanted
