"""Adapters on the Hugging Face hub."""

import pathlib

import huggingface_hub

from respodiff_jax.adapters.adapter import load_adapter
from respodiff_jax.adapters.card import CARD_FILE, GRID_FILE, TORCH_FILE, torch_module
from respodiff_jax.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from respodiff_jax.errors import UserError, shortened
from respodiff_jax.storage import PathLike, local_path

_FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, GRID_FILE, TORCH_FILE)
_PNG = b"\x89PNG\r\n\x1a\n"


def push(
    directory: PathLike,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool = False,
) -> str:
    """Uploads an adapter directory in one commit.

    Args:
      directory: what `respodiff export` wrote; other files in it are not uploaded.
      repo_id: "owner/name"; the repository is made if it does not exist.
      revision: branch to commit to, made if it does not exist; None is the main branch.
      private: whether a new repository is private.

    Returns:
      The address of the commit.

    Raises:
      UserError: if the adapter is not whole, if `torch_adapter.py` or the picture is not what
        `respodiff export` writes, or if the hub refuses.
    """
    folder = local_path(directory, "adapter")
    load_adapter(folder)
    _check_code_and_picture(folder)
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            revision=revision,
            allow_patterns=list(_FILES),
            commit_message="RespoDiff adapter",
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory} cannot be pushed to {repo_id}: {shortened(error, 200)}"
        ) from error
    return commit.commit_url


def fetch(repo_id: str, revision: str | None = None) -> pathlib.Path:
    """Downloads an adapter from the hub, unless it is cached.

    Returns:
      Its folder in the Hugging Face cache.

    Raises:
      UserError: if there is no such repository or revision, or no network.
    """
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=revision, allow_patterns=list(_FILES)
            )
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"adapter {repo_id}: no such folder, and it cannot be fetched from the hub:"
            f" {shortened(error, 160)} Check the name, or give a folder"
        ) from error


def _check_code_and_picture(folder: pathlib.Path) -> None:
    """Checks the files that others will run and look at."""
    code, grid = folder / TORCH_FILE, folder / GRID_FILE
    if not code.is_file() or code.read_bytes() != torch_module():
        raise UserError(
            f"{code} differs from this version's, and others will run it: write the directory again"
            " with `respodiff export`"
        )
    if grid.is_symlink() or (grid.exists() and not grid.read_bytes().startswith(_PNG)):
        raise UserError(f"{grid} is not a PNG file: remove it, or export the directory again")
