"""The environment of a process that compiles for TPUs without one."""

import os


def set_environment() -> None:
    """Sets the environment variables; call this before JAX or huggingface_hub is imported."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",  # JAX does not look for a TPU
        "TPU_SKIP_MDS_QUERY": "1",  # nor libtpu for a metadata server.
        # libtpu warns if host and chips are unknown; any value silences it.
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "HF_HUB_OFFLINE": "1",  # Shapes need no weights.
    }
