"""The streaming rollout: whole trajectories, the paper's indices, the numbers of PyTorch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import DDIMScheduler
from test_train_step import NUM_STEPS, VIOLENCE, WOMAN, conditions_of, make_reference, setup

from respodiff_jax.backbone import load_backbone
from respodiff_jax.bench.torch_side import to_torch
from respodiff_jax.method.rollout import Samples, StreamingRollout
from respodiff_jax.method.schedule import Schedule
from respodiff_jax.training.config import default
from respodiff_jax.training.spec import make_rollout

SHAPE = (2, 2, 1)


def fly(rollout, num_samples, steps):
    """Indices and prompts at each step, `(steps, B)`, for a model that predicts no noise."""
    keys = jax.vmap(jax.random.key)(jnp.arange(num_samples))
    state = rollout.init(Samples(keys, jnp.int32(3), SHAPE))

    @jax.jit
    def one(state, step):
        now = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
        samples = Samples(now, jnp.int32(3), SHAPE)
        latents = rollout.draw(state, samples, pytest.fail)
        return rollout.advance(state, samples, latents, jnp.zeros_like(latents.z_t)), latents

    seen, prompts = [], []
    for step in range(steps):
        state, draw = one(state, jnp.int32(step))
        seen.append(np.asarray(draw.ddim_index))
        prompts.append(np.asarray(draw.prompt_index))
    return np.stack(seen), np.stack(prompts)


@pytest.mark.parametrize(("num_steps", "stride"), [(6, 1), (6, 2), (50, 5)])
def test_indices_become_uniform_and_trajectories_are_whole(num_steps, stride):
    length, num_samples = num_steps - 1, 8000
    rollout = StreamingRollout(Schedule.from_config({}, num_steps), stride)
    longest = math.ceil(length / stride)
    seen, prompts = fly(rollout, num_samples, 3 * longest)
    assert set(np.unique(seen)) == set(range(length))  # k ~ U{0 .. num_steps - 2}
    # Once every first trajectory has ended, each step sees all indices equally often.
    expected = num_samples / length
    for indices in seen[longest:]:
        counts = np.bincount(indices, minlength=length)
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    # An index counts up to the end of its trajectory. The next trajectory has a new prompt.
    begins = np.diff(seen, axis=0) != stride
    ends = np.cumsum(begins, axis=0) > 1  # the first trajectory may end anywhere
    assert (seen[:-1][begins & ends] + stride >= length).all()
    assert set(seen[1:][begins]) == set(range(stride))
    assert len(np.unique(prompts)) == 3
    assert not np.diff(prompts, axis=0)[~begins].any()


@pytest.mark.parametrize(
    ("num_steps", "trajectory_steps", "stride"),
    [(50, 10, 5), (50, 49, 1), (4, 10, 1), (50, 20, 3), (50, 1, 49)],
)
def test_trajectories_have_at_most_the_configured_number_of_steps(
    num_steps, trajectory_steps, stride
):
    config = default().rollout
    config.update(kind="streaming", trajectory_steps=trajectory_steps)
    rollout = make_rollout(config, Schedule.from_config({}, num_steps))
    assert rollout.stride == stride
    assert math.ceil((num_steps - 1) / stride) <= trajectory_steps


def ddim_step(scheduler, output, z_t, timestep, to_timestep):
    """A DDIM step by the paper's formula, in PyTorch."""
    alpha, to = (float(scheduler.alphas_cumprod[t]) for t in (timestep, to_timestep))
    if scheduler.config.prediction_type == "epsilon":
        eps, z_0 = output, (z_t - (1 - alpha) ** 0.5 * output) / alpha**0.5
    else:
        eps = alpha**0.5 * output + (1 - alpha) ** 0.5 * z_t
        z_0 = alpha**0.5 * z_t - (1 - alpha) ** 0.5 * output
    return to**0.5 * z_0 + (1 - to) ** 0.5 * eps


def in_flight(state):
    """The trajectory of the first concept's first sample."""
    return jax.tree.map(lambda x: x[0, 0], state.concepts.rollout)


def check_against_pytorch(folder, concept, steps, stride, **changes):
    """Trains one sample and compares every latent, restart and loss with PyTorch."""
    backbone = load_backbone(str(folder), dtype="float32")
    changes |= {"module.init": "uniform", "rollout.kind": "streaming"}
    changes |= {"rollout.trajectory_steps": NUM_STEPS // stride}
    spec, arrays, state, step = setup(backbone, [concept], 1, **changes)
    ram = jax.tree.map(lambda x: 5 * x, state.concepts.ram)
    state = state.replace(concepts=state.concepts.replace(ram=ram))
    reference = make_reference(folder, spec, state, concept)
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(NUM_STEPS)
    restarts = 0
    for i in range(steps):
        before = in_flight(state)
        index, prompt = int(before.ddim_index), int(before.prompt_index)
        conditions = neutral, empty, *_ = conditions_of(arrays, concept, [prompt])
        z_t = to_torch(before.z_t[None])
        sam = {name: value.clone() for name, value in reference.sam.state_dict().items()}
        losses = reference.step(z_t, index, *conditions)
        state, metrics = step(state, backbone.params, arrays, jnp.arange(1))
        ours = (metrics.loss_resp[0], metrics.loss_sem[0])
        np.testing.assert_allclose(ours, losses, rtol=1e-4)

        after = in_flight(state)
        if index + stride > int(before.last_index):
            restarts += 1
            # The documented random streams: run -> step -> concept -> sample -> prompt and noise.
            _, samples_key = jax.random.split(jax.random.fold_in(jax.random.key(3), i))
            concept_key = jax.random.fold_in(samples_key, concept.stream)
            noise_key = jax.random.split(jax.random.fold_in(concept_key, 0))[1]
            expected = jax.random.normal(noise_key, spec.latent_shape)
            assert 0 <= int(after.ddim_index) < stride
            assert int(after.last_index) == NUM_STEPS - 2
        else:
            # The trajectory advances with the updated RAM and the SAM from before the step.
            updated = {name: value.clone() for name, value in reference.sam.state_dict().items()}
            reference.sam.load_state_dict(sam)
            timestep, to_timestep = (scheduler.timesteps[i] for i in (index, index + stride))
            modules = (reference.ram, reference.sam)
            guided = reference.guided(z_t, timestep, neutral, empty, 3.0, modules).detach()
            reference.sam.load_state_dict(updated)
            expected = ddim_step(scheduler, guided, z_t, timestep, to_timestep)
            expected = expected[0].permute(1, 2, 0)
            assert int(after.ddim_index) == index + stride
        np.testing.assert_allclose(after.z_t, expected, atol=2e-4)
    assert 0 < restarts < steps


@pytest.mark.slow
def test_streaming_step_equals_pytorch(sd_folder):
    check_against_pytorch(sd_folder, WOMAN, steps=12, stride=1)


def test_streaming_step_equals_pytorch_for_safety_and_v_prediction(sd_v_folder):
    check_against_pytorch(sd_v_folder, VIOLENCE, steps=7, stride=2, **{"module.kind": "mlp"})
