"""`respodiff compile`: what a job costs on a TPU, found by compiling it where there is none.

`topologies.py` knows the chips, `programs.py` lowers what `train` and `generate` run, from shapes
alone, `hlo.py` reads collectives, kernels and memory traffic of a compiled program, `analysis.py`
makes numbers of it, and `report.py` shows them; `run.py` is the job.
"""

from respodiff_jax.compiling.run import Job, compile_jobs

__all__ = ["Job", "compile_jobs"]
