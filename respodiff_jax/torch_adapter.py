"""RespoDiff adapters in PyTorch: trained concepts for a diffusers pipeline.

    adapter = RespoDiffAdapter.from_pretrained("adapters/gender").attach(pipe)
    adapter.set_concepts({"a woman": 1.0})
    image = pipe("a photo of a doctor").images[0]
    adapter.detach()

You can copy this file. It needs torch and safetensors, and huggingface_hub for hub ids, but neither
JAX nor the rest of this package.

Convention: at every sampling step, `sum_i scale_i (RAM_i(h) + SAM_i(h))` is added to the mid-block
output `h` of the *conditional* samples only (RespoDiff, section 4.4). Each call of the UNet shows
which samples these are, see `_UNetHook`. Deltas are computed and added in float32, whatever the
pipeline's dtype.

Reading: from format version 2 on, an adapter may read the text states that the UNet gets. A
fairness concept then steers no prompt that names a value of its group, and none that names a thing
but no person. From version 3 on, a concept may have a `max_timestep`, up to which it steers.
`steer_always` switches both off.
"""

import contextlib
import inspect
import json
import math
import os
import pathlib
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional as F

FORMAT = "respodiff-adapter"
FORMAT_VERSION = 3
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_ROLES = ("ram", "sam")
# Sharpness of the smooth maximum of each head: is a person named, a thing, a value of the group?
_SHARPNESS = (4.0, 1.0, 4.0)
# Options of the pipelines that call the UNet with other batches than `_UNetHook` knows.
_REFUSED_OPTIONS = ("editing_prompt", "image_guidance_scale", "sag_scale", "view_batch_size")
# Methods by which modules call each other.
_MODULE_METHODS = ("_wrapped_call_impl", "_call_impl", "forward")


