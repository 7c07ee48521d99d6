"""Finds a model's files: in a folder, on Google Cloud Storage or in the Hugging Face cache."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Collection
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock

from respodiff_jax.backbone.single_file import SINGLE_FILES, converted, models_cache
from respodiff_jax.errors import UserError, shortened
from respodiff_jax.storage import MAX_TEXT_BYTES, check_regular, is_remote, local_path, open_path

_INDEX = "model_index.json"
_SCHEDULER = "scheduler/scheduler_config.json"
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_TOKENIZER_FILES = ("vocab.json", "merges.txt")
_FAST_TOKENIZER = "tokenizer.json"  # newer versions of transformers save this file alone
_TOKENIZER_OPTIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_CLIP_CONFIGS = ("config.json", "preprocessor_config.json")
# Models that come with the package.
_BUNDLED = {"emoji-world": pathlib.Path(__file__).parent.parent / "emoji" / "model"}

# Chooses the files to fetch from the paths of all of a model's files.
Choose = Callable[[Collection[str]], Collection[str]]


@dataclasses.dataclass(frozen=True)
class PipelineFiles:
    """The complete files of a pipeline: JSON files are read, weight files are paths.

    The parts are "unet", "vae", "text_encoder" and, for SDXL, "text_encoder_2". `revision` is the
    commit of a hub model, else None; `index` the contents of model_index.json; `tokenizers` has
    the folder of each text encoder's tokenizer.
    """

    revision: str | None
    index: dict[str, Any]
    configs: dict[str, dict[str, Any]]
    weights: dict[str, list[pathlib.Path]]
    tokenizers: list[pathlib.Path]
    scheduler_config: dict[str, Any]


@functools.lru_cache
def sha256(*files: pathlib.Path) -> str:
    """The hexadecimal digest of files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file; raises `UserError` if the file holds anything else."""
    check_regular(file, "file", MAX_TEXT_BYTES)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}; download or copy it again") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{file} holds {content!r:.100}, expected a JSON object; download or copy it again"
        )
    return content


def local_folder(name: str) -> pathlib.Path:
    """The folder of a model: that of a bundled model ("emoji-world"), or `name` as a path."""
    return _BUNDLED.get(name) or pathlib.Path(name).expanduser()


def _stems(part: str) -> tuple[str, str]:
    """Names of a part's weight files without extension, of PyTorch and of Flax."""
    if part in ("unet", "vae"):
        return "diffusion_pytorch_model", "diffusion_flax_model"
    return "model", "flax_model"


def _choose_weights(names: Collection[str], part: str, variant: str | None) -> list[str]:
    """Which of a part's files to read: one file, or an index followed by its shards, or none."""
    # Safetensors come before msgpack. A part without the `variant` is read from its plain files, as
    # diffusers does; without a `variant` the plain files come before fp16.
    stem, flax_stem = _stems(part)
    for v in (variant, None) if variant else (None, "fp16"):
        infix = f".{v}" if v else ""
        if f"{stem}{infix}.safetensors" in names:
            return [f"{stem}{infix}.safetensors"]
        index = f"{stem}.safetensors.index{infix}.json"
        if index in names:
            # Both orders of variant and number are in use.
            v, number = re.escape(infix), r"-\d+-of-\d+"
            shard = re.compile(f"{stem}({v}{number}|{number}{v})\\.safetensors")
            return [index, *sorted(n for n in names if shard.fullmatch(n))]
    return [f"{flax_stem}.msgpack"] if f"{flax_stem}.msgpack" in names else []


def _find_weights(
    folder: pathlib.Path, part: str, variant: str | None
) -> tuple[list[pathlib.Path], list[str]]:
    """The weight files in a part's folder, and the names of those that are missing."""
    inside = [file.name for file in folder.glob("*")]
    chosen = _choose_weights(inside, part, variant)
    if not chosen:
        return [], [_missing_weights(inside, part, variant)]
    if chosen[0].endswith(".json"):
        chosen = _read_shards(folder / chosen[0])
    return [folder / name for name in chosen], [name for name in chosen if name not in inside]


def _read_shards(index: pathlib.Path) -> list[str]:
    """The shards that a *.safetensors.index.json names, sorted."""
    shard_of = read_json(index).get("weight_map")
    shards = list(shard_of.values()) if isinstance(shard_of, dict) else []
    if not shards or not all(isinstance(shard, str) for shard in shards):
        raise UserError(
            f"{index} is not an index of safetensors shards: weight_map is {shard_of!r:.100},"
            " expected an object of file names; download or copy it again"
        )
    return sorted(set(shards))


