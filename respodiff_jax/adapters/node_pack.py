"""ComfyUI's node pack: the nodes, the PyTorch file they need, and exported adapters."""

import pathlib

from respodiff_jax.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from respodiff_jax.errors import UserError
from respodiff_jax.storage import PathLike, open_path, write_whole

# As ComfyUI finds them -> in this package.
_CODE = {"__init__.py": "comfyui.py", "torch_adapter.py": "torch_adapter.py"}


def check_node_pack(directory: PathLike) -> None:
    """Refuses a folder with files that are not a node pack of this package.

    Raises:
      UserError: if another program's files would be replaced.
    """
    folder = open_path(directory)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    first = folder / "__init__.py"
    if not first.is_file() or "RespoDiffLoadAdapter" not in first.read_text():
        raise UserError(
            f"`comfyui` {directory} has other files; name a new folder of custom_nodes, such as"
            " ComfyUI/custom_nodes/respodiff"
        )


def write_node_pack(directory: PathLike, adapter: PathLike) -> None:
    """Writes the node pack, or updates it, and adds an adapter to those that it has.

    Args:
      directory: a folder of ComfyUI's `custom_nodes`, made if it does not exist.
      adapter: an adapter directory, whose name the node shows; an older adapter of this name is
        replaced.

    Raises:
      UserError: if the folder has other files.
    """
    check_node_pack(directory)
    folder, source = open_path(directory), open_path(adapter)
    package = pathlib.Path(__file__).parents[1]
    contents = {name: (package / ours).read_bytes() for name, ours in _CODE.items()}
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        contents[f"adapters/{pathlib.PurePath(source).name}/{name}"] = (source / name).read_bytes()
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
