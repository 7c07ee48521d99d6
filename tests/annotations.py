"""Checks the annotations of the pure files, shapes and dtypes of arrays included, at every call."""

import importlib
import inspect

import beartype
import optax
from beartype.door import is_bearable
from jaxtyping import install_import_hook, jaxtyped

METHOD = "adversary diffusion embedding modules objective reading rollout schedule state train_step"
MODULES = [
    *(f"respodiff_jax.method.{name}" for name in METHOD.split()),
    "respodiff_jax.generation.sampling",
]
# Construction of these modules' classes is not checked: leaves of a pytree may be anything, such as
# shardings, and the other classes check or convert their fields themselves.
UNCHECKED = ".modules", ".sampling", ".schedule", ".state"
UNCHECKED_CLASSES = [m for m in MODULES if m.endswith(UNCHECKED)]


def check(function):
    if function.__name__ == "__init__" and function.__module__ in UNCHECKED_CLASSES:
        return function
    return beartype.beartype(function)


def install():
    """Before the modules are imported.

    What they import is imported first: within an import with a hook, Python's compiled modules
    are not found, and two thousand are compiled again.
    """
    importlib.import_module("respodiff_jax.backbone")
    install_import_hook(MODULES, "annotations.check")


def check_fields(*structures):
    """Checks the fields of named tuples and pytree nodes; all of them share their axes."""
    with jaxtyped("context"):
        for structure in structures:
            for name, hint in inspect.get_annotations(type(structure)).items():
                value = getattr(structure, name)
                if hint is not optax.OptState:  # any tree of arrays
                    assert is_bearable(value, hint), f"{type(structure).__name__}.{name}: {value}"
