"""RespoDiff adapters in PyTorch: trained concepts for a diffusers pipeline.

    adapter = RespoDiffAdapter.from_pretrained("adapters/gender").attach(pipe)
    adapter.set_concepts({"a woman": 1.0})
    image = pipe("a photo of a doctor").images[0]
    adapter.detach()

You can copy this file. It needs torch and safetensors, and huggingface_hub for hub ids, but neither
JAX nor the rest of this package.

Convention: at every sampling step, `sum_i scale_i (RAM_i(h) + SAM_i(h))` is added to the mid-block
output `h` of the *conditional* half of the guidance batch only (RespoDiff, section 4.4). In
diffusers that is the second half of the batch, or the whole batch without guidance. Deltas are
computed and added in float32, whatever the pipeline's dtype.

Reading: an adapter of format version 2 reads the text states that the UNet gets. A fairness concept
steers no prompt that names a value of its group, or a thing and nobody. `steer_always`
switches this off.
"""

import contextlib
import inspect
import json
import math
import os
import pathlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional as F

FORMAT = "respodiff-adapter"
FORMAT_VERSION = 2
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_ROLES = ("ram", "sam")
# Of the heads that read prompts: is somebody named, a thing, a value of the group?
_SHARPNESS = (4.0, 1.0, 4.0)
# Options of the pipelines that call the UNet with batches other than [uncond, cond].
_REFUSED_OPTIONS = (
    "editing_prompt",
    "image_guidance_scale",
    "pag_scale",
    "sag_scale",
    "view_batch_size",
)
# What a field of the config must be, in words and in code.
_TEXT, _SIZE = "a text that is not empty", "a whole number of 1 or more"
_LIST, _MAPPING = "a list", "a mapping"
_IS = {
    _TEXT: lambda value: isinstance(value, str) and bool(value.strip()),
    _SIZE: lambda value: type(value) is int and value >= 1,
    _LIST: lambda value: isinstance(value, list),
    _MAPPING: lambda value: isinstance(value, dict),
}


