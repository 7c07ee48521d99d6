"""Training stages of Emoji World: loop, losses, exported model, command."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transformers import CLIPImageProcessor, CLIPTokenizer

from respodiff_jax.backbone import clip as clip_lib
from respodiff_jax.backbone import load_backbone, load_clip, local_folder
from respodiff_jax.backbone.flax_models import FlaxUNet2DConditionModel
from respodiff_jax.emoji import vocabulary
from respodiff_jax.emoji.making import (
    autoencoder,
    captions,
    clip,
    denoiser,
    export,
    loop,
    train,
    world,
)
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation.suites import load_suite

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(local_folder("emoji-world") / "tokenizer")


def _random(init, seed):
    """Random parameters in the shapes that `init` gives, without compiling it."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=0.05, size=leaf.shape).astype(np.float32),
        jax.eval_shape(init, jax.random.key(0)),
    )


@pytest.fixture(scope="module")
def clip_params(tokenizer):
    return _random(functools.partial(clip_lib.init_clip, clip.config(tokenizer)), 0)


def _count_up(steps, workdir):
    """Runs a stage whose state depends on every batch and on their order."""

    def step_fn(state, batch, step):
        value = state["value"] * 0.9 + batch.sum() + step
        return {"value": value}, {"value": value}

    def batch_fn(step):
        return np.random.default_rng([5, step]).random(16).astype(np.float32)

    state = {"value": np.float32(0)}
    return loop.train_stage("count", state, step_fn, batch_fn, steps, workdir, save_every=3)


def test_interrupted_stage_continues_bit_for_bit(tmp_path):
    whole = _count_up(10, tmp_path / "whole")
    _count_up(7, tmp_path / "parts")
    resumed = _count_up(10, tmp_path / "parts")
    np.testing.assert_array_equal(resumed["value"], whole["value"])
    done = _count_up(10, tmp_path / "parts")
    np.testing.assert_array_equal(done["value"], whole["value"])


def test_non_finite_loss_stops_the_stage_and_keeps_the_checkpoint(tmp_path):
    def step_fn(state, batch, step):
        loss = jnp.where(step < 3, 1.0, jnp.nan)
        return {"params": {"w": loss}}, {"loss": loss}

    state = {"params": {"w": np.float32(1)}}
    with pytest.raises(FloatingPointError, match="step 3"):  # and nothing is saved
        loop.train_stage(
            "nan",
            state,
            step_fn,
            lambda step: np.zeros(8),
            9,
            tmp_path,
            save_every=2,
            log_every=3,
        )
    assert loop.load_params(tmp_path, "nan")["w"] == 1
    with pytest.raises(UserError, match="run the stage 'vae' first"):
        loop.load_params(tmp_path, "vae")


def test_autoencoder_loss_equals_numpy():
    vae = autoencoder.build()
    params = _random(vae.init_weights, 0)
    images = autoencoder.draw_batch(0, 2, seed=0)
    key = jax.random.key(1)
    loss, metrics = jax.jit(functools.partial(autoencoder.loss_fn, vae))(params, images, key)
    posterior = vae.apply(
        {"params": params}, autoencoder.to_model(images), method=vae.encode
    ).latent_dist
    noise = jax.random.normal(key, posterior.mean.shape)
    latents = (posterior.mean + posterior.std * noise).transpose(0, 3, 1, 2)
    output = np.asarray(vae.apply({"params": params}, latents, method=vae.decode).sample)
    target = images.transpose(0, 3, 1, 2) / 127.5 - 1
    error = output - target
    edges = sum(np.abs(np.diff(error, axis=axis)).mean() for axis in (2, 3))
    mean, logvar = np.asarray(posterior.mean), np.asarray(posterior.logvar)
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).mean()
    expected = np.abs(error).mean() + 4 * (error**2).mean() + 0.5 * edges + 1e-5 * kl
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["mse"], (error**2).mean(), rtol=1e-4)


