"""The schedule and DDIM against diffusers' PyTorch scheduler."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from respodiff_jax.errors import UserError
from respodiff_jax.method import diffusion
from respodiff_jax.method.schedule import Schedule

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


SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddim-diffusers": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}


# Where a step of diffusers' DDIM does not lead to the next timestep, and ours does.
DIFFUSERS_MISSES = {
    ("linspace", "ddim", 50),
    ("linspace", "ddim", 7),
    ("trailing", "ddim", 7),
    ("zero_snr", "ddim", 7),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers
@pytest.mark.parametrize(
    ("name", "sampler", "num_steps"),
    [
        case
        for case in itertools.product(CONFIGS, SCHEDULERS, (50, 7))
        if case not in DIFFUSERS_MISSES
    ],
)
def test_samplers_equal_diffusers(name, sampler, num_steps):
    config = CONFIGS[name]
    theirs = SCHEDULERS[sampler].from_config(config)
    theirs.set_timesteps(num_steps)
    ours = Schedule.from_config(config, num_steps, sampler)
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy(), rtol=1e-6)

    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, 4, 4, 4), np.float32)
    z, previous = ours.initial_scale * noise, np.zeros_like(noise)
    reference = torch.tensor(noise) * theirs.init_noise_sigma
    for i, timestep in enumerate(theirs.timesteps):
        seen = theirs.scale_model_input(reference, timestep)
        level = float(seen.abs().max())
        np.testing.assert_allclose(z / level, seen.numpy() / level, atol=1e-4)
        # A model that is smooth in its input, as a real one is.
        output = np.tanh(np.asarray(z)) + 0.1 * rng.standard_normal(z.shape, np.float32)
        z_0 = diffusion.predict_z_0(ours, output, z, jnp.int32(i))
        if sampler == "dpm++":
            z, previous = diffusion.dpm_solver_step(ours, z_0, previous, z, jnp.int32(i)), z_0
        else:
            z = diffusion.ddim_step(ours, output, z, jnp.int32(i))
        reference = theirs.step(torch.tensor(output), timestep, reference).prev_sample
    scale = float(reference.abs().max())
    np.testing.assert_allclose(z / scale, reference.numpy() / scale, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*which diffusers' DDIMScheduler misses:UserWarning")
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_every_number_of_steps_is_kept_and_never_below_zero(spacing, sampler):
    config = STABLE_DIFFUSION | {"timestep_spacing": spacing, "steps_offset": 0}
    for num_steps in range(1, 999):
        timesteps = Schedule.from_config(config, num_steps, sampler).timesteps
        assert len(timesteps) == num_steps and timesteps.min() >= 0
        assert np.all(np.diff(timesteps) < 0)


def test_a_difference_from_diffusers_is_said():
    config = STABLE_DIFFUSION | {"timestep_spacing": "trailing"}
    with pytest.warns(
        UserWarning, match="7 steps with timestep_spacing 'trailing'.*ddim-diffusers"
    ):
        Schedule.from_config(config, 7)
    Schedule.from_config(config, 50)  # warnings are errors
    Schedule.from_config(config, 7, "ddim-diffusers")
    Schedule.from_config(config, 7, "dpm++")


@pytest.mark.filterwarnings("ignore:.*which diffusers' DDIMScheduler misses:UserWarning")
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "euler"])
@pytest.mark.parametrize("num_steps", [50, 7])
def test_ideal_model_ends_at_its_image(spacing, sampler, num_steps):
    """Each step leads to the level of the next: a model that knows z_0 never leaves its path."""
    config = STABLE_DIFFUSION | {"timestep_spacing": spacing, "set_alpha_to_one": True}
    schedule = Schedule.from_config(config, num_steps, sampler)
    z_0, eps = np.random.default_rng(0).standard_normal((2, 1, 2, 2, 4), np.float32)
    first = schedule.alpha_bars[0]
    z = np.sqrt(first) * z_0 + np.sqrt(1 - first) * eps
    for i in range(num_steps):
        ahead = schedule.next_alpha_bars[i]
        if sampler == "dpm++":
            z = diffusion.dpm_solver_step(schedule, z_0, z_0, z, jnp.int32(i))
        else:
            z = diffusion.ddim_step(schedule, eps, z, jnp.int32(i))
        expected = np.sqrt(ahead) * z_0 + np.sqrt(1 - ahead) * eps
        np.testing.assert_allclose(z, expected, atol=2e-5)
        if i + 1 < num_steps:
            assert ahead == schedule.alpha_bars[i + 1]
    np.testing.assert_allclose(z, z_0, atol=2e-5)


def test_ddim_step_takes_a_different_index_for_each_sample():
    schedule = Schedule.from_config(CONFIGS["sd2"], 50)
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
        schedule = Schedule.from_config(CONFIGS[name], 50)
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
        (
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            50,
            "begins at pure noise .* 'epsilon' predicts nothing; expected 'v_prediction'",
        ),
    ],
)
def test_wrong_schedules_are_refused(change, num_steps, message):
    with pytest.raises(UserError, match=message):
        Schedule.from_config(change, num_steps)


@pytest.mark.parametrize(
    ("sampler", "change", "message"),
    [
        ("heun", {}, "`sampler` is 'heun', expected one of ddim, ddim-diffusers"),
        ("dpm++", {"use_karras_sigmas": True}, "use_karras_sigmas True, .* 'dpm\\+\\+' does not"),
        ("euler", {"final_sigmas_type": "sigma_min"}, "final_sigmas_type 'sigma_min'"),
    ],
)
def test_samplers_refuse_what_they_do_not_compute(sampler, change, message):
    config = STABLE_DIFFUSION | change
    assert Schedule.from_config(config, 10, "ddim").num_steps == 10
    with pytest.raises(UserError, match=message):
        Schedule.from_config(config, 10, sampler)


def test_split_is_the_inverse_of_concatenate():
    a = {"x": jnp.arange(4), "y": jnp.arange(8.0).reshape(4, 2)}
    b = jax.tree.map(lambda x: x + 10, a)
    both = diffusion.concatenate(a, b)
    assert both["x"].tolist() == [0, 1, 2, 3, 10, 11, 12, 13] and both["y"].shape == (8, 2)
    for ours, theirs in zip(diffusion.split(both, 2), (a, b), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
