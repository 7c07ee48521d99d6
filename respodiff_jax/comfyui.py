"""ComfyUI nodes that steer a model with RespoDiff adapters.

`respodiff export --comfyui DIR` copies this file, as `__init__.py`, and `torch_adapter.py` into a
folder of ComfyUI's `custom_nodes`, with the adapter in its subfolder `adapters`. Like
`torch_adapter.py` it needs neither JAX nor the rest of this package.

Convention: ComfyUI's batch consists of chunks, one for each conditioning;
`transformer_options["cond_or_uncond"]` has a 0 for each positive one. `steer` adds to these chunks.
"""

import copy
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .torch_adapter import CONFIG_FILE, RespoDiffAdapter

FOLDER = pathlib.Path(__file__).parent / "adapters"
KEY = "respodiff"
_PREDICTION_TYPES = {"epsilon": "EPS", "v_prediction": "V_PREDICTION"}


class Choice:
    """An adapter and what a node chose of it.

    Args:
      adapter: it is copied, since several nodes choose of one adapter.
      fair: group and seed, where each batch is dealt its concepts by `fair`.
      scale: multiplies the default scales of the concepts.

    Attributes:
      adapter: with the chosen concepts.
      fair: as given.
    """

    def __init__(
        self,
        adapter: RespoDiffAdapter,
        fair: tuple[str, int] | None = None,
        scale: float = 1.0,
    ):
        self.adapter = copy.copy(adapter)
        self.adapter.default_scales = [scale * default for default in adapter.default_scales]
        self.adapter.set_concepts({})
        self.fair = fair
        self._dealt = 0

    def deal(self, num_images: int) -> None:
        """Gives each image of a batch its concept; the same seed gives the same concepts."""
        if self.fair is not None and self._dealt != num_images:
            group, seed = self.fair
            generator = torch.Generator().manual_seed(seed)
            self.adapter.set_concepts({})
            self.adapter.fair(group, num_images, generator=generator)
            self._dealt = num_images


def steer(
    choices: Sequence[Choice],
    h: torch.Tensor,
    context: torch.Tensor | None,
    options: Mapping[str, Any],
    timesteps: torch.Tensor | None = None,
) -> torch.Tensor:
    """Adds the deltas of all choices, each computed from the same `h`, to the positive chunks.

    Args:
      choices: of adapters trained on this model.
      h: mid-block output (B, C, H, W).
      context: text states (B, L, D); None if the host gives none.
      options: `transformer_options`, with "cond_or_uncond".
      timesteps: (B,); None if the host gives none.

    Raises:
      ValueError: if an adapter does not fit the model or the number of images, or if it reads
        prompts or timesteps and there are none.
    """
    chunks = options["cond_or_uncond"]
    size = len(h) // len(chunks)
    steered = h.clone()
    for start in (i * size for i, entry in enumerate(chunks) if entry == 0):
        part = h[start : start + size]
        text, times = (x if x is None else x[start : start + size] for x in (context, timesteps))
        deltas = []
        for choice in choices:
            adapter = choice.adapter
            _check_fits(adapter, part, text, times)
            choice.deal(size)
            deltas.append(adapter.delta(part, text, times))
        steered[start : start + size] = (part.float() + sum(deltas)).to(h.dtype)
    return steered


def _check_fits(
    adapter: RespoDiffAdapter,
    h: torch.Tensor,
    text: torch.Tensor | None,
    timesteps: torch.Tensor | None,
) -> None:
    channels, name = adapter.config["module"]["mid_block_shape"]["channels"], adapter
    if h.shape[1] != channels:
        raise ValueError(
            f"{name}: its mid-block has {channels} channels, this model's has {h.shape[1]}; use the"
            " model that the adapter was trained on, or a fine-tune of it"
        )
    if adapter.steer_always:
        return
    if timesteps is None and adapter.is_limited:
        raise ValueError(f"{name} steers at some timesteps, unknown here; set steer_always")
    reading = adapter.config.get("reading")
    if reading is None:
        return
    if text is None:
        raise ValueError(f"{name} reads prompts, which are unknown here; set steer_always")
    if text.shape[-1] != reading["text_features"]:
        raise ValueError(
            f"{name} reads text states of {reading['text_features']} features, this model's have"
            f" {text.shape[-1]}; use the model that it was trained on, or set steer_always"
        )


class Wrapper:
    """Steers a model while it runs; ComfyUI calls it around the UNet."""

    def __init__(self, choices: Sequence[Choice]):
        self.choices = tuple(choices)

    def __call__(self, executor, x, timesteps, context, y, control, transformer_options, **kwargs):
        # The layers of the mid-block are called one by one, so the hook is on the last.
        handle = executor.class_obj.middle_block[-1].register_forward_hook(
            lambda module, args, h: steer(self.choices, h, context, transformer_options, timesteps)
        )
        try:
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        finally:
            handle.remove()


def output_block_patch(choices: Sequence[Choice]):
    """The same for `set_model_output_block_patch`, which Forge has.

    It gets no text states and no timesteps, so adapters that read prompts or have a `max_timestep`
    need `steer_always`; and with a ControlNet it acts after the ControlNet's mid-block residual.
    """

    def patch(h, skipped, options):
        if options["block"] == ("output", 0):
            h = steer(choices, h, None, options)
        return h, skipped

    return patch


