"""The PyTorch side of a comparison: the published training procedure, and diffusers' pipeline.

`Procedure` trains one concept as the paper's authors do. It is plain PyTorch, written from the
paper's equations, on diffusers' own UNet with a forward hook at `mid_block`. It shares no code with
the rest of the package and does not import JAX; the tests compare the training step with it.

A training sample takes `k ~ U{0 .. num_steps - 2}` guided steps from pure noise, then four
predictions and two backward passes. As in the authors' code every prediction has a conditional and
an unconditional half, even the neutral ones at guidance 1, where the unconditional half cancels.
Gradients of frozen parameters are not computed.

Deviation: the authors give the UNet timestep `1000 - 20 k` with the latent of timestep
`981 - 20 k`; here, as in the rest of the package, it gets the latent's timestep.

Tensors are NCHW.
"""

import dataclasses
import pathlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import silu
from torch.utils.flop_counter import FlopCounterMode


def to_torch(x: Any) -> torch.Tensor:
    """NHWC array -> float32 NCHW tensor; an array without four axes keeps its axes."""
    x = torch.tensor(np.asarray(x, np.float32))
    return x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x


class Conditions(NamedTuple):
    """The UNet's conditioning on B prompts: `(B, L, D)`; for SDXL also `(B, P)` and `(B, 6)`."""

    context: torch.Tensor
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    @classmethod
    def of(cls, arrays: Sequence[Any], device: str | torch.device = "cpu") -> "Conditions":
        """Converts three arrays; None stays None."""
        return cls(*(None if x is None else to_torch(x).to(device) for x in arrays))

    def rows(self, index: Sequence[int]) -> "Conditions":
        """The prompts with these indices."""
        return Conditions(*(None if x is None else x[list(index)] for x in self))

    def followed_by(self, other: "Conditions") -> "Conditions":
        pairs = zip(self, other, strict=True)
        return Conditions(*(None if a is None else torch.cat([a, b]) for a, b in pairs))


class TorchModule(torch.nn.Module):
    """RAM or SAM with one concept's Flax parameters."""

    def __init__(self, kind: str, params: Mapping[str, Any]):
        super().__init__()
        self.kind = kind
        if kind == "constant":
            constant = np.asarray(params["constant"]).transpose(2, 0, 1)
            self.constant = torch.nn.Parameter(torch.tensor(constant))
            return
        kernels = {name: np.asarray(params[name]["kernel"]) for name in ("hidden", "out")}
        for name, kernel in kernels.items():
            if kind == "mlp":
                layer = torch.nn.Linear(*kernel.shape)
                weight = kernel.T
            else:
                layer = torch.nn.Conv2d(*kernel.shape[2:], 3, padding=1)
                weight = kernel.transpose(3, 2, 0, 1)
            with torch.no_grad():
                layer.weight.copy_(torch.tensor(weight))
                layer.bias.copy_(torch.tensor(np.asarray(params[name]["bias"])))
            setattr(self, name, layer)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if self.kind == "constant":
            return self.constant
        if self.kind == "mlp":
            x = h.permute(0, 2, 3, 1)
            return self.out(silu(self.hidden(x))).permute(0, 3, 1, 2)
        return self.out(silu(self.hidden(h)))

    def flax(self, grads: bool = False) -> dict[str, Any]:
        """Parameters (or their gradients) in the Flax layout, as numpy arrays."""

        def array(parameter, *axes):
            tensor = parameter.grad if grads else parameter.detach()
            return (tensor.permute(*axes) if axes else tensor).cpu().numpy().copy()

        if self.kind == "constant":
            return {"constant": array(self.constant, 1, 2, 0)}
        axes = (1, 0) if self.kind == "mlp" else (2, 3, 1, 0)
        return {
            name: {"kernel": array(layer.weight, *axes), "bias": array(layer.bias)}
            for name, layer in (("hidden", self.hidden), ("out", self.out))
        }


