"""Distances to reference pictures: always of CLIP features, of Inception's with clean-fid."""

import importlib.metadata
import sys
import types

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from respodiff_jax import cli
from respodiff_jax.backbone import load_clip
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation import inception, load_results, quality
from respodiff_jax.evaluation.metrics import frechet_contributions, kernel_contributions


def frechet_distance(x, y):
    return frechet_contributions(x, y).mean()


def kernel_distance(x, y):
    return kernel_contributions(x, y).mean()


@pytest.fixture
def folders(tmp_path):
    """Pictures with prompts, and references of several sizes."""
    rng = np.random.default_rng(0)
    for name, sizes in {"made": [24] * 5, "real": [24, 40, 32]}.items():
        (tmp_path / name).mkdir()
        for number, size in enumerate(sizes):
            pixels = rng.integers(0, 256, (size, 24, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    lines = [f"{number}.png,a picture" for number in range(5)]
    (tmp_path / "made" / "metadata.csv").write_text("\n".join(["file,prompt", *lines]))
    return tmp_path / "made", tmp_path / "real"


def _clean_fid(monkeypatch, tmp_path):
    """A stand-in for clean-fid with the mean colours as features."""
    calls = []

    class InceptionV3W:
        def __init__(self, path, download):
            calls.append((path, download))

        def eval(self):
            return self

    def get_files_features(files, model, **options):
        calls.append(options)
        means = [np.asarray(Image.open(file)).mean((0, 1)) for file in files]
        return np.array(means, np.float32)

    package = types.ModuleType("cleanfid")
    package.fid = types.ModuleType("cleanfid.fid")
    package.fid.get_files_features = get_files_features
    package.inception_torchscript = types.ModuleType("cleanfid.inception_torchscript")
    package.inception_torchscript.InceptionV3W = InceptionV3W
    for module in (package, package.fid, package.inception_torchscript):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda n: "0.1.35" if n == "clean-fid" else version(n)
    )
    weights = tmp_path / "inception-2015-12-05.pt"
    weights.write_bytes(b"weights")
    monkeypatch.setattr(inception, "WEIGHTS", weights)
    return calls


@pytest.fixture
def fid(monkeypatch):
    """clean-fid itself, with a stand-in for torchvision, which imports only beside its own torch.

    clean-fid uses a function that moves the colours to the front, and bases of an Inception that
    these tests do not use.
    """

    class ToTensor:
        def __call__(self, pixels):
            assert pixels.dtype == np.float32
            return torch.from_numpy(pixels.transpose(2, 0, 1))

    torchvision = types.ModuleType("torchvision")
    torchvision.transforms = types.SimpleNamespace(ToTensor=ToTensor)
    bases = dict.fromkeys(("InceptionA", "InceptionC", "InceptionE"), object)
    torchvision.models = types.SimpleNamespace(inception=types.SimpleNamespace(**bases))
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    yield pytest.importorskip("cleanfid.fid", reason="needs pip install --no-deps clean-fid")
    for name in [name for name in sys.modules if name.partition(".")[0] == "cleanfid"]:
        del sys.modules[name]


def test_distances_equal_clean_fid(fid, monkeypatch):
    # The argument `disp` that clean-fid gives is deprecated in scipy.
    root = types.SimpleNamespace(sqrtm=lambda matrix, disp: (scipy.linalg.sqrtm(matrix), None))
    monkeypatch.setattr(fid, "linalg", root)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
    y = rng.normal(size=(300, 12)) + 0.5
    assert frechet_distance(x, y) == pytest.approx(fid.fid_from_feats(x, y), rel=1e-8)
    # Theirs is a mean over subsets; with sets of equal size there is only one subset.
    theirs = fid.kernel_distance(x, y[:200], num_subsets=1)
    assert kernel_distance(x, y[:200]) == pytest.approx(theirs, rel=1e-8)


class _Features(torch.nn.Module):
    """2048 features of pictures of 299 x 299 pixels, as TorchScript."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(3 * 16 * 16, 2048)

    def forward(self, x):
        x = torch.nn.functional.adaptive_avg_pool2d(x, (16, 16))
        return self.project(x.flatten(1)).tanh()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_fid_and_kid_equal_clean_fid_on_files(fid, folders, clip_folder, tmp_path, monkeypatch):
    """Only the published weights are replaced, by a small random network."""
    torch.manual_seed(0)
    network = torch.nn.Module()
    network.layers = _Features()
    weights = tmp_path / "weights" / "inception-2015-12-05.pt"
    weights.parent.mkdir()
    torch.jit.script(network).save(weights)
    monkeypatch.setattr(inception, "WEIGHTS", weights)
    made, real = folders
    argv = ["evaluate", "quality", "--images", str(made), "--reference", str(real)]
    assert cli.main([*argv, "--clip", str(clip_folder), "--out", str(tmp_path / "out")]) == 0
    results = load_results(tmp_path / "out")
    layers = network.layers.eval()

    class Model(torch.nn.Module):
        def forward(self, x):
            return layers((x - 128) / 128)

    theirs = [
        fid.get_folder_features(
            str(folder), Model(), num_workers=0, device=torch.device("cpu"), verbose=False
        )
        for folder in folders
    ]
    assert results.value("fid", "given") == pytest.approx(frechet_distance(*theirs))
    assert results.value("kid", "given") == pytest.approx(kernel_distance(*theirs))
    assert results.scored["inception"]["version"] == importlib.metadata.version("clean-fid")


def test_command_without_clean_fid_measures_no_fid_and_says_so(
    folders, clip_folder, tmp_path, monkeypatch
):
    made, real = folders
    monkeypatch.setattr(inception, "WEIGHTS", tmp_path / "none.pt")
    argv = ["evaluate", "quality", "--images", str(made), "--reference", str(real)]
    argv += ["--clip", str(clip_folder), "--out", str(tmp_path / "out")]
    with pytest.warns(UserWarning, match="no FID and no KID: clean-fid's Inception weights"):
        assert cli.main(argv) == 0
    results = load_results(tmp_path / "out")
    (note,) = results.warnings
    assert "none.pt" in note and "another scale" in note
    assert {m.metric for m in results.measurements} == {
        "clip_score",
        "clip_frechet_distance",
        "clip_kernel_distance",
    }
    assert results.scored["reference"] == {"folder": str(real), "pictures": 3}
    assert results.scored["inception"] is None
    clip = load_clip(clip_folder)
    features = [
        clip.image_features([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])
        for folder in folders
    ]
    found = results.value("clip_frechet_distance", "given")
    assert found == pytest.approx(frechet_distance(*features), abs=1e-6)


def test_command_with_clean_fid_also_measures_fid(folders, clip_folder, tmp_path, monkeypatch):
    made, real = folders
    calls = _clean_fid(monkeypatch, tmp_path)
    argv = ["evaluate", "quality", "--images", str(made), "--reference", str(real)]
    assert cli.main([*argv, "--clip", str(clip_folder), "--out", str(tmp_path / "out")]) == 0
    results = load_results(tmp_path / "out")
    assert results.warnings == () and calls[0] == (str(tmp_path), False)
    assert len(calls) == 3 and all(call["mode"] == "clean" for call in calls[1:])
    means = [
        np.array([np.asarray(Image.open(f)).mean((0, 1)) for f in sorted(folder.glob("*.png"))])
        for folder in folders
    ]
    assert results.value("fid", "given") == pytest.approx(frechet_distance(*means), rel=1e-4)
    assert results.value("kid", "given") == pytest.approx(kernel_distance(*means), rel=1e-4)
    assert results.value("clip_frechet_distance", "given") < results.value("fid", "given")
    assert results.scored["inception"]["version"] == "0.1.35"
    (kid,) = results.find("kid")
    assert kid.interval[0] < kid.value < kid.interval[1]


def test_broken_clean_fid_is_explained(monkeypatch, tmp_path):
    _clean_fid(monkeypatch, tmp_path)
    monkeypatch.setitem(sys.modules, "cleanfid", None)
    with pytest.raises(UserError, match=r"cannot be used .*\.\[eval\]"):
        inception.Inception()


def test_bad_reference_folders_are_explained(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        quality.open_reference(tmp_path / "none")
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(UserError, match="one picture, expected two or more"):
        quality.open_reference(tmp_path)
    (tmp_path / "two.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1 unreadable pictures: .*two\.png"):
        quality.open_reference(tmp_path)
