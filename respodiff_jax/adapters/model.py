"""Opening a model, by default the one that an adapter was trained on."""

from collections.abc import Callable

import jax

from respodiff_jax.adapters.adapter import Adapter
from respodiff_jax.adapters.combined import CombinedAdapter
from respodiff_jax.backbone import Backbone, load_backbone
from respodiff_jax.errors import UserError


def load_model(
    name: str | None = None,
    *,
    adapter: Adapter | CombinedAdapter | None = None,
    revision: str | None = None,
    variant: str | None = None,
    dtype: str | None = None,
    attention: str = "auto",
    abstract: bool = False,
) -> Backbone:
    """Loads a Stable Diffusion 1.x, 2.x or XL pipeline; only a single file needs torch.

    Args:
      name: a diffusers folder, local or on gs://; a hub id; a single-file checkpoint;
        "emoji-world", the bundled model; or "random/tiny" and the like. None is the model that the
        adapter was trained on.
      adapter: gives the defaults of revision and variant where it was trained on this model.
      revision: branch, tag or commit of a hub id.
      variant: "fp16" reads `*.fp16.safetensors`.
      dtype: "float32" or "bfloat16"; None is float32 on a CPU, else bfloat16.
      attention: implementation, see `respodiff_jax.backbone.load_backbone`.
      abstract: read no weights yet: the functions that take a model check everything else first,
        then read them.

    Raises:
      UserError: if there is no such model, it is incomplete, or it is not supported.
    """
    trained_on = adapter.backbone if adapter else {}
    if name is None and adapter is None:
        raise UserError("no model: give `name`, or `adapter` for the model it was trained on")
    same = name is None or str(name) == trained_on.get("name")
    return load_backbone(
        trained_on["name"] if name is None else name,
        revision=revision or (trained_on.get("revision") if same else None),
        variant=variant or (trained_on.get("variant") if same else None),
        dtype=dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"),
        attention=attention,
        abstract=abstract,
    )


def opened(model: Backbone | Callable[[], Backbone]) -> Backbone:
    """A model, given as itself or as a function that opens it.

    Raises:
      UserError: if it is neither.
    """
    found = model() if callable(model) else model
    if not isinstance(found, Backbone):
        raise UserError(f"`model` is {found!r}, expected a model as from `load_model`")
    return found