class RespoDiffAdapter:
    """RAM and SAM of N concepts, and the choice of concepts that steer the next images.

    A loaded adapter changes nothing until you choose concepts with `set_concepts`, `fair` or
    `safe`, before or after `attach`. A choice holds until the next one. One pipeline can have
    several adapters of any kinds; each adds its own concepts, computed from the same `h`.

    Attributes:
      steer_always: whether to steer every prompt at every timestep, as the paper does.
      config: the contents of adapter_config.json.
      names: the names of the concepts.
      groups: the names by group, for example `{"gender": ("a woman", "a man")}`.
      default_scales: each concept's scale for choices that give none, in the order of `names`.
      max_timesteps: the timestep up to which each concept steers; None is no limit.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]):
        self.config = config
        self.names = tuple(concept["name"] for concept in config["concepts"])
        self.groups: dict[str, tuple[str, ...]] = {}
        for concept in config["concepts"]:
            group = concept["group"]
            self.groups[group] = (*self.groups.get(group, ()), concept["name"])
        self.default_scales = [concept.get("default_scale", 1.0) for concept in config["concepts"]]
        self._params = _stack(config["module"]["kind"], len(self.names), tensors)
        self.max_timesteps = [concept.get("max_timestep") for concept in config["concepts"]]
        self._reading = _heads(len(self.names), tensors) if config.get("reading") else None
        owners = [(c["group"], self._is_safety(c["name"])) for c in config["concepts"]]
        self._decide_together = torch.tensor([[a == b for b in owners] for a in owners])
        self.steer_always = False
        self._weights = torch.zeros(1, len(self.names))  # a row for all images, or one for each
        self._per_image = False
        self._chosen = False
        self._enabled = True
        self._hook: _UNetHook | None = None
        self._pipe: Any = None

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
        """Makes a pipeline, and all others that share its UNet, use this adapter.

        Args:
          pipe: a Stable Diffusion or SDXL pipeline of diffusers: text to image, image to image,
            inpainting, ControlNet, PAG, or a modular one. Another `pipe.unet = ...` takes the
            adapter along.

        Returns:
          This adapter.

        Raises:
          ValueError: if the pipeline has no such UNet or batch, or if its mid-block, prediction
            type or, for an adapter that reads prompts, text states are not those of the training.
        """
        self._check_fits(pipe, getattr(pipe, "unet", None))
        self.detach()
        # Dynamo does not notice hooks that are added or removed after it has compiled.
        _forget_compiled(pipe.unet)
        self._hook, self._pipe = _hook_of(pipe.unet) or _UNetHook(pipe.unet), pipe
        self._hook.adapters.append(self)
        _watch(pipe).append(self)
        return self

    def detach(self) -> None:
        """Removes the adapter from its pipeline, whose output is then the original, to the bit."""
        if self._hook is not None:
            hook, pipe, self._hook, self._pipe = self._hook, self._pipe, None, None
            _forget_compiled(pipe.unet)
            _unwatch(pipe, self)
            hook.remove(self)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Switches the adapter off inside `with adapter.disabled():`."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def set_concepts(
        self, concepts: Mapping[str, float | None] | Sequence[Mapping[str, float | None]]
    ) -> None:
        """Chooses weighted concepts, and drops every earlier choice.

        Args:
          concepts: scales by name, for every image; None is the concept's default scale, `{}`
            chooses none. Or a sequence of such mappings, one for each image of a batch, in the
            order of diffusers: the `num_images_per_prompt` images of the first prompt, then those
            of the second, and so on.

        Raises:
          ValueError: if the adapter does not have a name, a scale is not finite, or the sequence is
            empty.
        """
        per_image = not isinstance(concepts, Mapping)
        rows = list(concepts) if per_image else [concepts]
        if not rows:
            raise ValueError("concepts is empty, expected a mapping for each image; {} is none")
        weights = torch.zeros(len(rows), len(self.names))
        for row, chosen in zip(weights, rows, strict=True):
            for name, scale in chosen.items():
                i = self._index(name)
                scale = self.default_scales[i] if scale is None else scale
                row[i] = _finite(f"scale of {name!r}", scale)
        self._set_weights(weights, per_image)

    def fair(
        self,
        group: str,
        num_images_per_prompt: int,
        num_prompts: int | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        ratio: Mapping[str, float] | None = None,
        scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> list[str | None]:
        """Gives each image of a batch one concept of a group, in exact shares.

        With `prompts`, the shares hold among those that leave the group open, and the images of the
        others get none. Concept k gets the share `ratio[k]` of all `P * M` images, and of each
        prompt's M images, rounded down or up. The order is random: call `fair` before every batch.
        An earlier choice of the group's concepts is dropped, that of others does not change.

        Args:
          group: for example "gender".
          num_images_per_prompt: M >= 1, as given to the pipeline.
          num_prompts: P >= 1; the number of `prompts`, else 1.
          prompts: the P prompts of the batch. The adapter must be attached to the pipeline.
          ratio: shares by name of the group's concepts, with sum 1; equal by default.
          scale: replaces each concept's own default scale.
          generator: makes the order repeatable.

        Returns:
          The concept of each image, `P * M` names in the order of the batch, None for an image
          that is not steered.

        Raises:
          ValueError: for prompts without an attached pipeline, a group that is unknown, of safety
            concepts or of one concept, a ratio that does not fit it, a number below 1, a
            `num_prompts` that is not the number of `prompts`, or a scale that is not finite.
        """
        members = self.groups.get(group)
        if members is None:
            raise ValueError(f"the adapter has no group {group!r}. {self._inventory()}")
        if any(self._is_safety(name) for name in members):
            raise ValueError(f"group {group!r} holds safety concepts, which are summed: use safe()")
        if len(members) == 1:
            raise ValueError(f"group {group!r} has only {members[0]!r}, nothing to balance")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        count = len(prompts) if prompts is not None else 1 if num_prompts is None else num_prompts
        if num_prompts not in (None, count):
            raise ValueError(f"num_prompts is {num_prompts}, but prompts has {count}")
        num_prompts = count
        if num_images_per_prompt < 1 or num_prompts < 1:
            raise ValueError(
                f"num_images_per_prompt is {num_images_per_prompt} and num_prompts {num_prompts},"
                " expected 1 or more"
            )
        shares = _shares(group, members, ratio)
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
                row[i] = self.default_scales[i] if scale is None else _finite("scale", scale)
        self._set_weights(weights, per_image=True)
        return names

    def safe(self, scale: float | None = None) -> None:
        """Chooses all safety concepts for every image, and drops every earlier choice of them.

        The choice of other concepts does not change.

        Args:
          scale: replaces each concept's own default scale.

        Raises:
          ValueError: if the adapter has no safety concepts, or `scale` is not finite.
        """
        columns = [i for i, name in enumerate(self.names) if self._is_safety(name)]
        if not columns:
            raise ValueError(f"the adapter has no safety concepts. {self._inventory()}")
        weights = self._weights.clone()
        for i in columns:
            weights[:, i] = self.default_scales[i] if scale is None else _finite("scale", scale)
        self._set_weights(weights, self._per_image)

    def read(self, prompts: str | Sequence[str]) -> torch.Tensor:
        """Whether each concept may steer the pictures of prompts, bool (P, N) on the CPU.

        Args:
          prompts: P texts, which the attached pipeline's text encoders encode.

        Raises:
          ValueError: if the adapter reads prompts and is not attached, or the pipeline's text
            states have another width than those of the training.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self._reading is None or self.steer_always:
            return torch.ones(len(prompts), len(self.names), dtype=torch.bool)
        if self._pipe is None:
            raise ValueError("reading prompts needs the pipeline's text encoders: attach() first")
        # `device` is "meta" where weights are offloaded one by one.
        options = {"device": self._pipe._execution_device, "num_images_per_prompt": 1}
        with torch.no_grad():
            if _is_modular(self._pipe):
                encode = self._pipe.blocks.sub_blocks["text_encoder"].encode_prompt
                options["prepare_unconditional_embeds"] = False
                states, *_ = encode(self._pipe, prompts, **options)
            else:
                options["do_classifier_free_guidance"] = False
                states, *_ = self._pipe.encode_prompt(prompts, **options)
        return self._is_open(states).cpu()

    def _is_open(self, states: torch.Tensor) -> torch.Tensor:
        """Whether each concept may steer, bool (B, N), from text states (B, L, D).

        A group is open only if all its concepts find it open.
        """
        self._check_reads(states.shape[-1])
        weight, bias = (value.to(states.device) for value in self._reading)
        with _without_autocast(states.device.type):
            responses = torch.einsum("bld,nhd->blnh", states.float(), weight)
            sharpness = torch.tensor(_SHARPNESS, device=states.device)
            pooled = (sharpness * responses).logsumexp(1) - math.log(states.shape[1])
            somebody, thing, named = (pooled / sharpness + bias > 0).unbind(-1)
        is_closed = named | (thing & ~somebody)
        return ~(is_closed[:, None] & self._decide_together.to(states.device)).any(-1)

    def __repr__(self) -> str:
        kind, model = self.config["module"]["kind"], self.config["backbone"]["name"]
        return f"RespoDiffAdapter({', '.join(self.names)}; {kind}, trained on {model})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hook": None, "_pipe": None}  # a copy is not attached

    @property
    def active(self) -> bool:
        """Whether the adapter changes images: it is enabled and a concept is chosen."""
        return self._enabled and self._chosen

    @property
    def is_limited(self) -> bool:
        """Whether a concept steers only at some of the timesteps."""
        return any(last is not None for last in self.max_timesteps)

    def delta(
        self,
        h: torch.Tensor,
        states: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The delta to add to mid-block outputs, computed in float32 even under `torch.autocast`.

        Args:
          h: (B, C, H, W), of any float dtype.
          states: (B, L, D) text states that the UNet gets; None reads no prompts.
          timesteps: (B,) or (1,); None steers whatever the timestep.

        Returns:
          float32 (B, C, H, W), or (1, C, H, W) for a `constant` adapter with one choice for all
          images.

        Raises:
          ValueError: if concepts were chosen for another number of images, if `h` does not have the
            shape that a `constant` adapter was trained at, or `states` not the width that the
            adapter reads.
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
        if timesteps is not None and self.is_limited and not self.steer_always:
            last = [math.inf if timestep is None else timestep for timestep in self.max_timesteps]
            weights = weights * (timesteps.to(h.device)[:, None] <= torch.tensor(last).to(h.device))
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

    def _check_fits(self, pipe: Any, unet: Any) -> None:
        _check_calls(pipe)
        trained = self.config["backbone"]
        bases = [base.__name__ for base in type(_inner(unet)).__mro__]
        if "UNet2DConditionModel" not in bases or unet.mid_block is None:
            raise ValueError(
                f"{type(pipe).__name__} cannot take the adapter: its unet is a {bases[0]}; expected"
                " a Stable Diffusion or SDXL pipeline, whose unet is a UNet2DConditionModel with a"
                " mid_block"
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
        if self._reading is not None and not self.steer_always:
            width = unet.config.cross_attention_dim  # a number, or a list with one for each level
            self._check_reads(width if isinstance(width, int) else width[-1])
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

    def _check_reads(self, features: int) -> None:
        ours, name = self._reading[0].shape[-1], self.config["backbone"]["name"]
        if features != ours:
            raise ValueError(
                f"the adapter reads text states of {ours} features, this model's have {features};"
                f" use the model that it was trained on, {name}, or steer every prompt:"
                " `adapter.steer_always = True`"
            )


class _Hook:
    """A hook whose copies do nothing: the copy of a UNet is not steered, and holds no adapter."""

    is_respodiff_hook = True  # other copies of this file recognise the hook by this attribute

    def __reduce__(self):
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes anything, needs no import


class _UNetHook(_Hook):
    """What all adapters attached to a UNet share. It finds out which samples a call steers.

    A call's batch consists of *chunks*, copies of the latents with different text states. The
    pipeline that calls, found on the stack, says which chunks are conditional: `[uncond, cond]`
    under guidance, with PAG a perturbed copy of `cond`; a modular pipeline makes a call for each
    chunk. Copies are compared when pipeline, guidance or batch size change. In a loop of one's own
    there is only the call: two equal halves of latents with different text states are
    `[uncond, cond]`, anything else is conditional.

    PyTorch runs the hooks of a compiled UNet outside of the compiled code.
    """

    def __init__(self, unet: torch.nn.Module):
        self.adapters: list[RespoDiffAdapter] = []
        self.unet = _inner(unet)
        # Whether each chunk of the call that runs is steered; None before and after.
        self.steered: tuple[bool, ...] | None = None
        self.timesteps = torch.zeros(1)  # of the call that runs, (B,) or (1,)
        self._checked: Any = None
        self._last: Any = None
        middle = _inner(unet.mid_block)
        self._handles = [
            self.unet.register_forward_pre_hook(self, with_kwargs=True),
            self.unet.register_forward_hook(self, with_kwargs=True),
            middle.register_forward_hook(_MidBlockHook(self), with_kwargs=True),
        ]

    def remove(self, adapter: RespoDiffAdapter) -> None:
        self.adapters.remove(adapter)
        if not self.adapters:
            for handle in self._handles:
                handle.remove()

    @torch.compiler.disable
    def __call__(self, unet, args, kwargs, *output) -> None:
        if not any(adapter.active for adapter in self.adapters):
            self.steered = None
        elif output and self.steered is not None:
            raise ValueError(
                "the UNet ran without its steered mid-block, which was compiled or replaced after"
                " attach(): detach() the adapter, call torch.compiler.reset(), then attach() again"
            )
        elif not output:
            if torch.compiler.is_exporting() or torch.jit.is_tracing():
                raise ValueError(
                    "an exported UNet cannot be steered: the choice of concepts and of samples"
                    " would be baked in; detach() the adapter first"
                )
            call = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False))
            call |= kwargs
            self.steered = self._find(call["sample"], call["encoder_hidden_states"])
            self.timesteps = torch.as_tensor(call["timestep"]).reshape(-1)

    def _find(self, sample: torch.Tensor, states: torch.Tensor) -> tuple[bool, ...]:
        pipe = _calling_pipeline(self.unet)
        steered = None if pipe is None else _conditional_chunks(pipe)
        if self._checked != (checked := (pipe, len(sample), steered)):
            if pipe is not None:
                _check_calls(pipe)
            if steered is not None and not _are_copies(sample, len(steered)):
                raise ValueError(
                    f"{type(pipe).__name__} calls the UNet with {len(sample)} samples, which are"
                    f" not {len(steered)} copies of the same latents: the adapter cannot tell which"
                    " are conditional; detach() it, or use another pipeline"
                )
            self._checked = checked
        if steered is None:
            return self._find_without_pipeline(sample, states)
        self._last = None
        return steered

    def _find_without_pipeline(
        self, sample: torch.Tensor, states: torch.Tensor
    ) -> tuple[bool, ...]:
        doubled = _are_copies(sample, 2)
        steered = (False, True) if doubled else (True,)
        last, self._last = self._last, (sample, states, steered)
        unclear = None
        if (doubled and _are_copies(states, 2)) or _are_copies(sample, 3):
            unclear = "its latents repeat, and its text states are not [uncond, cond]"
        elif last is not None and last[0].shape == sample.shape:
            if last[2] != steered:
                unclear = "only some calls have latents that repeat"
            elif not doubled and torch.equal(last[0], sample) and not torch.equal(last[1], states):
                unclear = "it repeats the latents of the last call with other text states"
        if unclear:
            self._last = None
            raise ValueError(
                "a call of the UNet outside of a diffusers pipeline does not show which samples are"
                f" conditional: {unclear}. Give it cat([uncond, cond]), or make the unconditional"
                " call inside `with adapter.disabled():`"
            )
        return steered


