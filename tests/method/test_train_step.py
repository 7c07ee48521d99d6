"""The training step: equations, order, isolation, independence of concepts."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from annotations import check_fields
from diffusers import DDIMScheduler, UNet2DConditionModel
from ml_collections import ConfigDict

from respodiff_jax.backbone import Conditioning, load_backbone
from respodiff_jax.bench.torch_side import Conditions, Procedure, TorchModule, to_torch
from respodiff_jax.method import objective
from respodiff_jax.method.concepts import Concept
from respodiff_jax.method.embedding import EmbeddedConcepts, embed_concepts
from respodiff_jax.method.rollout import Latents
from respodiff_jax.method.state import init_state
from respodiff_jax.method.train_step import base_predictions, step_values, train_step
from respodiff_jax.training.config import default
from respodiff_jax.training.spec import make_optimizer, step_spec

WOMAN = Concept("a woman", "gender", ("a person", "someone"), target_prompt="a woman")
MAN = Concept("a man", "gender", ("a person",), target_prompt="a man", lambda_sem=2.0, lr_ram=3e-2)
VIOLENCE = Concept(
    "violence", "safety", ("a scene",), unsafe_prompt="violence", guidance_scale=12.0, lr_sam=1e-4
)
NUM_STEPS = 6
BATCH = 2


def make_config(**changes) -> ConfigDict:
    config = default()
    config.rollout.kind = "faithful"
    config.rollout.num_steps = NUM_STEPS
    config.train.steps = 100
    config.update_from_flattened_dict(changes)
    return config


def setup(backbone, concepts, batch_size=BATCH, **changes):
    """Specification, embedded concepts, first state and jitted step for these concepts."""
    resolution = backbone.default_resolution
    spec = step_spec(make_config(**changes), backbone, resolution)
    arrays = embed_concepts(backbone, concepts, resolution)
    state = init_state(spec, arrays, seed=3, batch_size=batch_size)
    return spec, arrays, state, jax.jit(partial(train_step, spec))


@dataclasses.dataclass(frozen=True)
class FixedRollout:
    """Returns fixed latents for the losses."""

    latents: Latents

    def init(self, samples):
        return ()

    def draw(self, state, samples, predict):
        return self.latents

    def advance(self, state, samples, latents, output):
        return state


def rows(conditions: Conditioning, *index) -> Conditions:
    return Conditions.of(jax.tree.map(lambda x: x[index], conditions))


def repeated(condition, times):
    return Conditions(*(None if x is None else x.expand(times, *x.shape) for x in condition))


def conditions_of(arrays, concept, picks):
    """Neutral, empty, `y_tar` and `y_unc` of a single concept's samples, for `Procedure.step`."""
    neutral = rows(arrays.neutral, 0, picks)
    own, empty = rows(arrays.own, 0, picks), repeated(rows(arrays.empty, 0), len(picks))
    return neutral, empty, *((neutral, own) if concept.is_safety else (own, empty))


def make_reference(folder, spec, state, concept):
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(NUM_STEPS)
    params = jax.tree.map(lambda x: np.asarray(x[0]), (state.concepts.ram, state.concepts.sam))
    ram, sam = (TorchModule(spec.module.kind, p) for p in params)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    fields = ("lr_ram", "lr_sam", "lambda_sem", "guidance_scale")
    return Procedure(unet, scheduler, ram, sam, **{f: getattr(concept, f) for f in fields})


def relative_error(ours, theirs) -> float:
    """‖ours - theirs‖ / ‖theirs‖ over all leaves."""
    a, b = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (ours, theirs)
    )
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def gradient(opt_state):
    """The first step's gradient, from Adam's first moment."""
    (adam,) = [s for s in opt_state if isinstance(s, optax.ScaleByAdamState)]
    return jax.tree.map(lambda m: m[0] / 0.1, adam.mu)