def _missing_weights(inside: Collection[str], part: str, variant: str | None) -> str:
    """The name of a part's absent weight file, and the reason if the folder suggests one."""
    wanted = f"{_stems(part)[0]}{f'.{variant}' if variant else ''}.safetensors"
    if others := sorted(n for n in inside if n.endswith((".safetensors", ".msgpack"))):
        return f"{wanted} (there is {', '.join(others)}; choose another variant)"
    if pickled := sorted(n for n in inside if n.endswith(".bin")):
        loader = "CLIPModel" if part == "clip" else "DiffusionPipeline"
        return (
            f"{wanted} (there is only the pickled {pickled[0]}; convert it where torch is "
            f"installed: {loader}.from_pretrained(model).save_pretrained(folder))"
        )
    return wanted


def _missing_tokenizer(folder: pathlib.Path) -> list[str]:
    """The missing files of a tokenizer, which needs one file or two."""
    missing = [file for file in _TOKENIZER_FILES if not (folder / file).is_file()]
    return [] if (folder / _FAST_TOKENIZER).is_file() else missing


def _find_folder(
    name: str, revision: str | None, cache_dir: Any, choose: Choose
) -> tuple[pathlib.Path, str | None]:
    """The local folder with a model's files and, for a hub model, the commit; fetches the files."""
    folder = local_folder(name)
    if is_remote(name) or folder.is_dir():
        if revision is not None:
            raise UserError(
                f"`revision` is {revision!r}, which applies to hub models, but {name!r} is a folder"
            )
        return _copy_remote(name, cache_dir, choose) if is_remote(name) else folder, None
    if address := re.match(r"(?:https?://)?(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+)", name):
        raise UserError(f"model {name!r} is a web address; give the hub id {address[1]!r}")
    if folder.is_file() or folder.suffix in SINGLE_FILES:
        wrong = "is a file, expected a folder" if folder.is_file() else "no such file"
        raise UserError(f"model {name!r}: {wrong}")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise UserError(f"model {name!r}: no such folder, and not a hub id like 'owner/model'")
    folder = _download(name, revision, cache_dir, choose)
    return folder, folder.name


def _download(name: str, revision: str | None, cache_dir: Any, choose: Choose) -> pathlib.Path:
    """A hub model's folder in the cache; without a network, as an earlier download left it."""
    available, reason = None, "the hub is not asked in offline mode (HF_HUB_OFFLINE)"
    if not constants.HF_HUB_OFFLINE:
        try:
            available = huggingface_hub.HfApi().list_repo_files(name, revision=revision)
        except (OSError, ValueError) as error:  # no network, model, revision, permission; bad id
            reason = str(error)
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=list(choose(available or ())),
            local_files_only=available is None,
        )
    except (OSError, ValueError) as error:
        at = f" at revision {revision!r}" if revision else ""
        why = shortened(reason if available is None else error, 120)
        raise UserError(
            f"model {name!r}{at} is neither a folder nor in the Hugging Face cache, and cannot be "
            f"fetched: {why} Give a folder, check the name, or download the model first where "
            "there is a network"
        ) from error
    return pathlib.Path(folder)


def _copy_remote(name: str, cache_dir: Any, choose: Choose) -> pathlib.Path:
    """A folder in the cache with a copy from Google Cloud Storage, made again after changes."""
    root = open_path(name)
    try:
        files = [file for pattern in ("*", "*/*") for file in root.glob(pattern)]
    except Exception as error:  # gcsfs and Google's authentication raise many kinds
        raise UserError(f"model {name!r} cannot be read: {error}") from error
    available = {file.relative_to(root).as_posix(): file for file in files}
    chosen = {path: available[path] for path in choose(available) if path in available}
    if not chosen:
        raise UserError(f"model {name!r}: no such folder, or none with a model's files")
    stats = {path: file.stat() for path, file in chosen.items()}
    state = [name, *((path, stat.length, stat.mtime) for path, stat in sorted(stats.items()))]
    cache = models_cache(cache_dir)
    folder = cache / hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]
    with WeakFileLock(folder.with_suffix(".lock")):  # one process of a host copies
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as partial:
                for path, file in chosen.items():
                    copy = pathlib.Path(partial, "model", path)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    with file.open("rb") as source, copy.open("wb") as target:
                        shutil.copyfileobj(source, target, 1 << 26)
                pathlib.Path(partial, "model").replace(folder)
    return folder