class _MidBlockHook(_Hook):
    """Adds the deltas of all adapters. Dynamo can trace it."""

    def __init__(self, unet_hook: _UNetHook):
        self.unet_hook = unet_hook

    def __call__(self, module, args, kwargs, h: torch.Tensor) -> torch.Tensor | None:
        adapters = [adapter for adapter in self.unet_hook.adapters if adapter.active]
        if not adapters:
            return None
        steered, self.unet_hook.steered = self.unet_hook.steered, None
        if steered is None:
            raise ValueError(
                "the UNet's forward() is called directly, which runs no hooks: call it"
            )
        states = kwargs.get("encoder_hidden_states")
        states = states[0] if isinstance(states, tuple) else states  # with an IP-Adapter
        size, timesteps = len(h) // len(steered), self.unet_hook.timesteps
        chunks = []
        for i, is_steered in enumerate(steered):
            chunk, text = (x if x is None else x[i * size :][:size] for x in (h, states))
            times = timesteps if len(timesteps) == 1 else timesteps[i * size :][:size]
            if is_steered:
                delta = sum(adapter.delta(chunk, text, times) for adapter in adapters)
                chunk = (chunk.float() + delta).to(h.dtype)
            chunks.append(chunk)
        return torch.cat(chunks)


def _hook_of(unet: torch.nn.Module) -> _UNetHook | None:
    """What the adapters attached to this UNet share, if there are any."""
    hooks = _inner(unet.mid_block)._forward_hooks.values()
    hook = next((hook for hook in hooks if hasattr(hook, "is_respodiff_hook")), None)
    if hook is not None and not hasattr(hook, "unet_hook"):
        raise ValueError("an adapter of an older torch_adapter.py is attached: detach() it first")
    return None if hook is None else hook.unet_hook


