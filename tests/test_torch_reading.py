"""Reading prompts in PyTorch: the same decisions and pictures as in JAX."""

import dataclasses
import itertools
from importlib.resources import files

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from test_adapters import make_adapter
from test_torch_adapter import torch_latents

from respodiff_jax.adapters import load_adapter, save_adapter, steerings, unconditional
from respodiff_jax.adapters.reading import read_contexts, read_prompts
from respodiff_jax.backbone import load_backbone
from respodiff_jax.data import contrast
from respodiff_jax.data.prompt_files import fill_in
from respodiff_jax.emoji import vocabulary
from respodiff_jax.generation.sampling import denoise, initial_noise
from respodiff_jax.method.reading import Decision
from respodiff_jax.method.schedule import Schedule
from respodiff_jax.torch_adapter import RespoDiffAdapter

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a photo of a judge", "a photo of a woman judge", "a photo of a cat"]


@pytest.fixture(scope="module")
def model():
    return load_backbone("emoji-world", dtype="float32")


@pytest.fixture(scope="module")
def adapter(model):
    """Modules of a noticeable size with the reading that the package ships."""
    shipped = load_adapter(files("respodiff_jax") / "emoji/adapters/gender")
    plain = make_adapter("mlp", shipped.concepts, shape=model.mid_block_shape(64), resolution=64)
    return dataclasses.replace(plain, reading=shipped.reading)


