"""Test settings: eight simulated CPU devices, no network, strict JAX."""

import gc
import os
import tempfile

# This must come before JAX is imported. Compiling is most of the work and many tests compile the
# same step, so they share a cache of compiled programs, also with the other workers of `pytest -n`.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["USE_TF"] = "0"

import annotations
import jax
import pytest
import torch

annotations.install()
# Tracing makes millions of objects that stay; with Python's thresholds, looking for garbage among
# them takes 15 % of the time and more.
gc.set_threshold(100_000, 20, 20)

# In half of the time; the numbers differ in the last bits from those of a training run.
SHORT_COMPILATION = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_numpy_rank_promotion", "raise")
torch.set_num_threads(1)  # more threads would wait for those of the simulated devices


def pytest_configure(config):
    if "not slow" in config.option.markexpr:  # small models: compiling takes longer than running
        os.environ["XLA_FLAGS"] += f" {SHORT_COMPILATION}"
    if config.option.markexpr == "gpu":
        jax.config.update("jax_platforms", "cuda,cpu")


def _saved(pipeline, folder):
    pipeline.save_pretrained(folder / "model", safe_serialization=True)
    return folder / "model"


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    """A diffusers folder like SD 1.4, saved by PyTorch."""
    from pipelines import stable_diffusion

    folder = tmp_path_factory.mktemp("sd")
    return _saved(stable_diffusion(folder), folder)


@pytest.fixture(scope="session")
def sd_v_folder(tmp_path_factory):
    """A diffusers folder like SD 2.1 (v-prediction), saved by PyTorch."""
    from pipelines import stable_diffusion

    folder = tmp_path_factory.mktemp("sd_v")
    return _saved(stable_diffusion(folder, v_prediction=True), folder)


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    """A diffusers folder like SDXL, saved by PyTorch."""
    from pipelines import stable_diffusion_xl

    folder = tmp_path_factory.mktemp("sdxl")
    return _saved(stable_diffusion_xl(folder), folder)


@pytest.fixture(scope="session")
def emoji_folder():
    """The folder of the model that comes with the package."""
    from respodiff_jax.backbone import local_folder

    return local_folder("emoji-world")


@pytest.fixture(scope="session")
def tiny_backbone():
    """A Stable Diffusion with random weights, 16 × 16 pixels."""
    from respodiff_jax.backbone import random_backbone

    return random_backbone("tiny", dtype="float32")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A small CLIP with random weights that resizes and crops, saved by PyTorch."""
    from pipelines import clip

    return clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def suite(clip_folder):
    """An evaluation suite of two subjects and two attributes."""
    from respodiff_jax.evaluation.suites import Suite

    return Suite(
        name="test",
        clip=str(clip_folder),
        subjects=("cook", "artist"),
        templates=("a photo of {a_subject}", "image of {subject}"),
        attributes={
            "gender": {"woman": ("a woman",), "man": ("a man", "a male person")},
            "age": {"young": ("a young person",), "old": ("an old person",)},
        },
        subject_classes={"cook": ("a cook",), "artist": ("an artist",), "judge": ("a judge",)},
        unsafe_classes={"safe": ("a safe scene",), "violence": ("violence",)},
        safety_prompts=(("a scene", "scene"), ("a street", "scene, street")),
        captions=("a cat", "a dog"),
    )
