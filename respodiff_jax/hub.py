"""Adapters on the Hugging Face hub."""

import os
import pathlib

import huggingface_hub

from respodiff_jax.adapter_card import CARD_FILE, GRID_FILE, TORCH_FILE
from respodiff_jax.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from respodiff_jax.adapters import load_adapter

_FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, GRID_FILE, TORCH_FILE)


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
      revision: branch to commit to, instead of the main one.
      private: of a repository that is made.

    Returns:
      The address of the commit.

    Raises:
      ValueError: when the directory does not hold a whole adapter, or the hub refuses.
    """
    load_adapter(directory)
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            revision=revision,
            allow_patterns=list(_FILES),
            commit_message="RespoDiff adapter",
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} cannot be pushed to {repo_id}: {error}") from error
    return commit.commit_url


def fetch(repo_id: str, revision: str | None = None) -> pathlib.Path:
    """The folder of the Hugging Face cache with an adapter, downloaded if it is not there.

    Raises:
      ValueError: when there is none, or no network.
    """
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=revision, allow_patterns=list(_FILES)
            )
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"adapter {repo_id}: no such folder, and it cannot be fetched from the hub: {error}"
        ) from error