@pytest.mark.parametrize(
    ("folder", "kind", "concept"),
    [
        ("sd_folder", "constant", WOMAN),
        ("sd_v_folder", "mlp", VIOLENCE),
        ("sdxl_folder", "conv", MAN),
    ],
)
def test_losses_gradients_and_updates_equal_pytorch(folder, kind, concept, request):
    folder = request.getfixturevalue(folder)
    backbone = load_backbone(str(folder), dtype="float32")
    changes = {"module.kind": kind, "module.init": "uniform", "module.hidden_channels": 24}
    spec, arrays, state, _ = setup(backbone, [concept], **changes)
    ddim_index, prompt_index = 2, [len(concept.neutral_prompts) - 1, 0]
    # Large modules make the losses much larger than the rounding of the predictions.
    far = jax.tree.map(lambda x: 10 * x, (state.concepts.ram, state.concepts.sam))
    state = state.replace(concepts=state.concepts.replace(ram=far[0], sam=far[1]))
    z_t = jax.random.normal(jax.random.key(9), (BATCH, *spec.latent_shape))
    draw = Latents(z_t, jnp.int32(ddim_index), jnp.asarray(prompt_index))
    spec = dataclasses.replace(spec, rollout=FixedRollout(draw))
    step = jax.jit(partial(train_step, spec))

    reference = make_reference(folder, spec, state, concept)
    conditions = conditions_of(arrays, concept, prompt_index)
    for i in range(3):
        losses = reference.step(to_torch(z_t), ddim_index, *conditions)
        state, metrics = step(state, backbone.params, arrays, jnp.arange(BATCH))
        ours = (metrics.loss_resp[0], metrics.loss_sem[0])
        np.testing.assert_allclose(ours, losses, rtol=1e-4)
        if i == 0:
            assert relative_error(gradient(state.concepts.opt_ram), reference.ram.flax(True)) < 1e-4
            assert relative_error(gradient(state.concepts.opt_sam), reference.sam.flax(True)) < 1e-4
        ram, sam = jax.tree.map(lambda x: x[0], (state.concepts.ram, state.concepts.sam))
        assert relative_error(ram, reference.ram.flax()) < 1e-4
        assert relative_error(sam, reference.sam.flax()) < 1e-4


def test_faithful_rollout_and_step_equal_pytorch(sd_folder):
    backbone = load_backbone(str(sd_folder), dtype="float32")
    changes = {"module.init": "uniform"}
    spec, arrays, state, step = setup(backbone, [WOMAN], **changes)
    ram = jax.tree.map(lambda x: 5 * x, state.concepts.ram)
    state = state.replace(concepts=state.concepts.replace(ram=ram))
    reference = make_reference(sd_folder, spec, state, WOMAN)
    seen = set()
    for i in range(4):
        # The documented random streams: run -> step -> concept -> sample -> prompt and noise.
        _, samples_key = jax.random.split(jax.random.fold_in(jax.random.key(3), i))
        concept_key = jax.random.fold_in(samples_key, WOMAN.stream)
        keys = [jax.random.fold_in(concept_key, s) for s in range(BATCH)]
        splits = [jax.random.split(key) for key in keys]
        prompts = [int(jax.random.randint(s[0], (), 0, 2)) for s in splits]
        noise = jnp.stack([jax.random.normal(s[1], spec.latent_shape) for s in splits])

        state, metrics = step(state, backbone.params, arrays, jnp.arange(BATCH))
        k = int(metrics.ddim_index[0])
        seen.add(k)
        conditions = conditions_of(arrays, WOMAN, prompts)
        z_t = reference.rollout(to_torch(noise), k, *conditions[:2])
        losses = reference.step(z_t, k, *conditions)
        ours = (metrics.loss_resp[0], metrics.loss_sem[0])
        np.testing.assert_allclose(ours, losses, rtol=1e-4)
    assert len(seen) > 1  # the rollouts had different lengths
    assert step._cache_size() == 1  # and were compiled once


def run(step, state, backbone, arrays, steps):
    for _ in range(steps):
        state, metrics = step(state, backbone.params, arrays, jnp.arange(BATCH))
    return state, metrics


@pytest.fixture(scope="module")
def two_concepts(tiny_backbone):
    """A jitted step for two concepts, `(spec, step)`; learning rates are arguments."""
    spec, _, _, step = setup(tiny_backbone, [WOMAN, MAN])
    return spec, step


def start(backbone, spec, concepts):
    arrays = embed_concepts(backbone, concepts, backbone.default_resolution)
    return arrays, init_state(spec, arrays, seed=3, batch_size=BATCH)


