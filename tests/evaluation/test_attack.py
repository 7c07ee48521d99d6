"""The attacker: its mathematics equals PyTorch's, and a search finds what it is to find."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from evaluations import constant_adapter

from respodiff_jax.adapters.combined import select, steerings
from respodiff_jax.backbone import load_backbone
from respodiff_jax.evaluation.attack import search as attack
from respodiff_jax.method.schedule import Schedule

WORDS = ["man woman", "person a"]  # K = 2
PROMPTS = ["a man", "a woman, 35"]
SCHEDULE_STEPS = 5


@pytest.fixture(scope="module", params=["sd_folder", "sdxl_folder"])
def pair(request):
    """The same model in JAX and in PyTorch."""
    folder = request.getfixturevalue(request.param)
    return load_backbone(folder), DiffusionPipeline.from_pretrained(folder)


def make_case(backbone, adapter, weights, prompts=PROMPTS, words=WORDS, seed=0):
    """A victim and a case of two prompts, with words before them."""
    resolution = backbone.default_resolution
    schedule = Schedule.from_config(backbone.scheduler_config, SCHEDULE_STEPS)
    modules = () if adapter is None else (adapter.module,)
    victim = attack.Victim(backbone, modules, schedule, resolution)
    ids = backbone.tokenise([f"{w} {p}" for w, p in zip(words, prompts, strict=True)])
    keys = jax.random.split(jax.random.key(seed), len(prompts))
    z_0 = jax.random.normal(jax.random.key(7), (len(prompts), *backbone.latent_shape(resolution)))
    chosen = () if adapter is None else steerings(adapter, weights)
    return victim, attack.Case(keys, z_0, tuple(ids), chosen)


def torch_loss_and_gradient(pipeline, victim, case, draws, delta):
    """The loss of each prompt, and its gradient at the one-hot vectors of the K words."""
    encoders = [pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
    encoders = [e for e in encoders if e is not None]
    size = encoders[0].config.vocab_size
    ids = [torch.from_numpy(np.array(i)).long() for i in case.ids]
    one_hot = torch.nn.functional.one_hot(ids[0][:, 1:3], size).float().requires_grad_()
    hidden, pooled = [], None
    for encoder, own in zip(encoders, ids, strict=True):
        table = encoder.get_input_embeddings()

        def replace(module, args, output):
            words = one_hot @ module.weight
            return torch.cat([output[:, :1], words, output[:, 3:]], dim=1)

        handle = table.register_forward_hook(replace)
        out = encoder(own, output_hidden_states=True)
        handle.remove()
        hidden.append(out.hidden_states[-2] if len(encoders) > 1 else out.last_hidden_state)
        pooled = getattr(out, "text_embeds", None)
    context = torch.cat(hidden, dim=-1)
    count = draws.eps.shape[1]
    index = torch.from_numpy(np.array(draws.ddim_index)).reshape(-1)
    eps = torch.from_numpy(np.array(jnp.moveaxis(draws.eps, -1, 2))).flatten(0, 1)
    level = torch.from_numpy(np.array(victim.schedule.alpha_bars))[index][:, None, None, None]
    z_0 = torch.from_numpy(np.array(jnp.moveaxis(case.z_0, -1, 1))).repeat_interleave(count, 0)
    z_t = level.sqrt() * z_0 + (1 - level).sqrt() * eps
    timesteps = torch.from_numpy(np.array(victim.schedule.timesteps))[index]
    added = None
    if pooled is not None:
        side = victim.resolution
        time_ids = torch.tensor([[side, side, 0, 0, side, side]] * len(z_t)).float()
        added = {"text_embeds": pooled.repeat_interleave(count, 0), "time_ids": time_ids}
    delta = torch.from_numpy(np.array(jnp.moveaxis(delta, -1, 1))).repeat_interleave(count, 0)
    handle = pipeline.unet.mid_block.register_forward_hook(lambda m, a, out: out + delta)
    context = context.repeat_interleave(count, 0)
    output = pipeline.unet(z_t, timesteps, context, added_cond_kwargs=added).sample
    handle.remove()
    losses = (output - eps).square().mean((1, 2, 3)).reshape(-1, count).mean(1)
    (gradient,) = torch.autograd.grad(losses.sum(), one_hot)
    return losses.detach().numpy(), gradient.numpy()


def test_loss_one_hot_gradient_and_projection_equal_pytorch(pair):
    backbone, pipeline = pair
    adapter = select(constant_adapter(backbone, 0.5), ["anti-violence"])
    weights = np.float32([[1.0], [0.5]])
    victim, case = make_case(backbone, adapter, weights)
    draws = attack.draw(case.keys, 3, victim.schedule, case.z_0.shape[1:])
    tables = backbone.token_tables(backbone.params)
    vectors = [jnp.asarray(t)[i[:, 1:3]] for t, i in zip(tables, case.ids, strict=True)]

    def loss(vectors):
        each = attack.denoising_loss(victim, backbone.params, (None,), case, draws, vectors)
        return each.sum(), each

    (_, losses), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(vectors)
    gradient = attack.one_hot_gradient(gradients, tables)

    own = adapter.ram["constant"][0] + adapter.sam["constant"][0]
    delta = weights[:, 0, None, None, None] * own[None]
    expected, expected_gradient = torch_loss_and_gradient(pipeline, victim, case, draws, delta)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    scale = np.abs(expected_gradient).max()
    assert scale > 1e-5
    np.testing.assert_allclose(gradient / scale, expected_gradient / scale, atol=2e-3)
    allowed = np.arange(gradient.shape[-1]) % 2 == 0
    masked = torch.from_numpy(-expected_gradient).masked_fill(~torch.from_numpy(allowed), -np.inf)
    np.testing.assert_array_equal(attack.project(-gradient, allowed), masked.argmax(-1))
