"""The house: which package may import which, and where other frameworks are let in."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "respodiff_jax"
# Each layer imports only from those before it, and from itself.
LAYERS = (
    ("errors",),
    ("storage",),
    ("progress",),
    ("images",),
    ("backbone",),
    ("method",),
    ("adapters",),
    ("generation",),
    ("data",),
    ("training",),
    ("evaluation",),
    ("emoji",),
    ("compiling",),
    ("bench",),
    ("play",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imports(file):
    """Dotted names that a file imports, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if str(file) == "comfyui.py" and node.module == "torch_adapter":
                continue  # the two files are copied together
            assert node.level == 0, f"{file} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(file):
    return file.parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=str)
def test_files_import_only_from_the_layers_below(file):
    layer = layer_of(file)
    own = {name.split(".")[1] for name in imports(file) if name.startswith("respodiff_jax.")}
    if layer in ("__init__", "torch_adapter", "comfyui"):
        assert not own
        return
    above = {name for name in own if RANK.get(name, -1) > RANK[layer]}
    assert not above, f"{file} in layer {layer} imports {sorted(above)}"


def files_that_import(*modules):
    return {str(file) for file in FILES for name in imports(file) if name.split(".")[0] in modules}


def test_only_the_backbone_knows_diffusers_and_the_flax_classes_of_transformers():
    outside = [file for file in FILES if layer_of(file) != "backbone"]
    flax = {
        str(file)
        for file in outside
        for name in imports(file)
        if name.startswith(("diffusers.", "transformers.")) and "Flax" in name
    }
    assert not flax
    # The PyTorch side of the benchmark measures diffusers' own pipelines.
    assert files_that_import("diffusers") & set(map(str, outside)) <= {"bench/torch_side.py"}


def test_torch_is_imported_by_the_pytorch_side_only():
    assert files_that_import("torch") == {
        "adapters/torch_checkpoint.py",
        "backbone/torch_single_file.py",
        "bench/torch_side.py",
        "comfyui.py",
        "torch_adapter.py",
    }
    for file in ("comfyui.py", "torch_adapter.py"):
        assert not {"jax", "flax"} & {name.split(".")[0] for name in imports(file)}


def test_the_method_knows_no_files_and_no_flags():
    files = [file for file in FILES if layer_of(file) == "method"]
    known = {name.split(".")[0] for file in files for name in imports(file)}
    assert not known & {"os", "pathlib", "etils", "absl", "argparse", "ml_collections", "orbax"}


def test_files_have_one_subject():
    """450 lines at most; `torch_adapter.py` is copied beside adapters and stays one file."""
    long = [
        str(file)
        for file in FILES
        if len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) > 450
    ]
    assert long in ([], ["torch_adapter.py"])


def test_no_two_test_files_share_a_name():
    """pytest imports test files by their names alone."""
    names = [path.stem for path in pathlib.Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
