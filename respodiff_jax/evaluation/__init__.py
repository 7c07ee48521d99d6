"""Evaluation of a model, of an adapter on it, or of any folder of pictures.

`evaluate` measures fairness, quality and safety and writes a report; `compare` puts several
evaluations on one page; `load_results` reads what `evaluate` wrote. The names are imported on first
use, so that `compare` needs no JAX.
"""

import importlib

_MODULES = {
    "Results": "results",
    "compare": "report",
    "evaluate": "run",
    "load_results": "results",
}
__all__ = ["Results", "compare", "evaluate", "load_results"]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