def test_concept_trains_the_same_alone_and_among_others(tiny_backbone, two_concepts):
    spec, step = two_concepts
    arrays, state = start(tiny_backbone, spec, [MAN, VIOLENCE])
    together, _ = run(step, state, tiny_backbone, arrays, 3)
    # Alone, the concept also has a moving average, which must not change its training.
    _, arrays, state, step = setup(tiny_backbone, [VIOLENCE], **{"optimizer.ema_decay": 0.75})
    average = np.zeros_like(state.concepts.ram["constant"])
    for _ in range(3):
        state, _ = run(step, state, tiny_backbone, arrays, 1)
        average = 0.75 * average + 0.25 * np.asarray(state.concepts.ram["constant"])
    np.testing.assert_allclose(state.concepts.ema.ema[0]["constant"], average, rtol=1e-5, atol=1e-9)

    for part in ("ram", "sam"):
        both = getattr(together.concepts, part)["constant"]
        assert (
            relative_error(both[1], np.asarray(getattr(state.concepts, part)["constant"][0])) < 1e-3
        )
        assert relative_error(both[0], np.asarray(both[1])) > 0.1  # they learn different things


def test_update_of_one_module_leaves_the_other_unchanged(tiny_backbone, two_concepts):
    spec, step = two_concepts
    only_ram = dataclasses.replace(WOMAN, lr_sam=0.0)
    only_sam = dataclasses.replace(MAN, lr_ram=0.0)
    arrays, before = start(tiny_backbone, spec, [only_ram, only_sam])
    # SAM's gradient is zero while RAM is zero, so set RAM.
    ram = {"constant": before.concepts.ram["constant"].at[1].set(0.5)}
    before = before.replace(concepts=before.concepts.replace(ram=ram))
    after, _ = run(step, before, tiny_backbone, arrays, 2)

    def moved(part):
        new, old = (getattr(state.concepts, part)["constant"] for state in (after, before))
        return np.abs(new - old).max(axis=(1, 2, 3)) > 0

    np.testing.assert_array_equal(moved("ram"), [True, False])
    np.testing.assert_array_equal(moved("sam"), [False, True])


def test_diverged_concept_stops_and_the_other_is_unchanged(tiny_backbone, two_concepts):
    spec, step = two_concepts
    wild, tame = (dataclasses.replace(MAN, lr_ram=lr) for lr in (1e38, 0.0))
    arrays, before = start(tiny_backbone, spec, [WOMAN, wild])
    after, metrics = run(step, before, tiny_backbone, arrays, 2)
    np.testing.assert_array_equal(metrics.diverged_at, [-1, 0])
    leaves = [jax.tree.leaves(s.concepts.replace(diverged_at=None)) for s in (after, before)]
    for leaf, at_start in zip(*leaves, strict=True):
        np.testing.assert_array_equal(leaf[1], at_start[1])

    arrays, before = start(tiny_backbone, spec, [WOMAN, tame])
    undisturbed, _ = run(step, before, tiny_backbone, arrays, 2)
    np.testing.assert_array_equal(
        after.concepts.ram["constant"][0], undisturbed.concepts.ram["constant"][0]
    )


def test_fields_have_the_annotated_shapes(tiny_backbone):
    spec, arrays, state, _ = setup(tiny_backbone, [WOMAN, MAN], **{"rollout.kind": "streaming"})

    def check(state, frozen, concepts):
        ids = jnp.arange(BATCH)
        new, metrics = train_step(spec, state, frozen, concepts, ids)
        check_fields(concepts, metrics, new, new.concepts)
        values = step_values(spec, state, frozen, concepts, ids)
        trees = (values, new.concepts.rollout, concepts)
        values, flight, concept = jax.tree.map(lambda x: x[0], trees)
        base = base_predictions(spec, frozen, concept, values.latents)
        check_fields(values, values.latents, flight, base)

    jax.eval_shape(check, state, tiny_backbone.params, arrays)
    check_fields(arrays, state, state.concepts)


def optimizer_config(**changes) -> ConfigDict:
    config = default().optimizer
    config.update(changes)
    return config


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.0, 0.5, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rates_follow_their_schedule(schedule, expected):
    optimizer = make_optimizer(optimizer_config(lr_schedule=schedule, warmup_steps=2), steps=6)
    params = jnp.zeros(1)
    state = optimizer.init(params)
    sizes = []
    for _ in range(6):
        update, state = optimizer.update(jnp.ones(1), state, params)
        sizes.append(float(update[0]))
    np.testing.assert_allclose(sizes, expected, atol=2e-5)


def test_clipping_bounds_the_global_norm():
    optimizer = make_optimizer(optimizer_config(clip_norm=0.5), steps=6)
    grad = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    _, state = optimizer.update(grad, optimizer.init(grad), grad)
    adam = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
    np.testing.assert_allclose([adam.mu["a"][0], adam.mu["b"][0]], [0.03, 0.04], rtol=1e-6)