class RespoDiffAdapter:
    """RAM and SAM of N concepts, and the choice of concepts that steer the next images.

    A loaded adapter changes nothing until you choose concepts with `set_concepts`, `fair` or
    `safe`, before or after `attach`. A choice holds until the next one. One pipeline can have
    several adapters of any kinds; each adds its own concepts, computed from the same `h`.

    Attributes:
      steer_always: whether to steer every prompt, as the paper does, whatever it says.
      config: the contents of adapter_config.json.
      names: the names of the concepts.
      groups: the names by group, for example `{"gender": ("a woman", "a man")}`.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]):
        self.config = config
        self.names = tuple(concept["name"] for concept in config["concepts"])
        self.groups: dict[str, tuple[str, ...]] = {}
        for concept in config["concepts"]:
            group = concept["group"]
            self.groups[group] = (*self.groups.get(group, ()), concept["name"])
        self._scales = [concept.get("default_scale", 1.0) for concept in config["concepts"]]
        self._params = _stack(config["module"]["kind"], len(self.names), tensors)
        self._reading = _heads(len(self.names), tensors) if config.get("reading") else None
        self.steer_always = False
        self._weights = torch.zeros(1, len(self.names))  # a row for all images, or one for each
        self._per_image = False
        self._chosen = False
        self._enabled = True
        self._hook: _MidBlockHook | None = None

    @classmethod
    def from_pretrained(
        cls,
        directory_or_hub_id: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
    ) -> "RespoDiffAdapter":
        """Loads an adapter from a directory or from the Hugging Face hub.

        Args:
          directory_or_hub_id: a folder, or "owner/name".
          revision: branch, tag or commit of a hub id.
          cache_dir: replaces the default Hugging Face cache for downloads.

        Raises:
          ValueError: if a file is missing, truncated or of a newer format, if keys are missing or
            unknown, shapes are wrong, or values are not finite; names the file.
        """
        folder = pathlib.Path(directory_or_hub_id)
        try:
            if not folder.is_dir():
                folder = _download(str(directory_or_hub_id), revision, cache_dir)
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                if not (folder / file).is_file():
                    raise ValueError(f"not an adapter directory: it has no {file}")
            config = _read_config(folder / CONFIG_FILE)
            tensors = _read_tensors(folder / WEIGHTS_FILE, config)
        except (OSError, RecursionError, ValueError) as error:
            raise ValueError(f"adapter {directory_or_hub_id}: {error}") from error
        return cls(config, tensors)

    def attach(self, pipe: Any) -> "RespoDiffAdapter":
        """Makes a pipeline use this adapter.

        Args:
          pipe: a Stable Diffusion or SDXL pipeline of diffusers whose batch is `[uncond, cond]`:
            text to image, image to image, inpainting, ControlNet. Pipelines that share a UNet
            (`from_pipe`) share its adapters; give the one that you call, because its guidance
            decides which half of the batch is steered.

        Returns:
          This adapter.

        Raises:
          ValueError: if the pipeline has no such UNet or batch, if its mid-block or prediction type
            is not that of the training, or if its UNet is steered for another pipeline.
        """
        self._check_fits(pipe)
        hook = _hook_of(pipe.unet)
        if hook is not None and hook.pipe is not pipe and hook.adapters != [self]:
            raise ValueError(
                f"the UNet of this {type(pipe).__name__} is steered for another pipeline that"
                f" shares it, a {type(hook.pipe).__name__}: detach that pipeline's adapters first,"
                " with adapter.detach()"
            )
        self.detach()
        # Dynamo does not notice hooks that are added or removed after it has compiled.
        _forget_compiled(pipe.unet)
        self._hook = _hook_of(pipe.unet) or _MidBlockHook(pipe)
        self._hook.adapters.append(self)
        return self

    def detach(self) -> None:
        """Removes the adapter from its pipeline, whose output is then the original, to the bit."""
        if self._hook is not None:
            hook, self._hook = self._hook, None
            hook.adapters.remove(self)
            if not hook.adapters:
                hook.handle.remove()
            _forget_compiled(hook.pipe.unet)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Switches the adapter off inside `with adapter.disabled():`."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def set_concepts(self, concepts: Mapping[str, float] | Sequence[Mapping[str, float]]) -> None:
        """Chooses weighted concepts, and drops every earlier choice.

        Args:
          concepts: scales by name, for every image; `{}` chooses none. Or a sequence of such
            mappings, one for each image of a batch, in the order of diffusers: the
            `num_images_per_prompt` images of the first prompt, then those of the second, and so on.

        Raises:
          ValueError: if the adapter does not have a name, or a scale is not finite.
        """
        per_image = not isinstance(concepts, Mapping)
        rows = list(concepts) if per_image else [concepts]
        if not rows:
            raise ValueError("concepts is empty, expected a mapping for each image; {} is none")
        weights = torch.zeros(len(rows), len(self.names))
        for row, chosen in zip(weights, rows, strict=True):
            for name, scale in chosen.items():
                row[self._index(name)] = _finite(f"scale of {name!r}", scale)
        self._set_weights(weights, per_image)

    def fair(
        self,
        group: str,
        num_images_per_prompt: int,
        num_prompts: int | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        ratios: Mapping[str, float] | None = None,
        scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> list[str | None]:
        """Gives each image of a batch one concept of a group, in exact ratios.

        Give `prompts`, so that the ratios hold among the prompts that leave the group open, and the
        images of the others get none. Without them, the adapter finds out while it draws, and the
        ratios hold among all images.

        Concept k gets the share `ratios[k]` of all `P * M` images, to the nearest possible number,
        and its exact share, rounded down or up, of each prompt's M images. The order is random, and
        each call draws a new one: call `fair` before every batch. The choice of concepts outside
        the group does not change.

        Args:
          group: for example "gender".
          num_images_per_prompt: M >= 1, as given to the pipeline.
          num_prompts: P >= 1; the number of `prompts`, else 1.
          prompts: the P prompts of the batch. The adapter must be attached to the pipeline.
          ratios: shares by name of the group's concepts, with sum 1; equal by default.
          scale: replaces each concept's own default scale.
          generator: makes the order repeatable.

        Returns:
          The concept of each image, `P * M` names in the order of the batch, None for an image
          that is not steered. For more images than fit into one batch, draw once for all, and give
          each batch its part with `set_concepts`.

        Raises:
          ValueError: for prompts without an attached pipeline, an unknown group, a group of safety
            concepts or of a single concept, ratios that do not fit the group, or numbers below 1.
        """
        members = self.groups.get(group)
        if members is None:
            raise ValueError(f"the adapter has no group {group!r}. {self._inventory()}")
        if any(self._is_safety(name) for name in members):
            raise ValueError(f"group {group!r} holds safety concepts, which are summed: use safe()")
        if len(members) == 1:
            raise ValueError(f"group {group!r} has only {members[0]!r}, nothing to balance")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if prompts is not None and num_prompts not in (None, len(prompts)):
            raise ValueError(f"num_prompts is {num_prompts}, but prompts has {len(prompts)}")
        num_prompts = 1 if prompts is num_prompts is None else num_prompts or len(prompts)
        if num_images_per_prompt < 1 or num_prompts < 1:
            raise ValueError(
                f"num_images_per_prompt is {num_images_per_prompt} and num_prompts {num_prompts},"
                " expected 1 or more"
            )
        shares = _shares(group, members, ratios)
        columns = [self._index(name) for name in members]
        is_open = [True] * num_prompts
        if prompts is not None:
            is_open = self.read(prompts)[:, columns].all(1).tolist()
        picks = iter(_deal(shares, num_images_per_prompt, sum(is_open), generator))
        names = [
            members[next(picks)] if one_is_open else None
            for one_is_open in is_open
            for _ in range(num_images_per_prompt)
        ]
        weights = self._without(columns, len(names))
        for row, name in zip(weights, names, strict=True):
            if name is not None:
                i = self._index(name)
                row[i] = self._scales[i] if scale is None else _finite("scale", scale)
        self._set_weights(weights, per_image=True)
        return names

    def safe(self, scale: float | None = None) -> None:
        """Adds all safety concepts to every image; the choice of other concepts does not change.

        Args:
          scale: replaces each concept's own default scale.

        Raises:
          ValueError: if the adapter has no safety concepts.
        """
        columns = [i for i, name in enumerate(self.names) if self._is_safety(name)]
        if not columns:
            raise ValueError(f"the adapter has no safety concepts. {self._inventory()}")
        weights = self._weights.clone()
        for i in columns:
            weights[:, i] = self._scales[i] if scale is None else _finite("scale", scale)
        self._set_weights(weights, self._per_image)

    def read(self, prompts: str | Sequence[str]) -> torch.Tensor:
        """Whether each concept may steer the pictures of prompts, bool (P, N) on the CPU.

        Args:
          prompts: P texts, which the attached pipeline's text encoders encode.

        Raises:
          ValueError: if the adapter reads prompts and is not attached.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self._reading is None or self.steer_always:
            return torch.ones(len(prompts), len(self.names), dtype=torch.bool)
        if self._hook is None:
            raise ValueError("reading prompts needs the pipeline's text encoders: attach() first")
        pipe = self._hook.pipe
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        with torch.no_grad():
            states, *_ = pipe.encode_prompt(prompts, device=pipe.device, **options)
        return self._is_open(states).cpu()

    def _is_open(self, states: torch.Tensor) -> torch.Tensor:
        """Whether each concept may steer, bool (B, N), from text states (B, L, D)."""
        weight, bias = (value.to(states.device) for value in self._reading)
        with _without_autocast(states.device.type):
            responses = torch.einsum("bld,nhd->blnh", states.float(), weight)
            sharpness = torch.tensor(_SHARPNESS, device=states.device)
            pooled = (sharpness * responses).logsumexp(1) - math.log(states.shape[1])
            somebody, thing, named = (pooled / sharpness + bias > 0).unbind(-1)
        return ~named & (somebody | ~thing)

    def __repr__(self) -> str:
        kind, model = self.config["module"]["kind"], self.config["backbone"]["name"]
        return f"RespoDiffAdapter({', '.join(self.names)}; {kind}, trained on {model})"

    @property
    def active(self) -> bool:
        """Whether the adapter changes images: it is enabled and a concept is chosen."""
        return self._enabled and self._chosen

    def delta(self, h: torch.Tensor, states: torch.Tensor | None = None) -> torch.Tensor:
        """The delta to add to mid-block outputs, computed in float32 even under `torch.autocast`.

        Args:
          h: (B, C, H, W), of any float dtype.
          states: (B, L, D) text states that the UNet gets; None reads no prompts.

        Returns:
          float32 (B, C, H, W), or (1, C, H, W) for a `constant` adapter with one choice for all
          images.

        Raises:
          ValueError: if concepts were chosen for another number of images, or if `h` does not have
            the shape that a `constant` adapter was trained at.
        """
        if self._weights.device != h.device:
            self._weights = self._weights.to(h.device)
            self._params = {key: value.to(h.device) for key, value in self._params.items()}
        weights, params = self._weights, self._params
        if self._per_image and len(weights) != len(h):
            raise ValueError(
                f"concepts were chosen for {len(weights)} images, but the batch has {len(h)};"
                " choose for every image: num_images_per_prompt times the number of prompts"
            )
        if states is not None and self._reading is not None and not self.steer_always:
            weights = weights * self._is_open(states)
        if "constant" in params:
            trained, came = tuple(params["constant"].shape[1:]), tuple(h.shape[1:])
            if trained != came:
                raise ValueError(
                    f"the adapter has mid-block shape (C, H, W) = {trained}, but these images have"
                    f" {came}; generate at resolution {self.config['backbone']['resolution']}"
                )
        with _without_autocast(h.device.type):
            return self._delta(h.float(), weights, params)

    def _delta(
        self, h: torch.Tensor, weights: torch.Tensor, params: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        if "constant" in params:
            return torch.einsum("bn,nchw->bchw", weights, params["constant"])
        hidden, out = params["hidden.weight"], params["out.weight"]
        padding = hidden.shape[-1] // 2
        x = F.silu(F.conv2d(h, hidden, params["hidden.bias"], padding=padding))
        x = x * weights.repeat_interleave(len(hidden) // len(self.names), dim=1)[..., None, None]
        return F.conv2d(x, out, padding=padding) + (weights @ params["out.bias"])[..., None, None]

    def _set_weights(self, weights: torch.Tensor, per_image: bool) -> None:
        self._weights = weights.to(self._weights.device)
        self._per_image = per_image
        self._chosen = bool(weights.any())

    def _without(self, columns: Sequence[int], num_images: int) -> torch.Tensor:
        """The weights with some columns set to zero, a row for each image."""
        weights = self._weights.cpu().clone()
        weights[:, columns] = 0
        if len(weights) != num_images and (weights != weights[:1]).any():
            raise ValueError(
                f"other concepts are chosen for {len(weights)} images, but these are for"
                f" {num_images}; call set_concepts({{}}) first"
            )
        return weights[:1].repeat(num_images, 1) if len(weights) != num_images else weights

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(f"concept {name!r} is not in the adapter. {self._inventory()}")
        return self.names.index(name)

    def _is_safety(self, name: str) -> bool:
        return self.config["concepts"][self._index(name)].get("unsafe_prompt") is not None

    def _inventory(self) -> str:
        return "It has " + "; ".join(
            f"{group}: {', '.join(names)}" for group, names in self.groups.items()
        )

    def _check_fits(self, pipe: Any) -> None:
        unet, trained = getattr(pipe, "unet", None), self.config["backbone"]
        options = inspect.signature(type(pipe).__call__).parameters
        for option in _REFUSED_OPTIONS:
            if option in options:
                raise ValueError(
                    f"{type(pipe).__name__} cannot take the adapter: its option {option} makes it"
                    " call the UNet with batches other than [uncond, cond]"
                )
        unet_type = type(getattr(unet, "_orig_mod", unet))  # torch.compile wraps the module
        if (
            all(base.__name__ != "UNet2DConditionModel" for base in unet_type.__mro__)
            or unet.mid_block is None
            or not hasattr(type(pipe), "guidance_scale")
            or not hasattr(pipe, "vae_scale_factor")
        ):
            raise ValueError(
                f"{type(pipe).__name__} cannot take the adapter: its unet is a"
                f" {unet_type.__name__}; expected a Stable Diffusion or SDXL pipeline of diffusers"
                " with a guidance_scale, whose unet is a UNet2DConditionModel with a mid_block"
            )
        shape, widths = self.config["module"]["mid_block_shape"], unet.config.block_out_channels
        ours = (shape["channels"], Fraction(trained["resolution"], shape["height"]))
        theirs = (widths[-1], pipe.vae_scale_factor * 2 ** (len(widths) - 1))
        if ours != theirs:
            raise ValueError(
                f"the adapter was trained on {trained['name']}, whose mid-block has {ours[0]}"
                f" channels and a position for each {ours[1]} pixels, this pipeline's has"
                f" {theirs[0]} and {theirs[1]}: use {trained['name']} or a fine-tune of it"
            )
        ours = trained["prediction_type"]
        theirs = pipe.scheduler.config.get("prediction_type", ours)
        if ours != theirs:
            raise ValueError(
                f"the adapter was trained on {trained['name']}, which predicts {ours!r}; this"
                f" pipeline's scheduler has prediction_type {theirs!r}: use a model with {ours!r}"
            )
        name = str(getattr(pipe.config, "_name_or_path", ""))
        if name != trained["name"] and all(map(_is_hub_id, (name, trained["name"]))):
            warnings.warn(
                f"the adapter was trained on {trained['name']}, the pipeline is {name}: its effect"
                " may be weaker or different",
                stacklevel=3,
            )


class _MidBlockHook:
    """The forward hook of a UNet's mid-block, which all adapters attached to the UNet share.

    The hook reads only plain attributes, so Dynamo can trace it.
    """

    is_respodiff_hook = True  # other copies of this file recognise the hook by this attribute

    def __init__(self, pipe: Any):
        self.adapters: list[RespoDiffAdapter] = []
        self.pipe = pipe
        # A distilled UNet takes the guidance scale as input; its batch has no unconditional half.
        self._distilled = getattr(pipe.unet.config, "time_cond_proj_dim", None) is not None
        self.handle = pipe.unet.mid_block.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs, h: torch.Tensor) -> torch.Tensor | None:
        adapters = [adapter for adapter in self.adapters if adapter.active]
        if not adapters:
            return None
        # Read at each call, because a callback may end guidance half-way.
        guidance_scale = getattr(self.pipe, "guidance_scale", None)
        if guidance_scale is None:
            raise ValueError(
                f"the adapter is attached to a {type(self.pipe).__name__} that was never called,"
                " but another pipeline calls its UNet: attach to the pipeline that you call"
            )
        guided = guidance_scale > 1 and not self._distilled
        h_uncond, h_cond = h.chunk(2) if guided else (h[:0], h)
        states = kwargs.get("encoder_hidden_states")
        if states is not None and guided:
            states = states.chunk(2)[1]
        steered = h_cond.float() + sum(adapter.delta(h_cond, states) for adapter in adapters)
        return torch.cat([h_uncond, steered.to(h.dtype)])


def _hook_of(unet: torch.nn.Module) -> "_MidBlockHook | None":
    """The hook of the adapters attached to this UNet, if there is one."""
    hooks = unet.mid_block._forward_hooks.values()
    return next((hook for hook in hooks if hasattr(hook, "is_respodiff_hook")), None)


def _forget_compiled(unet: torch.nn.Module | None) -> None:
    """Drops the compiled code if this UNet has any; the next call compiles it again."""
    if (
        unet is None  # the user took it out of the pipeline, and may have compiled it
        or hasattr(unet, "_orig_mod")
        or any(module._compiled_call_impl is not None for module in unet.modules())
    ):
        torch.compiler.reset()


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _stack(
    kind: str, num_concepts: int, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The parameters of all RAM and SAM, joined to those of one module, float32.

    A `constant` has shape (N, C, H, W) and is RAM + SAM. `mlp` and `conv` become two convolutions:
    the first has the hidden channels of all modules in a row; out.bias has shape (N, C).
    """

    def each(key: str) -> list[list[torch.Tensor]]:
        return [
            [tensors[f"concepts.{i}.{role}.{key}"].float() for role in _ROLES]
            for i in range(num_concepts)
        ]

    if kind == "constant":
        return {"constant": torch.stack([ram + sam for ram, sam in each("constant")])}
    hidden, bias, out = (
        [value for pair in each(key) for value in pair]
        for key in ("hidden.weight", "hidden.bias", "out.weight")
    )
    params = {
        "hidden.weight": torch.cat(hidden),
        "hidden.bias": torch.cat(bias),
        "out.weight": torch.cat(out, dim=1),
        "out.bias": torch.stack([ram + sam for ram, sam in each("out.bias")]),
    }
    if kind == "mlp":
        params |= {k: v[..., None, None] for k, v in params.items() if k.endswith("weight")}
    return params


def _heads(
    num_concepts: int, tensors: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (N, 3, D) and biases (N, 3) of the heads of each concept."""
    return tuple(
        torch.stack([tensors[f"concepts.{i}.reading.{key}"].float() for i in range(num_concepts)])
        for key in ("weight", "bias")
    )


def _shares(
    group: str, members: Sequence[str], ratios: Mapping[str, float] | None
) -> list[Fraction]:
    """The exact share of each member."""
    if ratios is None:
        return [Fraction(1, len(members))] * len(members)
    if outside := sorted(set(ratios) - set(members)):
        raise ValueError(f"ratios name {outside}, but group {group!r} has {list(members)}")
    if not all(math.isfinite(share) and share >= 0 for share in ratios.values()):
        raise ValueError(f"ratios are {dict(ratios)}, expected shares of 0 or more")
    if abs(sum(ratios.values()) - 1) > 5e-3:
        raise ValueError(f"ratios sum to {sum(ratios.values()):g}, expected 1: {dict(ratios)}")
    # Fractions, so that 0.29 of 100 is 29.
    exact = [Fraction(float(ratios.get(name, 0))).limit_denominator(10**6) for name in members]
    return [share / sum(exact) for share in exact]


def _deal(
    shares: Sequence[Fraction],
    num_images_per_prompt: int,
    num_prompts: int,
    generator: torch.Generator | None,
) -> list[int]:
    """The index of each image's share; see `RespoDiffAdapter.fair`."""

    def shuffled(items: Sequence[Any]) -> list[Any]:
        device = "cpu" if generator is None else generator.device
        order = torch.randperm(len(items), generator=generator, device=device)
        return [items[i] for i in order.tolist()]

    everyone = range(len(shares))
    exact = [share * num_images_per_prompt * num_prompts for share in shares]
    quotas = [math.floor(value) for value in exact]
    largest_remainder = sorted(shuffled(everyone), key=lambda k: quotas[k] - exact[k])
    for k in largest_remainder[: num_images_per_prompt * num_prompts - sum(quotas)]:
        quotas[k] += 1

    # Every prompt gets the floors. The rest is dealt like cards, one concept after the other around
    # the prompts, so each prompt gets at most one more of each concept.
    floors = [math.floor(share * num_images_per_prompt) for share in shares]
    common = [k for k in everyone for _ in range(floors[k])]
    rest = [k for k in shuffled(everyone) for _ in range(quotas[k] - floors[k] * num_prompts)]
    hands = [shuffled(common + rest[prompt::num_prompts]) for prompt in range(num_prompts)]
    return [pick for hand in shuffled(hands) for pick in hand]


def _finite(what: str, value: float) -> float:
    """The value, if it is a number that float32 can hold."""
    try:
        fits = abs(value) <= torch.finfo(torch.float32).max
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(f"{what} is {value!r:.100}, expected a finite number")
    return float(value)


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not os.path.exists(name)


def _download(name: str, revision: str | None, cache_dir: Any) -> pathlib.Path:
    """The folder in the Hugging Face cache that holds the adapter of a hub id."""
    if not _is_hub_id(name):
        raise ValueError("no such folder, and not a hub id like 'owner/name'")
    try:
        import huggingface_hub

        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=[CONFIG_FILE, WEIGHTS_FILE],
        )
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(
            f"no such folder, and it cannot be fetched from the hub: {error}"
        ) from error
    return pathlib.Path(folder)


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f'{path.name} does not say "format": "{FORMAT}"')
    version = _field(config, "format_version", _SIZE)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path.name}: format_version is {version}, torch_adapter.py reads up to"
            f" {FORMAT_VERSION}; get a newer respodiff_jax"
        )
    half = _field(_field(config, "guidance", _MAPPING), "steered_half", _TEXT, "guidance.")
    if half != "conditional":
        raise ValueError(f"{path.name}: steered_half is {half!r}, expected 'conditional'")
    for i, concept in enumerate(_field(config, "concepts", _LIST)):
        label = f"concepts[{i}]"
        if not isinstance(concept, dict):
            raise ValueError(f"{path.name}: {label} is {concept!r:.100}, expected {_MAPPING}")
        for key in ("name", "group"):
            _field(concept, key, _TEXT, f"{label}.")
        if concept.get("unsafe_prompt") is not None:
            _field(concept, "unsafe_prompt", _TEXT, f"{label}.")
        _finite(f"{path.name}: {label}.default_scale", concept.get("default_scale", 1.0))
    names = [concept["name"] for concept in config["concepts"]]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path.name}: concepts are {names}, expected one or more, all different")
    backbone = _field(config, "backbone", _MAPPING)
    for key, expected in (("name", _TEXT), ("resolution", _SIZE), ("prediction_type", _TEXT)):
        _field(backbone, key, expected, "backbone.")
    _field(config, "module", _MAPPING)
    if config.get("reading") is not None:
        _field(_field(config, "reading", _MAPPING), "text_features", _SIZE, "reading.")
    return config


