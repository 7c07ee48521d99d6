"""The schedule and DDIM against diffusers' PyTorch scheduler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from respodiff_jax.errors import UserError
from respodiff_jax.method import diffusion

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
CONFIGS = {
    "sd1": STABLE_DIFFUSION,
    "sd2": STABLE_DIFFUSION | {"prediction_type": "v_prediction"},
    "linear": {"clip_sample": False},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
    "trailing": STABLE_DIFFUSION | {"timestep_spacing": "trailing"},
    "linspace": STABLE_DIFFUSION | {"timestep_spacing": "linspace", "steps_offset": 0},
    "zero_snr": STABLE_DIFFUSION
    | {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_steps", [50, 7])
def test_ddim_equals_diffusers(name, num_steps):
    config = CONFIGS[name]
    theirs = DDIMScheduler.from_config(config)
    theirs.set_timesteps(num_steps)
    ours = diffusion.Schedule.from_config(config, num_steps)
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())

    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 4, 4, 4), np.float32)
    reference = torch.tensor(z)
    for i, timestep in enumerate(theirs.timesteps):
        output = rng.standard_normal(z.shape, np.float32)
        z = diffusion.ddim_step(ours, output, z, jnp.int32(i))
        reference = theirs.step(torch.tensor(output), timestep, reference).prev_sample
    scale = float(reference.abs().max())
    np.testing.assert_allclose(z / scale, reference.numpy() / scale, atol=1e-5)


def test_ddim_step_takes_a_different_index_for_each_sample():
    schedule = diffusion.Schedule.from_config(CONFIGS["sd2"], 50)
    z = np.random.default_rng(0).standard_normal((3, 2, 2, 4), np.float32)
    index = np.array([0, 20, 49])
    together = diffusion.ddim_step(schedule, 2 * z, z, index)
    for i in range(3):
        alone = diffusion.ddim_step(schedule, 2 * z[i : i + 1], z[i : i + 1], index[i])
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-6)


def test_eps_and_v_predictions_give_the_same_noise():
    """Both outputs for a known (z_0, eps) give back that eps."""
    z_0, eps = np.random.default_rng(0).standard_normal((2, 1, 2, 2, 4), np.float32)
    for name in ("sd1", "sd2"):
        schedule = diffusion.Schedule.from_config(CONFIGS[name], 50)
        signal, noise = np.sqrt(schedule.alpha_bars[20]), np.sqrt(1 - schedule.alpha_bars[20])
        z_t = signal * z_0 + noise * eps
        output = eps if name == "sd1" else signal * eps - noise * z_0
        found = diffusion.predict_eps(schedule, output, z_t, jnp.int32(20))
        np.testing.assert_allclose(found, eps, atol=1e-5)


def test_guidance_equals_hand_computation():
    cond, uncond = (jnp.full((1, 1, 1, 1), value) for value in (3.0, 1.0))
    assert diffusion.cfg_combine(cond, uncond, 7.5) == 16.0
    assert diffusion.cfg_combine(cond, uncond, 1.0) == 3.0


@pytest.mark.parametrize(
    ("change", "num_steps", "message"),
    [
        ({"prediction_type": "sample"}, 50, "prediction_type is 'sample'"),
        ({"beta_schedule": "sigmoid"}, 50, "beta_schedule is 'sigmoid'"),
        ({"timestep_spacing": "odd"}, 50, "timestep_spacing is 'odd'"),
        ({}, 0, "steps is 0, expected 1..1000"),
        ({"steps_offset": 1}, 1000, "ask for timestep 1000"),
    ],
)
def test_wrong_schedules_are_refused(change, num_steps, message):
    with pytest.raises(UserError, match=message):
        diffusion.Schedule.from_config(change, num_steps)


def test_split_is_the_inverse_of_concatenate():
    a = {"x": jnp.arange(4), "y": jnp.arange(8.0).reshape(4, 2)}
    b = jax.tree.map(lambda x: x + 10, a)
    both = diffusion.concatenate(a, b)
    assert both["x"].tolist() == [0, 1, 2, 3, 10, 11, 12, 13] and both["y"].shape == (8, 2)
    for ours, theirs in zip(diffusion.split(both, 2), (a, b), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