@dataclasses.dataclass(eq=False)
class Procedure:
    """The training of one concept.

    Args:
      unet: diffusers' PyTorch UNet, of any float dtype; it is frozen.
      scheduler: a `DDIMScheduler` with its timesteps set.
      ram, sam: the modules, trained in place.
      lr_ram, lr_sam, lambda_sem, guidance_scale: the concept's hyper-parameters.
      rollout_guidance_scale: guidance of the neutral trajectories.
      betas, eps: options of both Adam optimisers.
    """

    unet: UNet2DConditionModel
    scheduler: DDIMScheduler
    ram: TorchModule
    sam: TorchModule
    _: dataclasses.KW_ONLY
    lr_ram: float
    lr_sam: float
    lambda_sem: float
    guidance_scale: float
    rollout_guidance_scale: float = 3.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self):
        self.unet.requires_grad_(False)
        adam = {"betas": self.betas, "eps": self.eps}
        self.adam_ram = torch.optim.Adam(self.ram.parameters(), lr=self.lr_ram, **adam)
        self.adam_sam = torch.optim.Adam(self.sam.parameters(), lr=self.lr_sam, **adam)

    def guided(
        self,
        z: torch.Tensor,
        timestep: torch.Tensor,
        cond: Conditions,
        uncond: Conditions,
        guidance_scale: float,
        modules: Sequence[TorchModule] = (),
    ) -> torch.Tensor:
        """The UNet's guided output, float32; the modules' sum steers the conditional half."""

        def add(_, __, h):
            h_uncond, h_cond = h.chunk(2)
            steered = h_cond.float() + sum(module(h_cond.float()) for module in modules)
            return torch.cat([h_uncond, steered.to(h.dtype)])

        dtype = self.unet.dtype
        both = Conditions(*(x if x is None else x.to(dtype) for x in uncond.followed_by(cond)))
        added = None
        if both.pooled is not None:
            added = {"text_embeds": both.pooled, "time_ids": both.time_ids}
        hook = self.unet.mid_block.register_forward_hook(add) if modules else None
        try:
            output = self.unet(
                torch.cat([z, z]).to(dtype), timestep, both.context, added_cond_kwargs=added
            ).sample
        finally:
            if hook:
                hook.remove()
        output_uncond, output_cond = output.float().chunk(2)
        return output_uncond + guidance_scale * (output_cond - output_uncond)

    def noise(self, z: torch.Tensor, timestep: torch.Tensor, *args: Any) -> torch.Tensor:
        """The noise that `guided` predicts."""
        output = self.guided(z, timestep, *args)
        if self.scheduler.config.prediction_type == "epsilon":
            return output
        alpha_bar = self.scheduler.alphas_cumprod[timestep]
        return alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * z

    @torch.no_grad()
    def rollout(
        self, noise: torch.Tensor, steps: int, neutral: Conditions, empty: Conditions
    ) -> torch.Tensor:
        """Guided DDIM steps from noise, steered by RAM and SAM."""
        z, modules = noise, (self.ram, self.sam)
        for timestep in self.scheduler.timesteps[:steps]:
            output = self.guided(z, timestep, neutral, empty, self.rollout_guidance_scale, modules)
            z = self.scheduler.step(output, timestep, z).prev_sample
        return z

    def step(
        self,
        z: torch.Tensor,
        ddim_index: int,
        neutral: Conditions,
        empty: Conditions,
        target_cond: Conditions,
        target_uncond: Conditions,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """RAM's update, then SAM's with the updated RAM; returns both losses."""
        timestep = self.scheduler.timesteps[ddim_index]
        with torch.no_grad():
            eps_neutral = self.noise(z, timestep, neutral, empty, 1.0)
            target = self.noise(z, timestep, target_cond, target_uncond, self.guidance_scale)

        eps_ram = self.noise(z, timestep, neutral, empty, 1.0, (self.ram,))
        loss_resp = (eps_ram - target).square().mean()
        self.adam_ram.zero_grad()
        loss_resp.backward()
        self.adam_ram.step()

        eps_both = self.noise(z, timestep, neutral, empty, 1.0, (self.ram, self.sam))
        loss_sem = self.lambda_sem * (eps_both - eps_neutral).square().mean()
        self.adam_sam.zero_grad()
        loss_sem.backward(inputs=list(self.sam.parameters()))
        self.adam_sam.step()
        return loss_resp.detach(), loss_sem.detach()


class Prompts(NamedTuple):
    """One concept's prompts.

    The leading axis of `neutral` and `target_cond` is the number of neutral prompts, that of the
    others is 1.
    """

    neutral: Conditions
    target_cond: Conditions
    target_uncond: Conditions
    empty: Conditions


@dataclasses.dataclass(eq=False)
class Training:
    """The training of several concepts, each by its own `Procedure`; they share only the UNet.

    Args:
      concepts: each concept's procedure and prompts.
      latent_shape: `(c, h, w)`.
      batch_size: samples of each concept in a step.
      seed: of prompts, noise and rollout lengths.
    """

    concepts: Sequence[tuple[Procedure, Prompts]]
    latent_shape: tuple[int, int, int]
    batch_size: int
    seed: int

    def __post_init__(self):
        self._shape = (self.batch_size, *self.latent_shape)
        self._rng = random.Random(self.seed)
        self._generator = torch.Generator().manual_seed(self.seed)

    def scale_learning_rates(self, factor: float) -> None:
        """Sets all learning rates to `factor` times the concepts' own."""
        for procedure, _ in self.concepts:
            procedure.adam_ram.param_groups[0]["lr"] = factor * procedure.lr_ram
            procedure.adam_sam.param_groups[0]["lr"] = factor * procedure.lr_sam

    def step(self, rollout_length: int | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Takes one step of every concept, after a rollout of this or of random length.

        Returns:
          Both losses of each concept.
        """
        losses = []
        for procedure, prompts in self.concepts:
            k = rollout_length
            if k is None:
                k = self._rng.randrange(len(procedure.scheduler.timesteps) - 1)
            picks = [
                self._rng.randrange(len(prompts.neutral.context)) for _ in range(self._shape[0])
            ]
            neutral, target_cond = prompts.neutral.rows(picks), prompts.target_cond.rows(picks)
            target_uncond, empty = (
                c.rows([0] * len(picks)) for c in (prompts.target_uncond, prompts.empty)
            )
            noise = torch.randn(self._shape, generator=self._generator)
            noise = noise.to(neutral.context.device)
            z_t = procedure.rollout(noise, k, neutral, empty)
            losses.append(procedure.step(z_t, k, neutral, empty, target_cond, target_uncond))
        return losses

    def evaluations_per_sample(self) -> float:
        """The average number of UNet evaluations for a training sample; takes two training steps.

        It is the FLOPs of a training step over those of one plain forward pass with the same batch.
        Every step of a rollout costs the same, so two lengths give the mean.
        """
        procedure, prompts = self.concepts[0]
        batch_size = self._shape[0]
        conditions = prompts.neutral.rows([0] * batch_size)
        added = {"text_embeds": conditions.pooled, "time_ids": conditions.time_ids}
        z_t = torch.zeros(self._shape, device=conditions.context.device)
        dtype = procedure.unet.dtype
        one = _flops(
            lambda: procedure.unet(
                z_t.to(dtype), 1, conditions.context.to(dtype), added_cond_kwargs=added
            )
        )
        losses, with_a_rollout_step = (_flops(lambda k=k: self.step(k)) for k in (0, 1))
        mean_length = (len(procedure.scheduler.timesteps) - 2) / 2
        total = losses + mean_length * (with_a_rollout_step - losses)
        return total / (len(self.concepts) * one)


def _flops(function: Callable[[], Any]) -> int:
    """FLOPs of a call, including its backward passes."""
    # The counter misses fused attention on some devices, but never plain attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def load_unet(
    folder: pathlib.Path, num_steps: int, dtype: str, device: str
) -> tuple[UNet2DConditionModel, DDIMScheduler]:
    """Loads the UNet of a diffusers folder, and its DDIM schedule with `num_steps` steps."""
    options = {"subfolder": "unet", "torch_dtype": getattr(torch, dtype)}
    diffusers_logging.disable_progress_bar()
    unet = UNet2DConditionModel.from_pretrained(folder, **options)
    # As in pipelines: latents are not clipped to [-1, 1].
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", clip_sample=False)
    scheduler.set_timesteps(num_steps)
    return unet.to(device).eval(), scheduler


def load_sampler(
    folder: pathlib.Path, dtype: str, device: str, **options: Any
) -> Callable[[Sequence[str], Sequence[int]], np.ndarray]:
    """Loads diffusers' pipeline from a folder, with DDIM; `options` are arguments of its calls.

    Returns:
      A function from prompts and seeds to images, float32 `(B, height, width, 3)` in [0, 1].
    """
    diffusers_logging.disable_progress_bar()
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
    pipe = pipe.to(device)
    if device == "cuda":  # as diffusers' documentation recommends for speed
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        for part in ("unet", "vae"):
            setattr(pipe, part, getattr(pipe, part).to(memory_format=torch.channels_last))
        pipe.unet = torch.compile(pipe.unet)
        pipe.vae.decode = torch.compile(pipe.vae.decode)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)

    def sample(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(list(prompts), generator=generators, output_type="np", **options).images

    return sample


def device_for(backend: str) -> str | None:
    """The torch device for a JAX backend ("cpu", "gpu" or "tpu"); None if PyTorch has none."""
    if backend == "cpu":
        return "cpu"
    return "cuda" if backend == "gpu" and torch.cuda.is_available() else None


def synchronise() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> dict[str, Any] | None:
    """Peak memory of tensors on the GPU; None on a CPU, where PyTorch does not count them."""
    if not torch.cuda.is_initialized():
        return None
    return {"bytes": torch.cuda.max_memory_allocated(), "of": "process, measured"}