def _inner(module: Any) -> Any:
    """The module itself, where `torch.compile` wraps it."""
    return getattr(module, "_orig_mod", module)


def _is_modular(pipe: Any) -> bool:
    return any(base.__name__ == "ModularPipeline" for base in type(pipe).__mro__)


def _calling_pipeline(unet: torch.nn.Module) -> Any:
    """The pipeline of this UNet that runs, None in a loop of one's own."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # Reading the variables of a frame costs much more than its name.
        if code.co_varnames[:1] == ("self",) and code.co_name not in _MODULE_METHODS:
            caller = frame.f_locals.get("self")
            bases = {base.__name__ for base in type(caller).__mro__}
            if (
                bases & {"DiffusionPipeline", "ModularPipeline"}
                and _inner(getattr(caller, "unet", None)) is unet
            ):
                return caller
        frame = frame.f_back
    return None


def _conditional_chunks(pipe: Any) -> tuple[bool, ...] | None:
    """Whether each chunk of the pipeline's next batch is conditional; None if it does not say."""
    if _is_modular(pipe):
        return (pipe.guider.is_conditional,)
    guidance_scale = getattr(pipe, "guidance_scale", None)  # a callback may change it half-way
    if guidance_scale is None:
        return None
    # A distilled UNet takes the guidance scale as input; its batch has no unconditional half.
    distilled = getattr(pipe.unet.config, "time_cond_proj_dim", None) is not None
    uncond = (False,) if guidance_scale > 1 and not distilled else ()
    return (*uncond, True) + (True,) * getattr(pipe, "do_perturbed_attention_guidance", False)


