"""`respodiff bench`: speed, FLOPs, memory and compile time, compared with PyTorch in one run.

`benchmark.py` is the entry point; `train.py` and `generate.py` measure, with `measure.py` and
`model.py`; `report.py` holds the result. `torch_side.py` is the PyTorch side, `published.py` runs
its training procedure on a config.
"""
