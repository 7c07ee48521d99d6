"""The published training procedure in plain PyTorch, written from the paper's equations.

Independent of the package: it drives diffusers' own UNet through a forward hook on `mid_block`.
Tensors are NCHW; `to_torch` and `to_jax` convert.
"""

import numpy as np
import torch


def to_torch(x) -> torch.Tensor:
    """NHWC array (or any without four axes) -> NCHW tensor."""
    x = torch.tensor(np.asarray(x, np.float32))
    return x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x


class TorchModule(torch.nn.Module):
    """RAM or SAM from one concept's Flax parameters."""

    def __init__(self, kind: str, params: dict):
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

    def forward(self, h):
        if self.kind == "constant":
            return self.constant
        if self.kind == "mlp":
            x = h.permute(0, 2, 3, 1)
            return self.out(torch.nn.functional.silu(self.hidden(x))).permute(0, 3, 1, 2)
        return self.out(torch.nn.functional.silu(self.hidden(h)))

    def flax(self, grads: bool = False) -> dict:
        """Parameters (or their gradients) in the Flax layout."""

        def array(parameter, *axes):
            tensor = parameter.grad if grads else parameter.detach()
            return tensor.permute(*axes).numpy() if axes else tensor.numpy()

        if self.kind == "constant":
            return {"constant": array(self.constant, 1, 2, 0)}
        axes = (1, 0) if self.kind == "mlp" else (2, 3, 1, 0)
        return {
            name: {"kernel": array(layer.weight, *axes), "bias": array(layer.bias)}
            for name, layer in (("hidden", self.hidden), ("out", self.out))
        }


class Reference:
    """One concept's training, batch by batch.

    Args:
      unet: diffusers' PyTorch UNet.
      scheduler: a `DDIMScheduler` with its timesteps set.
      ram, sam: the modules, trained in place.
      lr_ram, lr_sam, lambda_sem, guidance_scale: of the concept.
    """

    def __init__(self, unet, scheduler, ram, sam, *, lr_ram, lr_sam, lambda_sem, guidance_scale):
        self.unet, self.scheduler = unet.requires_grad_(False), scheduler
        self.ram, self.sam = ram, sam
        self.lambda_sem, self.guidance_scale = lambda_sem, guidance_scale
        adam = {"betas": (0.9, 0.999), "eps": 1e-8}
        self.adam_ram = torch.optim.Adam(ram.parameters(), lr=lr_ram, **adam)
        self.adam_sam = torch.optim.Adam(sam.parameters(), lr=lr_sam, **adam)

    def model(self, z, timestep, cond, modules=(), rows=slice(None)):
        """The UNet's output with the modules' sum added to `rows` of the mid-block output."""

        def add(_, __, h):
            steered = h.clone()
            steered[rows] += sum(module(h[rows]) for module in modules)
            return steered

        hook = self.unet.mid_block.register_forward_hook(add) if modules else None
        added = None
        if cond.pooled is not None:
            added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
        try:
            return self.unet(z, timestep, cond.context, added_cond_kwargs=added).sample
        finally:
            if hook:
                hook.remove()

    def eps(self, z, timestep, cond, modules=()):
        output = self.model(z, timestep, cond, modules)
        if self.scheduler.config.prediction_type == "epsilon":
            return output
        alpha_bar = self.scheduler.alphas_cumprod[timestep]
        return alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * z

    @torch.no_grad()
    def rollout(self, noise, steps, neutral, empty, guidance_scale):
        """Guided DDIM steps from noise, RAM and SAM on the conditional half only."""
        z, both = noise, type(neutral)(*map(_cat, neutral, empty))
        for timestep in self.scheduler.timesteps[:steps]:
            rows = slice(0, len(z))
            output = self.model(torch.cat([z, z]), timestep, both, (self.ram, self.sam), rows)
            cond, uncond = output.chunk(2)
            guided = uncond + guidance_scale * (cond - uncond)
            z = self.scheduler.step(guided, timestep, z).prev_sample
        return z

    def step(self, z, ddim_index, neutral, target_cond, target_uncond):
        """RAM's update, then SAM's with the updated RAM; returns both losses."""
        timestep = self.scheduler.timesteps[ddim_index]
        with torch.no_grad():
            eps_neutral = self.eps(z, timestep, neutral)
            eps_tar = self.eps(z, timestep, target_cond)
            eps_unc = self.eps(z, timestep, target_uncond)
            target = eps_unc + self.guidance_scale * (eps_tar - eps_unc)

        loss_resp = (self.eps(z, timestep, neutral, (self.ram,)) - target).square().mean()
        self.adam_ram.zero_grad()
        loss_resp.backward()
        self.adam_ram.step()

        difference = self.eps(z, timestep, neutral, (self.ram, self.sam)) - eps_neutral
        loss_sem = self.lambda_sem * difference.square().mean()
        self.adam_sam.zero_grad()
        loss_sem.backward(inputs=list(self.sam.parameters()))
        self.adam_sam.step()
        return loss_resp.item(), loss_sem.item()


def _cat(a, b):
    return None if a is None else torch.cat([a, b])
