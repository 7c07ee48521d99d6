"""Adapters on the Hugging Face hub."""

import os
import pathlib

import huggingface_hub

from respodiff_jax.adapters.adapter import load_adapter
from respodiff_jax.adapters.card import CARD_FILE, GRID_FILE, TORCH_FILE, torch_module
from respodiff_jax.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from respodiff_jax.errors import UserError
from respodiff_jax.storage import local_path

_FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, GRID_FILE, TORCH_FILE)
_PNG = b"\x89PNG\r\n\x1a\n"


def push(
    directory: str | os.PathLike,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool = False,
) -> str:
    """Uploads an adapter directory, in one commit; the repository is made if it does not exist.

    Args:
      directory: as `respodiff export` wrote it; other files in it stay where they are.
      repo_id: "owner/name".
      revision: branch to commit to, made if it does not exist, instead of the main one.
      private: of a repository that is made.

    Returns:
      The address of the commit.

    Raises:
      UserError: when the directory does not hold a whole adapter, holds a picture or a
        torch_adapter.py that `respodiff export` did not write, or the hub refuses.
    """
    folder = local_path(directory, "adapter")
    load_adapter(folder)
    _check_what_others_run_and_see(folder)
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
        raise UserError(f"{directory} cannot be pushed to {repo_id}: {error}") from error
    return commit.commit_url


def fetch(repo_id: str, revision: str | None = None) -> pathlib.Path:
    """The folder of the Hugging Face cache with an adapter, downloaded if it is not there.

    Raises:
      UserError: when there is none, or no network.
    """
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=revision, allow_patterns=list(_FILES)
            )
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"adapter {repo_id}: no such folder, and it cannot be fetched from the hub: {error}"
        ) from error


def _check_what_others_run_and_see(folder: pathlib.Path) -> None:
    code, grid = folder / TORCH_FILE, folder / GRID_FILE
    if not code.is_file() or code.read_bytes() != torch_module():
        raise UserError(
            f"{code} is not this version's, and others will run it: write the directory anew with"
            " `respodiff export`"
        )
    if grid.is_symlink() or (grid.exists() and not grid.read_bytes().startswith(_PNG)):
        raise UserError(f"{grid} is no PNG file: take it away, or export the directory anew")