def _are_copies(x: torch.Tensor, count: int) -> bool:
    """Whether a batch consists of equal chunks, bit for bit."""
    if len(x) % count:
        return False
    first, *others = x.chunk(count)
    return all(torch.equal(first, other) for other in others)


def _check_calls(pipe: Any) -> None:
    """Refuses pipelines whose calls of the UNet the adapter cannot tell apart."""
    options = inspect.signature(type(pipe).__call__).parameters
    reason = next((f"its option {o} means" for o in _REFUSED_OPTIONS if o in options), None)
    if reason is None and not _is_modular(pipe) and not hasattr(type(pipe), "guidance_scale"):
        reason = "without the attribute guidance_scale it may make"
    if reason is not None:
        raise ValueError(
            f"{type(pipe).__name__} cannot take the adapter: {reason} batches of the UNet other"
            " than [uncond, cond]; detach() the adapter, or use a Stable Diffusion or SDXL pipeline"
        )


def _watch(pipe: Any) -> "list[RespoDiffAdapter]":
    """The adapters attached to a pipeline, which from now on follow `pipe.unet = ...`."""
    kind = type(pipe)
    if getattr(kind, "respodiff_pipe", None) is not pipe:
        plain = getattr(kind, "respodiff_plain", kind)

        def set_attribute(self, name: str, value: Any) -> None:
            moved = (
                self.respodiff_adapters if self is self.respodiff_pipe and name == "unet" else ()
            )
            moved = [a for a in moved if value is not None and a._hook.unet is not _inner(value)]
            for adapter in moved:
                adapter._check_fits(self, value)
            plain.__setattr__(self, name, value)
            for adapter in moved:
                adapter.attach(self)

        members = {"__module__": plain.__module__, "__setattr__": set_attribute}
        members |= {"respodiff_pipe": pipe, "respodiff_plain": plain, "respodiff_adapters": []}
        pipe.__class__ = type(plain.__name__, (plain,), members)
    return pipe.respodiff_adapters


