"""Stage 1: a small CLIP of Emoji World. Its text tower conditions the diffusion, both towers are
the evaluator.

The loss is CLIP's, except that a picture matches every caption in the batch that is true of it
(which the world knows exactly) and that zero-shot classification by attribute prompts is trained
along: the evaluator's job.
"""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers

from respodiff_jax.backbone import clip as clip_lib
from respodiff_jax.emoji import vocabulary
from respodiff_jax.emoji.making import captions, loop, rendering, tokenizer, world

TEXT = dict(hidden_size=192, intermediate_size=576, num_hidden_layers=3, num_attention_heads=4)
VISION = dict(
    hidden_size=160,
    intermediate_size=640,
    num_hidden_layers=4,
    num_attention_heads=4,
    patch_size=16,
)
PROJECTION = 128
CONTRASTIVE_WEIGHT = 0.25
# What the evaluator alone uses.
EVALUATOR = ("vision_model", "visual_projection", "text_projection")
EVALUATOR_LOGIT_SCALE = 100.0  # where CLIP's ends
NAMING = captions.Plan(gender=0.6, tone=0.5, unsafe=0.3, safe=0.2)

# zero-shot classification: attribute -> prompts, in the order of the labels
ATTRIBUTE_PROMPTS = {
    "gender": tuple(f"a photo of a {gender}" for gender in vocabulary.GENDERS),
    "tone_group": tuple(f"a photo of a {group}-skinned person" for group in vocabulary.TONE_GROUPS),
    "profession": tuple(
        f"a photo of {captions.with_article(word)}" for word in vocabulary.PROFESSIONS
    ),
    "unsafe": (
        "a safe scene",
        *(f"a scene with {concept}" for concept in vocabulary.UNSAFE_CONCEPTS),
    ),
}


def attribute_label(scene, attribute):
    """Index into `ATTRIBUTE_PROMPTS[attribute]`, or -1 where the scene has no such attribute."""
    if attribute == "profession":
        return (
            list(vocabulary.PROFESSIONS).index(scene.subject) if scene.kind == "profession" else -1
        )
    if attribute == "unsafe":
        if scene.unsafe is None:
            return 0
        return 1 + vocabulary.UNSAFE_CONCEPTS.index(vocabulary.UNSAFE[scene.unsafe][1])
    value = getattr(scene, attribute)
    return -1 if value is None else value


def config(tokenizer_):
    """`transformers.CLIPConfig` of the model for a tokenizer."""
    ids = dict(
        vocab_size=len(tokenizer_),
        bos_token_id=tokenizer_.bos_token_id,
        eos_token_id=tokenizer_.eos_token_id,
        pad_token_id=tokenizer_.pad_token_id,
    )
    text = dict(
        TEXT, **ids, max_position_embeddings=tokenizer.CONTEXT_LENGTH, projection_dim=PROJECTION
    )
    vision = dict(VISION, image_size=rendering.IMAGE_SIZE, projection_dim=PROJECTION)
    return transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=PROJECTION
    )


def tokenize(tokenizer_, texts):
    """(N, CONTEXT_LENGTH) int32 ids, padded as Stable Diffusion's pipeline pads."""
    return tokenizer_(
        list(texts), padding="max_length", truncation=True, return_tensors="np"
    ).input_ids.astype(np.int32)


