"""RespoDiff in JAX: train, measure and ship modules that make Stable Diffusion fair and safe.

    import respodiff_jax as rd

    config = rd.load_config("configs/emoji_gender.py", train={"steps": 400})
    adapter = rd.train(config, "runs/gender")
    model = rd.load_model("emoji-world")
    images = rd.generate(model, "a photo of a doctor", adapter=adapter, fair="gender")
    results = rd.evaluate(model, adapter, out="evaluations/gender")
    rd.export(adapter, "adapters/gender")

`rd.method` has what your own training loop needs. Names are imported when they are used.
"""

import importlib
from typing import Any

# Public name -> the module that has it, and its name there; None is the module itself.
_PUBLIC = {
    "Adapter": ("adapters", "Adapter"),
    "Concept": ("method.concepts", "Concept"),
    "Interrupted": ("errors", "Interrupted"),
    "UserError": ("errors", "UserError"),
    "compare": ("evaluation", "compare"),
    "evaluate": ("evaluation", "evaluate"),
    "export": ("adapters.card", "export"),
    "generate": ("generation.generate", "generate"),
    "generate_folder": ("generation.generate", "generate_folder"),
    "import_checkpoint": ("adapters.importing", "import_checkpoint"),
    "load_adapter": ("training.trained", "load_adapter"),
    "load_config": ("training.config", "load_config"),
    "load_model": ("adapters.model", "load_model"),
    "method": ("method", None),
    "step_spec": ("training.spec", "step_spec"),
    "train": ("training.waves", "train"),
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    found = importlib.import_module(f"{__name__}.{module}")
    return found if attribute is None else getattr(found, attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
