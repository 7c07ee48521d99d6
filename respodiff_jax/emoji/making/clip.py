"""Stages `clip` and `evaluator`: a small CLIP of Emoji World.

Its text tower conditions the UNet. Both towers together are the evaluator. The loss is CLIP's, with
two changes: a picture matches every caption of the batch that is true of it, and the zero-shot
classification that the evaluator is for is trained as well.
"""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers

from respodiff_jax.backbone import clip as clip_lib
from respodiff_jax.data.prompt_files import with_article
from respodiff_jax.emoji import vocabulary
from respodiff_jax.emoji.making import captions, loop, rendering, world
from respodiff_jax.emoji.making import tokenizer as tokenizer_lib

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
# The parameters that only the evaluator uses.
EVALUATOR = ("vision_model", "visual_projection", "text_projection")
EVALUATOR_LOGIT_SCALE = 100.0  # the value at which CLIP's training ends
NAMING = captions.Naming(gender=0.6, tone=0.5, unsafe=0.3, safe=0.2)

# attribute -> prompts of its zero-shot classification, in the order of the labels
ATTRIBUTE_PROMPTS = {
    "gender": tuple(f"a photo of a {gender}" for gender in vocabulary.GENDERS),
    "tone_group": tuple(f"a photo of a {group}-skinned person" for group in vocabulary.TONE_GROUPS),
    "profession": tuple(f"a photo of {with_article(word)}" for word in vocabulary.PROFESSIONS),
    "unsafe": (
        "a safe scene",
        *(f"a scene with {concept}" for concept in vocabulary.UNSAFE_CONCEPTS),
    ),
}


def attribute_label(scene, attribute):
    """Index into `ATTRIBUTE_PROMPTS[attribute]`; -1 if the scene does not have the attribute."""
    if attribute == "profession":
        if scene.kind != "profession":
            return -1
        return list(vocabulary.PROFESSIONS).index(scene.subject)
    if attribute == "unsafe":
        if scene.unsafe is None:
            return 0
        return 1 + vocabulary.UNSAFE_CONCEPTS.index(vocabulary.UNSAFE[scene.unsafe][1])
    value = getattr(scene, attribute)
    return -1 if value is None else value


def config(tokenizer):
    """The model's `transformers.CLIPConfig`, for a tokenizer."""
    text = dict(
        TEXT,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=tokenizer_lib.CONTEXT_LENGTH,
        projection_dim=PROJECTION,
    )
    vision = dict(VISION, image_size=rendering.IMAGE_SIZE, projection_dim=PROJECTION)
    return transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=PROJECTION
    )


def tokenize(tokenizer, texts):
    """Token ids (N, CONTEXT_LENGTH), int32, padded as in Stable Diffusion's pipeline."""
    return tokenizer(
        list(texts), padding="max_length", truncation=True, return_tensors="np"
    ).input_ids.astype(np.int32)


def preprocess(images):
    """Scales uint8 pictures (B, 64, 64, 3) to the vision tower's float32 input in [-1, 1]."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


def draw_batch(step, size, tokenizer, seed, table=world.BIAS, smeared=False):
    """Draws the batch of a step: images, ids, matches (image, caption) and attribute labels."""
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
        "ids": tokenize(tokenizer, texts),
        "matches": matches,
        "labels": labels,
    }


def loss_fn(module, params, batch, prompt_ids):
    """Loss and metrics: contrastive, with all true captions as positives, plus zero-shot."""
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


def initial_params(clip_config, seed):
    """Draws a CLIP's parameters, with kernels that keep the variance (LeCun).

    CLIP's own initialisation is for wide towers. In a narrow one it gives all captions nearly the
    same features.
    """
    initializer = jax.nn.initializers.lecun_normal()
    params = flax.traverse_util.flatten_dict(clip_lib.init_clip(clip_config, jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(params))
    for key, (path, value) in zip(keys, params.items(), strict=True):
        if path[-1] == "kernel" and value.ndim == 2:
            params[path] = initializer(key, value.shape)
    return flax.traverse_util.unflatten_dict(params)


def train(workdir, tokenizer, *, steps, batch_size, seed):
    """Trains both towers on the biased world; returns the CLIP's parameters."""
    params = initial_params(config(tokenizer), seed)
    draw = functools.partial(draw_batch, size=batch_size, tokenizer=tokenizer, seed=seed)
    return _train("clip", workdir, tokenizer, {}, params, draw, 1e-3, steps)


def train_evaluator(workdir, tokenizer, params, *, steps, batch_size, seed):
    """Trains the image tower and both projections further; returns the CLIP's parameters.

    The text tower does not change, so the UNet trained for it stays valid.

    * The world has no bias. A CLIP that saw mostly men among firefighters scores a woman lower as a
      firefighter, and a fair model would be blamed for that.
    * The temperature is that at which CLIP's training ends. All true captions of a picture must
      then score nearly the same, whatever else the picture shows.
    * The pictures are smeared in places, as generated ones are. A CLIP that saw only perfect
      pictures hardly recognises a farmer whose fork is smeared.
    """
    params = with_evaluator(params)
    trained = {name: params[name] for name in EVALUATOR}
    draw = functools.partial(draw_batch, size=batch_size, tokenizer=tokenizer, seed=seed)
    draw = functools.partial(draw, table=world.EVEN, smeared=True)
    return _train("evaluator", workdir, tokenizer, params, trained, draw, 3e-4, steps)


def with_evaluator(params, evaluator=None):
    """Replaces a CLIP's temperature by the evaluator's, and its parameters if they are given."""
    scale = jnp.log(jnp.float32(EVALUATOR_LOGIT_SCALE))
    return params | (evaluator or {}) | {"logit_scale": scale}


def _train(stage, workdir, tokenizer, frozen, trained, batch_fn, learning_rate, steps):
    module = clip_lib.build_clip(config(tokenizer))
    prompt_ids = {
        name: tokenize(tokenizer, prompts) for name, prompts in sorted(ATTRIBUTE_PROMPTS.items())
    }
    warmup = min(200, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps, 1e-5)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05)
    )

    def loss(trained, batch, step):
        return loss_fn(module, frozen | trained, batch, prompt_ids)

    step_fn = loop.gradient_step(loss, optimizer)
    state = {"params": trained, "opt_state": optimizer.init(trained)}
    return frozen | loop.train_stage(stage, state, step_fn, batch_fn, steps, workdir)["params"]