def test_clip_loss_equals_numpy(tokenizer, clip_params):
    module = clip_lib.build_clip(clip.config(tokenizer))
    batch = clip.draw_batch(0, 24, tokenizer, seed=0)
    prompts = {k: clip.tokenize(tokenizer, v) for k, v in sorted(clip.ATTRIBUTE_PROMPTS.items())}
    loss, metrics = jax.jit(functools.partial(clip.loss_fn, module))(clip_params, batch, prompts)

    pixels = clip.preprocess(batch["images"])
    images = np.asarray(clip_lib.encode_images(module, clip_params, pixels), np.float64)
    scale = np.exp(float(clip_params["logit_scale"]))

    def log_probabilities(ids):
        texts = np.asarray(clip_lib.encode_texts(module, clip_params, ids), np.float64)
        logits = scale * images @ texts.T
        return logits - np.log(np.exp(logits).sum(1, keepdims=True)), logits

    rows, logits = log_probabilities(batch["ids"])
    columns = logits - np.log(np.exp(logits).sum(0, keepdims=True))
    matches = batch["matches"]
    contrastive = [
        -(rows * matches).sum(1) / matches.sum(1),
        -(columns * matches).sum(0) / matches.sum(0),
    ]
    attributes = []
    for name, ids in prompts.items():
        labels = batch["labels"][name]
        known = np.flatnonzero(labels >= 0)
        attributes.append(-log_probabilities(ids)[0][known, labels[known]].mean())
    expected = clip.CONTRASTIVE_WEIGHT * np.mean(contrastive) + np.sum(attributes)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["contrastive"], np.mean(contrastive), rtol=1e-4)
    assert matches.diagonal().all()  # the caption of a picture is true of it


def test_unet_loss_is_weighted_by_the_signal_to_noise_ratio(monkeypatch):
    class Silent:
        """Predicts zero, so that the error is the noise itself."""

        def apply(self, variables, z_t, timesteps, context):
            return type("Output", (), {"sample": jnp.zeros_like(z_t)})

    alpha_bars = jnp.array([0.99, 0.5])
    batch = {"latents": np.ones((256, 4, 4, 4), np.float16), "context": np.ones((256, 2, 8))}
    key = jax.random.key(0)
    loss, metrics = denoiser.loss_fn(Silent(), {}, batch, alpha_bars, key)
    time_key, noise_key = jax.random.split(key)
    timesteps = np.asarray(jax.random.randint(time_key, (256,), 0, 2))
    noise = np.asarray(jax.random.normal(noise_key, (256, 4, 4, 4)))
    error = (noise**2).mean((1, 2, 3))
    weights = np.where(timesteps == 0, 5 / 99, 1.0)
    np.testing.assert_allclose(loss, (weights * error).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["mse"], error.mean(), rtol=1e-5)


def test_exported_model_loads_in_pytorch_and_jax(tmp_path, tokenizer, clip_params):
    torch = pytest.importorskip("torch")
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel, CLIPProcessor

    vae = _random(autoencoder.build().init_weights, 1)
    unet = _random(FlaxUNet2DConditionModel(**denoiser.CONFIG).init_weights, 2)
    export.export(tmp_path, tokenizer, clip_params, vae, unet, 0.25)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert size < 28e6  # with 2 MB of artwork, the package data stays under 32 MB

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.vae.config.scaling_factor == 0.25
    backbone = load_backbone(str(tmp_path))
    assert backbone.default_resolution == 64
    assert backbone.mid_block_shape(64) == (4, 4, denoiser.CONFIG["block_out_channels"][-1])

    prompts = ["a photo of a woman doctor", ""]
    ids = clip.tokenize(tokenizer, prompts)
    contexts = np.asarray(backbone.encode_prompts(prompts, 64).context)
    module = clip_lib.build_clip(clip.config(tokenizer))
    rows = clip_lib.encode_contexts(module, clip_params, ids)
    np.testing.assert_allclose(contexts, rows, atol=2e-2)  # fp16 files
    with torch.no_grad():
        theirs = pipeline.text_encoder(torch.tensor(ids).long()).last_hidden_state.numpy()
    np.testing.assert_allclose(contexts, theirs, atol=1e-4)

    images = autoencoder.draw_batch(0, 3, seed=3)
    torch_clip = CLIPModel.from_pretrained(tmp_path / "clip").float().eval()
    processor = CLIPProcessor.from_pretrained(tmp_path / "clip")
    inputs = processor(text=prompts, images=list(images), return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = torch_clip(**inputs)
    ours = load_clip(tmp_path / "clip")
    for features, theirs in (
        (ours.image_features(images), outputs.image_embeds),
        (ours.text_features(prompts), outputs.text_embeds),
    ):
        np.testing.assert_allclose(features, theirs.numpy(), atol=1e-4)

    suite = load_suite(None, str(tmp_path))
    assert suite.clip == str(tmp_path / "clip")
    assert suite.subjects == tuple(vocabulary.PROFESSIONS)
    assert list(suite.attribute("skin_tone")) == list(vocabulary.TONE_GROUPS)


def test_damaged_clip_is_refused(tmp_path, tokenizer, clip_params):
    processor = CLIPImageProcessor()
    clip_lib.save_clip(tmp_path, clip.config(tokenizer), clip_params, tokenizer, processor)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="lacks parameters"):
        load_clip(tmp_path)
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(UserError, match=r"incomplete.*missing: vocab\.json"):
        load_clip(tmp_path)