def find_pipeline(
    name: str, *, revision: str | None = None, variant: str | None = None, cache_dir: Any = None
) -> PipelineFiles:
    """Finds every file of a Stable Diffusion pipeline; fetches absent ones from the hub.

    Args: as `load_backbone`.

    Raises:
      UserError: if there is no such model, it is of another kind, or files are missing; names every
        missing file.
    """

    def choose(available):
        wanted = [_INDEX, _SCHEDULER]
        for part in ("unet", "vae", *_TEXT_ENCODERS):
            inside = [n.removeprefix(f"{part}/") for n in available if n.startswith(f"{part}/")]
            files = ("config.json", *_choose_weights(inside, part, variant))
            wanted += [f"{part}/{file}" for file in files]
        for tokenizer in ("tokenizer", "tokenizer_2"):
            files = (*_TOKENIZER_FILES, _FAST_TOKENIZER, *_TOKENIZER_OPTIONS)
            wanted += [f"{tokenizer}/{file}" for file in files]
        return wanted

    file = local_folder(name)
    if file.suffix in SINGLE_FILES and is_remote(name):
        local_path(name, "the single file")
    if file.suffix in SINGLE_FILES and file.is_file():
        if revision is not None or variant is not None:
            raise UserError(
                f"`revision` is {revision!r} and `variant` is {variant!r}, expected neither with"
                f" the single file {name!r}"
            )
        folder, commit = converted(file, sha256(file), cache_dir), None
    else:
        folder, commit = _find_folder(name, revision, cache_dir, choose)
    if not (folder / _INDEX).is_file():
        single = sorted(f.name for f in folder.glob("*") if f.suffix in SINGLE_FILES)
        also = f"; give the path of the single file in it: {single[0]}" if single else ""
        raise UserError(f"{name}: not a diffusers pipeline, {_INDEX} is missing in {folder}{also}")
    index = read_json(folder / _INDEX)
    # An absent part is not listed, or listed as [null, null].
    encoders = [part for part in _TEXT_ENCODERS if index.get(part) not in (None, [None, None])]
    _check_kinds(name, index, encoders)
    parts = ["unet", "vae", *encoders]
    tokenizers = [part.replace("text_encoder", "tokenizer") for part in encoders]
    needed = [_SCHEDULER, *(f"{part}/config.json" for part in parts)]
    missing = [path for path in needed if not (folder / path).is_file()]
    for tokenizer in tokenizers:
        missing += [f"{tokenizer}/{file}" for file in _missing_tokenizer(folder / tokenizer)]
    weights = {}
    for part in parts:
        weights[part], lacking = _find_weights(folder / part, part, variant)
        missing += [f"{part}/{file}" for file in lacking]
    files = [file.name for part in parts for file in weights[part]]
    if variant and not any(f".{variant}" in name for name in files):
        inside = [file.name for file in (folder / "unet").glob("*")]
        missing.append(f"unet/{_missing_weights(inside, 'unet', variant)}")
    if missing:
        raise UserError(
            f"{name}: the model is incomplete in {folder}; missing: {'; '.join(missing)}"
        )
    return PipelineFiles(
        revision=commit,
        index=index,
        configs={part: read_json(folder / part / "config.json") for part in parts},
        weights=weights,
        tokenizers=[folder / tokenizer for tokenizer in tokenizers],
        scheduler_config=read_json(folder / _SCHEDULER),
    )


def _check_kinds(name: str, index: dict[str, Any], encoders: list[str]) -> None:
    """Refuses a pipeline whose parts are not those of Stable Diffusion."""
    kind = index.get("_class_name")
    expected = "expected a Stable Diffusion 1.x, 2.x or XL base model"
    if "unet" not in index or "text_encoder" not in encoders:
        raise UserError(f"{name}: a {kind!s:.60} without a unet and a text_encoder; {expected}")
    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    classes |= dict(zip(encoders, ("CLIPTextModel", "CLIPTextModelWithProjection"), strict=False))
    for part, right in classes.items():
        entry = index.get(part)
        found = entry[-1] if isinstance(entry, list) and entry else None
        if str(found).removeprefix("Flax") != right:
            raise UserError(
                f"{name}: a {kind!s:.60} whose {part} is {found!r:.60}, not {right!r}; {expected}"
            )


def find_clip(name: str) -> tuple[pathlib.Path, str | None, list[pathlib.Path]]:
    """Finds a CLIP's folder, its commit on the hub (None for a folder) and its weight files.

    Raises:
      UserError: if there is no such model or files are missing; names every missing file.
    """

    def choose(available):
        files = (*_CLIP_CONFIGS, *_TOKENIZER_FILES, _FAST_TOKENIZER, *_TOKENIZER_OPTIONS)
        return [*files, *_choose_weights(available, "clip", None)]

    folder, commit = _find_folder(name, None, None, choose)
    weights, lacking = _find_weights(folder, "clip", None)
    missing = [file for file in _CLIP_CONFIGS if not (folder / file).is_file()]
    missing += _missing_tokenizer(folder) + lacking
    if missing:
        raise UserError(
            f"{name}: the CLIP is incomplete in {folder}; missing: {'; '.join(missing)}"
        )
    return folder, commit, weights