@pytest.fixture(scope="module")
def pipe(emoji_folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(emoji_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def attached(adapter, pipe, tmp_path):
    save_adapter(adapter, tmp_path)
    loaded = RespoDiffAdapter.from_pretrained(tmp_path).attach(pipe)
    yield loaded
    loaded.detach()


def test_both_sides_decide_alike_on_a_thousand_prompts(adapter, model, attached):
    words = ["", "woman ", "male ", "dark-skinned ", "medium-skinned woman "]
    people = [f"{w}{p}" for w, p in itertools.product(words, vocabulary.PROFESSIONS)]
    things = list(vocabulary.THINGS)
    phrases = people + things[: 334 - len(people)]
    prompts = [text for p in phrases for text in fill_in(contrast.TEMPLATES[:3], p)]
    assert len(prompts) >= 1000
    ours = read_prompts(adapter, model, prompts) == Decision.OPEN
    assert 0.1 < ours.mean() < 0.9
    np.testing.assert_array_equal(attached.read(prompts).numpy(), ours)


def test_hook_steers_only_open_prompts_as_jax_does(adapter, model, attached, pipe):
    noise = initial_noise(range(3), model.latent_shape(64))
    attached.set_concepts({"a woman": 1.0})
    found = torch_latents(pipe, PROMPTS, noise=np.asarray(noise), steps=4)
    weights = np.zeros((3, 2), np.float32)
    weights[0, adapter.names.index("a woman")] = 1
    cond, uncond = model.encode_prompts(PROMPTS, 64), model.encode_prompts([""], 64)
    schedule = Schedule.from_config(model.scheduler_config, 4)
    expected = denoise(
        *(model, (adapter.module,), schedule, model.params, noise, cond, uncond),
        *(steerings(adapter, weights), 7.5),
    )
    assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(expected)
    attached.set_concepts({})
    base = torch_latents(pipe, PROMPTS, noise=np.asarray(noise), steps=4)
    np.testing.assert_array_equal(found[1:], base[1:])
    assert np.abs(found[0] - base[0]).max() > 1e-2
    attached.steer_always = True
    attached.set_concepts({"a woman": 1.0})
    always = torch_latents(pipe, PROMPTS, noise=np.asarray(noise), steps=4)
    assert (np.abs(always - base).max((1, 2, 3)) > 1e-2).all()


def test_concepts_steer_up_to_their_max_timestep_as_in_jax(adapter, model, pipe, tmp_path):
    noise = np.asarray(initial_noise(range(2), model.latent_shape(64)))
    prompts = PROMPTS[:1] * 2
    schedule = Schedule.from_config(model.scheduler_config, 4)
    np.testing.assert_array_equal(schedule.timesteps, [751, 501, 251, 1])
    cond, uncond = model.encode_prompts(prompts, 64), model.encode_prompts([""], 64)

    def both(*last, steer_always=False):
        concepts = zip(adapter.concepts, last, strict=True)
        concepts = tuple(dataclasses.replace(c, max_timestep=own) for c, own in concepts)
        limited = dataclasses.replace(adapter, concepts=concepts)
        save_adapter(limited, tmp_path)
        attached = RespoDiffAdapter.from_pretrained(tmp_path).attach(pipe)
        attached.steer_always = steer_always
        attached.set_concepts([{adapter.names[i]: 1.0} for i in range(2)])
        found = torch_latents(pipe, prompts, noise=noise, steps=4)
        attached.detach()
        ours = unconditional(limited) if steer_always else load_adapter(tmp_path)
        expected = denoise(
            *(model, (adapter.module,), schedule, model.params, noise, cond, uncond),
            *(steerings(ours, np.eye(2)), 7.5),
        )
        assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(expected)
        return found

    whole, base = both(None, 1000), torch_latents(pipe, prompts, noise=noise, steps=4)
    some = both(501, 0)
    np.testing.assert_array_equal(some[1], base[1])
    assert min(np.abs(some[0] - other[0]).max() for other in (base, whole)) > 1e-2
    np.testing.assert_array_equal(both(501, 0, steer_always=True), both(None, None))
    np.testing.assert_array_equal(both(None, None), whole)


def test_fair_deals_among_open_prompts(attached):
    names = attached.fair("gender", 4, prompts=PROMPTS, generator=torch.Generator())
    assert sorted(names[:4]) == ["a man", "a man", "a woman", "a woman"]
    assert names[4:] == [None] * 8
    assert attached.delta(torch.zeros(12, 192, 4, 4))[4:].abs().max() == 0
    with pytest.raises(ValueError, match="num_prompts is 2, but prompts has 3"):
        attached.fair("gender", 4, 2, prompts=PROMPTS)
    attached.steer_always = True
    assert None not in attached.fair("gender", 2, prompts=PROMPTS)


def test_prompts_are_read_with_offloaded_weights(attached, emoji_folder):
    expected = attached.read(PROMPTS)
    pipe = diffusers.DiffusionPipeline.from_pretrained(emoji_folder)
    for name in ("vae", "text_encoder", "unet"):  # as enable_sequential_cpu_offload does
        accelerate.cpu_offload(pipe.components[name], execution_device="cpu")
    assert pipe.device.type == "meta"
    assert torch.equal(attached.attach(pipe).read(PROMPTS), expected)
    assert attached.fair("gender", 1, prompts=PROMPTS)[1:] == [None, None]


def test_a_model_with_text_states_of_another_width_is_refused(adapter, pipe, tmp_path):
    heads = adapter.reading._replace(weight=adapter.reading.weight[..., :64])
    save_adapter(dataclasses.replace(adapter, reading=heads), tmp_path)
    loaded = RespoDiffAdapter.from_pretrained(tmp_path)
    message = "reads text states of 64 features, this model's have 192; use .* `adapter.steer_alw"
    with pytest.raises(ValueError, match=message):
        loaded.attach(pipe)
    loaded.steer_always = True
    loaded.attach(pipe).set_concepts({"a woman": 1.0})
    torch_latents(pipe, PROMPTS[:1], noise=np.zeros((1, 16, 16, 4)), steps=1)
    loaded.steer_always = False
    with pytest.raises(ValueError, match=message):
        torch_latents(pipe, PROMPTS[:1], noise=np.zeros((1, 16, 16, 4)), steps=1)
    loaded.detach()


def test_reading_prompts_needs_a_pipeline(adapter, tmp_path):
    save_adapter(adapter, tmp_path / "reads")
    with pytest.raises(ValueError, match=r"needs the pipeline's text encoders: attach\(\) first"):
        RespoDiffAdapter.from_pretrained(tmp_path / "reads").fair("gender", 2, prompts=["a cat"])
    save_adapter(dataclasses.replace(adapter, reading=None), tmp_path / "paper")
    paper = RespoDiffAdapter.from_pretrained(tmp_path / "paper")
    assert None not in paper.fair("gender", 2, prompts=["a cat"])


def test_concepts_of_a_group_decide_together(adapter, tmp_path):
    bias = adapter.reading.bias.copy()
    bias[0] = 1e3, -1e3, -1e3  # as a concept that was trained without a reading
    mixed = dataclasses.replace(adapter, reading=adapter.reading._replace(bias=bias))
    save_adapter(mixed, tmp_path)
    loaded = RespoDiffAdapter.from_pretrained(tmp_path)
    states = torch.randn(64, 5, 192, generator=torch.Generator().manual_seed(0))
    is_open = loaded._is_open(states)
    ours = read_contexts(mixed, states.numpy()) == Decision.OPEN
    assert 0 < ours.mean() < 1 and (ours[:, 0] == ours[:, 1]).all()
    np.testing.assert_array_equal(is_open.numpy(), ours)