def test_evaluator_training_keeps_the_text_tower(tmp_path, tokenizer, clip_params):
    params = clip.train_evaluator(tmp_path, tokenizer, clip_params, steps=1, batch_size=8, seed=0)
    for name, before in clip_params.items():
        same = jax.tree.map(np.array_equal, params[name], before)
        assert all(jax.tree.leaves(same)) == (name == "text_model"), name
    assert np.exp(params["logit_scale"]) == pytest.approx(100)
    again = clip.with_evaluator(clip_params, loop.load_params(tmp_path, "evaluator"))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_evaluator_is_trained_on_smeared_pictures_of_the_even_world(
    tmp_path, tokenizer, clip_params, monkeypatch
):
    drawn = {}

    def catch(stage, state, step_fn, batch_fn, *args):
        drawn[stage] = batch_fn(0)
        return state

    monkeypatch.setattr(loop, "train_stage", catch)
    options = {"steps": 1, "batch_size": 8, "seed": 5}
    clip.train_evaluator(tmp_path, tokenizer, clip_params, **options)
    clip.train(tmp_path, tokenizer, **options)
    expected = {
        "clip": clip.draw_batch(0, 8, tokenizer, 5),
        "evaluator": clip.draw_batch(0, 8, tokenizer, 5, table=world.EVEN, smeared=True),
    }
    jax.tree.map(np.testing.assert_array_equal, drawn, expected)
    assert (drawn["clip"]["images"] != drawn["evaluator"]["images"]).any()


def test_unet_starts_from_given_parameters(tmp_path):
    unet = FlaxUNet2DConditionModel(**denoiser.CONFIG)
    start = _random(unet.init_weights, 3)
    data = (
        np.zeros((4, 16, 16, 4), np.float16),
        np.zeros((1, 16, 192), np.float16),
        np.zeros(4, int),
    )
    options = dict(steps=0, batch_size=2, seed=0)
    average = denoiser.train(tmp_path, *data, **options, params=start)
    jax.tree.map(np.testing.assert_array_equal, average, start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tune"], "--tune starts from the UNet of --parts"),
        (["--tune", "--parts", "m", "--stage", "evaluator"], "--tune starts from the UNet"),
        (["--parts", "m", "--stage", "vae"], "--stage vae makes what --parts provides"),
        (["--steps", "3"], "give --stage"),
    ],
)
def test_contradictory_options_are_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["train", "--workdir", str(tmp_path / "w"), *arguments])
    with pytest.raises(SystemExit):
        train.main()
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_stage_continues_only_with_its_first_options(tmp_path):
    build = train.ModelBuild(tmp_path, tmp_path / "model")
    stages = {"vae": (1, 8), "unet": (1, 8)}
    with pytest.raises(UserError, match=r"run the stage 'evaluator' first"):
        train.run(build, stages)
    train.check_continues(dataclasses.replace(build, seed=1), "evaluator", 64)  # has not begun
    train.check_continues(build, "unet", 8)
    with pytest.raises(UserError, match=r"`seed` is 1, but stage vae in .* began with 0"):
        train.run(dataclasses.replace(build, seed=1), stages)


def test_stage_with_parts_creates_its_workdir(tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "train_evaluator", lambda *args, **options: None)
    monkeypatch.setattr(export, "export_clip", lambda *args: None)
    build = train.ModelBuild(tmp_path / "new", tmp_path / "model", parts="emoji-world")
    train.run(build, {"evaluator": (1, 8)})
    assert (tmp_path / "new" / "evaluator.json").exists()


def test_all_stages_train_a_model_from_nothing(tmp_path):
    build = train.ModelBuild(tmp_path, tmp_path / "model", pool_size=1000)
    train.run(build, {stage: (2, 8) for stage in train.STAGES})
    backbone = load_backbone(str(tmp_path / "model"))
    assert backbone.scheduler_config["beta_schedule"] == "squaredcos_cap_v2"
    latents, texts = denoiser.encode_pool(
        tmp_path, loop.load_params(tmp_path, "vae"), size=1000, seed=1
    )
    assert latents.shape == (1000, 16, 16, 4)
    assert captions.SCENE_CAPTIONS[0] in texts
    average = loop.load_params(tmp_path, "unet")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(average))
    assert optax.global_norm(average) > 0