def patched(model: Any, choice: Choice) -> Any:
    """A clone of ComfyUI's model that the choice steers, with those of earlier nodes.

    Raises:
      ValueError: if the model predicts another quantity than the adapter's.
    """
    from comfy.patcher_extension import WrappersMP

    ours = choice.adapter.config["backbone"]["prediction_type"]
    theirs = getattr(getattr(model.model, "model_type", None), "name", "")
    if _PREDICTION_TYPES.get(ours) != theirs and theirs in _PREDICTION_TYPES.values():
        raise ValueError(
            f"{choice.adapter} predicts {ours!r}, this model is of type {theirs}: use the model"
            " that the adapter was trained on, or a fine-tune of it"
        )
    clone, kind = model.clone(), WrappersMP.DIFFUSION_MODEL
    earlier = [c for wrapper in clone.get_wrappers(kind, KEY) for c in wrapper.choices]
    clone.remove_wrappers_with_key(kind, KEY)
    clone.add_wrapper_with_key(kind, KEY, Wrapper([*earlier, choice]))
    return clone


def parse_concepts(text: str) -> dict[str, float] | list[dict[str, float]]:
    """Scales by name from "a woman=1, old=0.5"; several lines are those of several images.

    Raises:
      ValueError: if a part is not NAME=SCALE.
    """
    rows = []
    for line in text.strip().splitlines():
        row = {}
        for part in filter(str.strip, line.split(",")):
            name, equals, scale = part.rpartition("=")
            try:
                row[name.strip()] = float(scale)
            except ValueError:
                equals = ""
            if not equals:
                raise ValueError(f"concept {part.strip()!r}: expected NAME=SCALE, as a woman=1.0")
        rows.append(row)
    return rows if len(rows) > 1 else {} if not rows else rows[0]


@functools.lru_cache(maxsize=8)
def _load(name: str) -> RespoDiffAdapter:
    folder = FOLDER / name
    return RespoDiffAdapter.from_pretrained(folder if name and folder.is_dir() else name)


class _Node:
    CATEGORY = "RespoDiff"
    FUNCTION = "run"
    RETURN_TYPES = ("MODEL",)


_MODEL = {"model": ("MODEL",), "adapter": ("RESPODIFF",)}
_SCALE = (
    "FLOAT",
    {
        **{"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05},
        "tooltip": "multiplies the default scales of the adapter's concepts",
    },
)


class LoadAdapter(_Node):
    """Loads an adapter of the folder `adapters`, or by another path or hub id."""

    RETURN_TYPES = ("RESPODIFF", "STRING")
    RETURN_NAMES = ("adapter", "concepts")

    @classmethod
    def INPUT_TYPES(cls):
        names = sorted(path.parent.name for path in FOLDER.glob(f"*/{CONFIG_FILE}"))
        return {
            "required": {
                "adapter": (names or [""],),
                "steer_always": ("BOOLEAN", {"default": False}),
            },
            "optional": {"path_or_hub_id": ("STRING", {"default": ""})},
        }

    def run(self, adapter: str, steer_always: bool, path_or_hub_id: str = ""):
        loaded = copy.copy(_load(path_or_hub_id.strip() or adapter))
        loaded.steer_always = steer_always
        lines = [f"{group}: {', '.join(names)}" for group, names in loaded.groups.items()]
        return loaded, "\n".join(lines)


class Concepts(_Node):
    """Steers every image by weighted concepts or, with a line for each image, each by its own."""

    @classmethod
    def INPUT_TYPES(cls):
        text = ("STRING", {"default": "a woman=1.0", "multiline": True})
        return {"required": {**_MODEL, "concepts": text}}

    def run(self, model, adapter, concepts: str):
        choice = Choice(adapter)
        choice.adapter.set_concepts(parse_concepts(concepts))
        return (patched(model, choice),)


class Fair(_Node):
    """Gives each image of a batch one concept of a group, each concept its equal share."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                **_MODEL,
                "group": ("STRING", {"default": "gender"}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
                "scale": _SCALE,
            }
        }

    def run(self, model, adapter, group: str, seed: int, scale: float):
        choice = Choice(adapter, (group, seed), scale)
        choice.deal(1)  # refuses an unknown group now, not while sampling
        return (patched(model, choice),)


class Safe(_Node):
    """Steers every image by all safety concepts."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {**_MODEL, "scale": _SCALE}}

    def run(self, model, adapter, scale: float):
        choice = Choice(adapter, scale=scale)
        choice.adapter.safe()
        return (patched(model, choice),)


NODE_CLASS_MAPPINGS = {
    "RespoDiffLoadAdapter": LoadAdapter,
    "RespoDiffConcepts": Concepts,
    "RespoDiffFair": Fair,
    "RespoDiffSafe": Safe,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "RespoDiffLoadAdapter": "RespoDiff: load adapter",
    "RespoDiffConcepts": "RespoDiff: concepts",
    "RespoDiffFair": "RespoDiff: fair",
    "RespoDiffSafe": "RespoDiff: safe",
}