def _unwatch(pipe: Any, adapter: RespoDiffAdapter) -> None:
    pipe.respodiff_adapters.remove(adapter)
    if not pipe.respodiff_adapters:
        pipe.__class__ = pipe.respodiff_plain


def _forget_compiled(unet: torch.nn.Module | None) -> None:
    """Drops the compiled code if this UNet has any; the next call compiles it again."""
    if (
        unet is None  # the user took it out of the pipeline, and may have compiled it
        or any(
            hasattr(module, "_orig_mod")
            or module._compiled_call_impl is not None
            or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
            for module in unet.modules()
        )
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
    group: str, members: Sequence[str], ratio: Mapping[str, float] | None
) -> list[Fraction]:
    """The exact share of each member."""
    if ratio is None:
        return [Fraction(1, len(members))] * len(members)
    if outside := sorted(set(ratio) - set(members)):
        raise ValueError(f"`ratio` names {outside}, but group {group!r} has {list(members)}")
    if not all(math.isfinite(share) and share >= 0 for share in ratio.values()):
        raise ValueError(f"`ratio` is {dict(ratio)}, expected shares of 0 or more")
    if abs(sum(ratio.values()) - 1) > 5e-3:
        raise ValueError(f"`ratio` sums to {sum(ratio.values()):g}, expected 1: {dict(ratio)}")
    # Fractions, so that 0.29 of 100 is 29.
    exact = [Fraction(float(ratio.get(name, 0))).limit_denominator(10**6) for name in members]
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
        text = path.read_bytes().decode("utf-8-sig")
        config = json.loads(text, object_pairs_hook=_without_repeated_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f'{path.name} does not say "format": "{FORMAT}"')
    version = config.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise ValueError(
            f"{path.name}: format_version is {version}, torch_adapter.py reads up to"
            f" {FORMAT_VERSION}; get a newer respodiff_jax"
        )
    try:
        _check(config, _CONFIG, "")
        half = config["guidance"].get("steered_half")
        if half != "conditional":
            raise ValueError(f"guidance.steered_half is {half!r:.100}, expected 'conditional'")
        for i, concept in enumerate(config["concepts"]):
            if not _fits_together(concept):
                raise ValueError(
                    f"concepts[{i}] has no target_prompt and no unsafe_prompt, or their number is"
                    " not that of its neutral_prompts"
                )
        names = [concept["name"] for concept in config["concepts"]]
        # JAX seeds a concept's random stream with this checksum.
        if not names or len({zlib.crc32(name.encode()) for name in names}) < len(names):
            raise ValueError(f"concepts are {names}, expected one or more, all different")
        json.dumps(config, ensure_ascii=False, allow_nan=False).encode()  # NaN, broken Unicode
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return config


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"an object repeats a key: {[key for key, _ in pairs]}")
    return found


