"""`respodiff export --comfyui`: a folder that ComfyUI loads as it is."""

import subprocess
import sys

import pytest
from test_adapters import MAN, VIOLENCE, WOMAN, make_adapter

from respodiff_jax import cli
from respodiff_jax.adapters import save_adapter
from respodiff_jax.adapters.card import export
from respodiff_jax.errors import UserError

# Imports the pack by its path, as ComfyUI does.
LOAD = """
import importlib.util, sys
for name in ("jax", "flax", "respodiff_jax", "huggingface_hub", "diffusers", "transformers"):
    sys.modules[name] = None  # importing it fails
spec = importlib.util.spec_from_file_location("a pack", "respodiff/__init__.py")
pack = sys.modules["a pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
load = pack.NODE_CLASS_MAPPINGS["RespoDiffLoadAdapter"]
[names] = load.INPUT_TYPES()["required"]["adapter"]
print(names, [load().run(name, False)[1] for name in names])
"""


def test_pack_works_alone_and_collects_adapters(tmp_path):
    save_adapter(make_adapter("mlp", (WOMAN, MAN)), tmp_path / "run")
    save_adapter(make_adapter("conv", (VIOLENCE,)), tmp_path / "other")
    pack = tmp_path / "respodiff"
    command = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "gender")]
    for _ in range(2):
        assert cli.main([*command, "--comfyui", str(pack)]) == 0
    assert (
        cli.main(
            [
                "export",
                str(tmp_path / "other"),
                "--out",
                str(tmp_path / "safety"),
                "--comfyui",
                str(pack),
            ]
        )
        == 0
    )
    result = subprocess.run(
        [sys.executable, "-c", LOAD], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    shown = "['gender', 'safety'] ['gender: a woman, a man', 'safety: anti-violence']"
    assert result.stdout.strip() == shown


def test_folder_of_another_program_is_refused_and_nothing_is_written(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}")
    with pytest.raises(UserError, match=r"`comfyui` .*theirs has other files; name a new folder"):
        export(make_adapter(), tmp_path / "out", comfyui=tmp_path / "theirs")
    assert not (tmp_path / "out").exists()