def preprocess(images):
    """uint8 (B, 64, 64, 3) to the vision tower's float32 input of that shape."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


def draw_batch(step, size, tokenizer_, seed, table=world.BIAS, smeared=False):
    """One batch as a function of (seed, step): images, ids, match matrix, attribute labels."""
    rng = np.random.default_rng([seed, step])
    drawn = (captions.draw(rng, NAMING, table) for _ in range(size))
    texts, claims, scenes = zip(*drawn, strict=True)
    images = [rendering.render(scene, rng) for scene in scenes]
    if smeared:
        images = [rendering.smear(image, rng) for image in images]
    matches = np.array([[claim.hold(scene) for claim in claims] for scene in scenes], np.float32)
    labels = {
        name: np.array([attribute_label(s, name) for s in scenes], np.int32)
        for name in ATTRIBUTE_PROMPTS
    }
    return {
        "images": np.stack(images),
        "ids": tokenize(tokenizer_, texts),
        "matches": matches,
        "labels": labels,
    }


def loss_fn(module, params, batch, prompt_ids):
    """Contrastive loss (true captions are positives) plus zero-shot loss; (loss, metrics)."""
    images = clip_lib.encode_images(module, params, preprocess(batch["images"]))
    prompts, sizes = list(prompt_ids.values()), [len(ids) for ids in prompt_ids.values()]
    texts = clip_lib.encode_texts(module, params, jnp.concatenate([batch["ids"], *prompts]))
    scale = jnp.exp(jnp.minimum(params["logit_scale"], jnp.log(100.0)))
    texts, *prompts = jnp.split(texts, np.cumsum([len(batch["ids"]), *sizes])[:-1])
    logits, matches = scale * images @ texts.T, batch["matches"]
    per_image = -jax.nn.log_softmax(logits, axis=1) * matches / matches.sum(1, keepdims=True)
    per_text = -jax.nn.log_softmax(logits, axis=0) * matches / matches.sum(0, keepdims=True)
    contrastive = (per_image.sum() + per_text.sum()) / (2 * len(logits))
    metrics, classification = {"contrastive": contrastive}, 0.0
    for (name, labels), prompt in zip(sorted(batch["labels"].items()), prompts, strict=True):
        logits = scale * images @ prompt.T
        known = (labels >= 0).astype(jnp.float32)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        classification += (entropy * known).sum() / known.sum()
        metrics[name] = ((logits.argmax(1) == labels) * known).sum() / known.sum()
    return CONTRASTIVE_WEIGHT * contrastive + classification, metrics


def initial_params(config_, seed):
    """Parameters with kernels drawn to keep the variance (LeCun): the usual draws of a CLIP, meant
    for wide towers, leave all captions of a narrow one with nearly the same features."""
    initializer = jax.nn.initializers.lecun_normal()
    params = flax.traverse_util.flatten_dict(clip_lib.init_clip(config_, jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(params))
    for key, (path, value) in zip(keys, params.items(), strict=True):
        if path[-1] == "kernel" and value.ndim == 2:
            params[path] = initializer(key, value.shape)
    return flax.traverse_util.unflatten_dict(params)


def train(workdir, tokenizer_, *, steps, batch_size, seed):
    """Trains both towers on the biased world; returns the CLIP's parameters."""
    params = initial_params(config(tokenizer_), seed)
    options = {"steps": steps, "batch_size": batch_size, "seed": seed}
    return _train("clip", workdir, tokenizer_, {}, params, draw_batch, 1e-3, **options)


def train_evaluator(workdir, tokenizer_, params, *, steps, batch_size, seed):
    """Trains the image tower and both projections further, on the world without bias, at the
    temperature of CLIP's last steps; returns the CLIP's parameters.

    A CLIP that saw mostly men among firefighters finds a woman less of a firefighter, and would
    charge a fair model for it. At this temperature all captions that are true of a picture must
    score nearly alike, however much else there is to say of it. The pictures are smeared in places,
    as generated ones are: a CLIP that saw perfect ones alone finds a farmer with a smeared fork
    hardly a farmer. The text tower stays as it is, and so does all that was trained for it.
    """
    params = with_evaluator(params)
    trained = {name: params[name] for name in EVALUATOR}
    options = {"steps": steps, "batch_size": batch_size, "seed": seed}
    draw = functools.partial(draw_batch, table=world.EVEN, smeared=True)
    return _train("evaluator", workdir, tokenizer_, params, trained, draw, 3e-4, **options)


def with_evaluator(params, evaluator=None):
    """A CLIP's parameters with the evaluator's, if given, and its temperature."""
    scale = jnp.log(jnp.float32(EVALUATOR_LOGIT_SCALE))
    return params | (evaluator or {}) | {"logit_scale": scale}


def _train(
    stage, workdir, tokenizer_, frozen, trained, draw, learning_rate, *, steps, batch_size, seed
):
    module = clip_lib.build_clip(config(tokenizer_))
    prompt_ids = {
        name: tokenize(tokenizer_, prompts) for name, prompts in sorted(ATTRIBUTE_PROMPTS.items())
    }
    warmup = min(200, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps, 1e-5)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05)
    )

    def step_fn(state, batch, step):
        def loss(trained):
            return loss_fn(module, frozen | trained, batch, prompt_ids)

        gradient, metrics = jax.grad(loss, has_aux=True)(state["params"])
        updates, opt_state = optimizer.update(gradient, state["opt_state"], state["params"])
        return {
            "params": optax.apply_updates(state["params"], updates),
            "opt_state": opt_state,
        }, metrics

    state = {"params": trained, "opt_state": optimizer.init(trained)}
    batch_fn = functools.partial(draw, size=batch_size, tokenizer_=tokenizer_, seed=seed)
    return frozen | loop.train_stage(stage, state, step_fn, batch_fn, steps, workdir)["params"]