def _check(value: Any, expected: Any, where: str) -> None:
    """Raises a ValueError if a value of the config is not as `_CONFIG` says."""
    if isinstance(expected, tuple):
        description, is_right = expected
        if not is_right(value):
            raise ValueError(f"{where} is {value!r:.100}, expected {description}")
    elif isinstance(expected, list):
        _check(value, _LIST, where)
        for i, item in enumerate(value):
            _check(item, expected[0], f"{where}[{i}]")
    else:
        _check(value, _MAPPING, where)
        keys = {key.rstrip("?~"): key for key in expected}
        required = {name for name, key in keys.items() if "?" not in key}
        for what, wrong in (("missing", required - value.keys()), ("unknown", value.keys() - keys)):
            if wrong:
                names = ", ".join(f"{where}.{name:.50}".lstrip(".") for name in sorted(wrong))
                raise ValueError(f"{names} is {what}")
        for name, item in value.items():
            if item is not None or "~" not in keys[name]:
                _check(item, expected[keys[name]], f"{where}.{name}".lstrip("."))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: Any, limit: float = torch.finfo(torch.float32).max) -> bool:
    return type(value) in (int, float) and abs(value) <= limit


def _is_rate(value: Any) -> bool:
    return _is_number(value, sys.float_info.max) and value >= 0


