"""`respodiff compile`: what a program costs on a TPU, found by compiling it without one.

`topologies.py` knows the chips, `programs.py` lowers what `train` and `generate` run from shapes
alone, `hlo.py` reads collectives, kernels and memory traffic from a compiled program, `analysis.py`
computes its cost, `ahead_of_time.py` compiles configs for topologies and keeps the results, and
`report.py` prints them.
"""

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