def test_adam_equals_pytorch_over_several_steps():
    optimizer = make_optimizer(optimizer_config(), steps=9)
    value = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    adam = torch.optim.Adam([value], lr=0.1)
    params = jnp.array([1.0, -2.0])
    state = optimizer.init(params)
    for i in range(5):
        value.grad = torch.tensor([0.3 * i, -1.0])
        adam.step()
        update, state = optimizer.update(jnp.array([0.3 * i, -1.0]), state, params)
        params = params - 0.1 * update
    np.testing.assert_allclose(params, value.detach().numpy(), rtol=1e-5)


def test_losses_share_the_encoder_pass(tiny_backbone):
    """FLOPs after the rollout: 3 encoder passes, 3 + 2 × (forward, backward) decoder passes."""
    spec, arrays, state, _ = setup(tiny_backbone, [WOMAN])
    shape = (BATCH, *spec.latent_shape)
    draw = Latents(jnp.ones(shape), jnp.int32(1), jnp.zeros(BATCH, int))
    spec = dataclasses.replace(spec, rollout=FixedRollout(draw))
    frozen = {"unet": tiny_backbone.params["unet"]}

    def flops(function, *args):
        return jax.jit(function).lower(*args).cost_analysis()["flops"]

    cond = jax.tree.map(lambda x: jnp.asarray(x[0, :1]).repeat(BATCH, 0), arrays.neutral)
    timesteps = jnp.ones(BATCH, int)
    h, skips = spec.encode(frozen, draw.z_t, timesteps, cond)
    encoder = flops(spec.encode, frozen, draw.z_t, timesteps, cond)
    decoder = flops(spec.decode, frozen, h, skips)

    def loss(h):
        return jnp.sum(spec.decode(frozen, h, skips) ** 2)

    with_backward = flops(jax.value_and_grad(loss), h)
    step = flops(partial(train_step, spec), state, frozen, arrays, jnp.arange(BATCH))
    assert step == pytest.approx(3 * encoder + 3 * decoder + 2 * with_backward, rel=0.05)
    assert step < 3 * encoder + 3 * decoder + 2 * with_backward + encoder  # less than one more


def test_remat_stores_less_and_gives_the_same_gradient(tiny_backbone):
    spec, arrays, _, _ = setup(tiny_backbone, [WOMAN])
    frozen = {"unet": tiny_backbone.params["unet"]}
    cond = jax.tree.map(lambda x: jnp.asarray(x[0, :1]).repeat(BATCH, 0), arrays.neutral)
    z_t = jax.random.normal(jax.random.key(0), (BATCH, *spec.latent_shape))
    h, skips = jax.jit(spec.encode)(frozen, z_t, jnp.full(BATCH, 500), cond)

    def loss(remat, h):
        return jnp.sum(tiny_backbone.decode(frozen, h, skips, remat) ** 2)

    def kept(remat):
        """Bytes stored for the backward pass, without parameters and skips."""
        residuals = jax.eval_shape(lambda h: jax.vjp(partial(loss, remat), h)[1], h)
        weights = {x.shape for x in jax.tree.leaves((frozen, skips))}
        found = [x for x in jax.tree.leaves(residuals) if x.shape not in weights]
        return sum(x.size * x.dtype.itemsize for x in found)

    assert kept(True) < kept(False) / 2
    plain, again = (jax.jit(jax.grad(partial(loss, remat)))(h) for remat in (False, True))
    np.testing.assert_allclose(again, plain, rtol=1e-4, atol=1e-5)


def test_target_of_fairness_safety_and_counterparts():
    """The target per sample, with the guidance of its neutral prompt, against the formulas."""
    rng = np.random.default_rng(0)
    neutral, own, empty = rng.normal(size=(3, 4, 2, 2, 1)).astype(np.float32)
    prompt_index, guidance = np.int32([0, 1, 1, 0]), np.float32([2, 5])
    s = guidance[prompt_index][:, None, None, None]
    expected = {
        (False, False): empty + s * (own - empty),
        (True, False): own + s * (neutral - own),
        (True, True): neutral + s * (own - neutral),
        (False, True): neutral + s * (own - neutral),
    }
    for (is_safety, has_counterparts), target in expected.items():
        concept = EmbeddedConcepts(
            *[None] * 4, np.bool_(is_safety), np.bool_(has_counterparts), guidance, *[None] * 4
        )
        found = objective.target(concept, prompt_index, neutral, own, empty)
        np.testing.assert_allclose(found, target, rtol=1e-5)
