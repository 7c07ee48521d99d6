"""`respodiff compile`: what a program costs on a TPU, found by compiling it without one.

`environment.py` prepares the process, `topologies.py` knows the chips, `programs.py` lowers what
`train` and `generate` run from shapes alone, `hlo.py` reads collectives, kernels and memory traffic
from a compiled program, `analysis.py` computes its cost, `ahead_of_time.py` compiles configs for
topologies and keeps the results, and `report.py` prints them.

This module imports nothing: `environment.py` has to run before JAX is imported.
"""