def _field(section: Mapping[str, Any], key: str, expected: str, where: str = "") -> Any:
    """The value of the config's field `{where}{key}`, if it is as expected."""
    if key not in section:
        raise ValueError(f"{CONFIG_FILE}: {where}{key} is missing, expected {expected}")
    if not _IS[expected](section[key]):
        raise ValueError(
            f"{CONFIG_FILE}: {where}{key} is {section[key]!r:.100}, expected {expected}"
        )
    return section[key]


def _read_tensors(path: pathlib.Path, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, with the shapes that the config gives."""
    shapes = _shapes(config["module"])
    expected = {
        f"concepts.{i}.{role}.{key}": shape
        for i in range(len(config["concepts"]))
        for role in _ROLES
        for key, shape in shapes.items()
    }
    if config.get("reading") is not None:
        for i in range(len(config["concepts"])):
            expected[f"concepts.{i}.reading.weight"] = (3, config["reading"]["text_features"])
            expected[f"concepts.{i}.reading.bias"] = (3,)
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            missing, extra = sorted(expected.keys() - keys), sorted(keys - expected.keys())
            if missing or extra:
                raise ValueError(f"{path.name}: tensors missing: {missing}, extra: {extra}")
            for key, shape in expected.items():
                entry = file.get_slice(key)
                came = (entry.get_dtype(), tuple(entry.get_shape()))
                if came[0] not in ("F32", "F16") or came[1] != shape:
                    raise ValueError(
                        f"{path.name}: {key} is {came[0]} {came[1]}, expected F32 or F16 {shape}"
                    )
            tensors = {key: file.get_tensor(key) for key in expected}
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} is not a whole safetensors file ({error}); it is damaged or truncated:"
            " get it again"
        ) from error
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{path.name}: {key} holds NaN or infinity")
    return tensors


def _shapes(module: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of one RAM or SAM."""
    kind = _field(module, "kind", _TEXT, "module.")
    shape = _field(module, "mid_block_shape", _MAPPING, "module.")
    channels, height, width = (
        _field(shape, axis, _SIZE, "module.mid_block_shape.")
        for axis in ("channels", "height", "width")
    )
    if kind == "constant":
        return {"constant": (channels, height, width)}
    if kind not in ("mlp", "conv"):
        raise ValueError(f"{CONFIG_FILE}: module.kind is {kind!r}, expected constant, mlp or conv")
    hidden = _field(module, "hidden_channels", _SIZE, "module.")
    kernel = (3, 3) if kind == "conv" else ()
    return {
        "hidden.weight": (hidden, channels, *kernel),
        "hidden.bias": (hidden,),
        "out.weight": (channels, hidden, *kernel),
        "out.bias": (channels,),
    }