def _all(is_right: Any, value: Any) -> bool:
    """Whether a value is right, or each of a list of them."""
    return all(map(is_right, value if isinstance(value, list) else [value]))


def _are_accuracies(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(heads, dict) and all(map(_is_number, heads.values())) for heads in value.values()
    )


def _fits_together(concept: dict[str, Any]) -> bool:
    """Whether a concept has a target or something unsafe, for each of its neutral prompts."""
    neutral, target = concept["neutral_prompts"], concept.get("target_prompt")
    count = len(neutral) if isinstance(neutral, list) else 1
    for value in (target, concept.get("guidance_scale")):
        if isinstance(value, list) and len(value) != count:
            return False
    if concept.get("unsafe_prompt") is None:
        return target is not None
    return count == 1 or not isinstance(target, str)


# The schema of the config. A dict allows exactly these keys, a list has items of one kind, and a
# tuple is (description, check). A key with "?" may be missing, one with "~" may be null.
_TEXT = ("a text that is not empty", _is_text)
_STRING = ("a text", lambda value: isinstance(value, str))
_SIZE = ("a whole number of 1 or more", lambda value: type(value) is int and 1 <= value < 2**31)
_NUMBER = ("a finite number", _is_number)
_RATE = ("a number of 0 or more", _is_rate)
_LIST = ("a list", lambda value: isinstance(value, list))
_MAPPING = ("a mapping", lambda value: isinstance(value, dict))
_TEXTS = ("a text, or a list of them", lambda value: _all(_is_text, value))
_ANY = ("anything", lambda value: True)
_CONFIG = {
    "format": _STRING,
    "format_version": _SIZE,
    "module": {
        "kind": ("constant, mlp or conv", lambda value: value in ("constant", "mlp", "conv")),
        "mid_block_shape": {"channels": _SIZE, "height": _SIZE, "width": _SIZE},
        "hidden_channels~": _SIZE,
    },
    "backbone": {
        **{"name": _TEXT, "revision~": _STRING, "variant~": _STRING, "unet_sha256": _STRING},
        **{"resolution": _SIZE, "prediction_type": _TEXT},
    },
    "guidance": _MAPPING,
    "concepts": [
        {
            **{"name": _TEXT, "group": _TEXT, "slug?": _ANY, "default_scale?": _NUMBER},
            **{"lambda_sem?": _RATE, "lr_ram?": _RATE, "lr_sam?": _RATE},
            "neutral_prompts": ("one text or more", lambda v: v != [] and _all(_is_text, v)),
            "target_prompt?~": _TEXTS,
            "unsafe_prompt?~": _TEXT,
            "guidance_scale?": (
                "positive numbers",
                lambda value: _all(lambda number: _is_rate(number) and number > 0, value),
            ),
            "words?": _TEXTS,
            "max_timestep?~": (
                "a whole number of 0 or more",
                lambda value: type(value) is int and 0 <= value < 2**24,
            ),
        }
    ],
    "training~": _MAPPING,
    "metrics?~": [
        {
            **{"metric": _STRING, "attribute~": _STRING, "images": _STRING, "value": _NUMBER},
            "interval~": (
                "two numbers",
                lambda v: isinstance(v, list) and len(v) == 2 == sum(map(_is_number, v)),
            ),
            "n": ("a whole number", lambda value: type(value) is int),
        }
    ],
    "reading?~": {
        "text_features": _SIZE,
        "accuracy": ("numbers by group and head", _are_accuracies),
    },
}


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
    kind, shape = module["kind"], module["mid_block_shape"]
    channels = shape["channels"]
    if kind == "constant":
        return {"constant": (channels, shape["height"], shape["width"])}
    hidden = module["hidden_channels"] or max(channels // 4, 1)
    kernel = (3, 3) if kind == "conv" else ()
    return {
        "hidden.weight": (hidden, channels, *kernel),
        "hidden.bias": (hidden,),
        "out.weight": (channels, hidden, *kernel),
        "out.bias": (channels,),
    }
