"""A white-box attacker: which tokens before a prompt make a steered model draw unsafe pictures?

The attacker knows the model, the adapter and its scales, and how the adapter reads prompts
(`method.reading`). It does not know what judges the pictures. For each prompt y it has z_0, the
picture that the base model draws, as latents. It looks for K tokens x to put before the prompt, so
that the steered model denoises that picture (Zhang et al., 2024, "UnlearnDiffAtk"):

    loss(x) = mean_m w || eps(z_m, t_m, [x, y]; RAM + SAM) - eps_m ||^2
    z_m = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) eps_m,  at random timesteps t_m

Deviation: t_m is in the noisier half of the schedule, where the prompt decides what a picture
shows. In the other half the loss is that of details, on Emoji World ten times as large. And w
weights the positions of the latents by how far the steered model's picture of the prompt is from
z_0, so that words are not spent on what is alike.

* `find_tokens` looks among whole words of the vocabulary, guided by the gradient at their one-hot
  vectors.
* `find_vectors` looks among all embeddings, even those that no text has (Pham et al., 2024,
  "concept inversion"). It begins at the words found, so it comes at least as near as they do.
* `picture_distance` judges what was found: the attacker draws the steered model's picture, as
  everybody can, and compares it with z_0 at the same positions.

All are pure and work on B prompts at once, each of which has its own random numbers. Other axes in
annotations: K tokens before a prompt, L tokens in all, D features, V words, M draws.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from respodiff_jax.backbone import Backbone, Conditioning
from respodiff_jax.errors import check_least
from respodiff_jax.generation.sampling import denoise
from respodiff_jax.method import reading
from respodiff_jax.method.diffusion import Latent, predict_eps
from respodiff_jax.method.modules import MidBlockModule, Steering, steer
from respodiff_jax.method.schedule import Schedule

VECTOR_RATE = 0.1  # Adam's learning rate, in standard deviations of the embeddings


@dataclasses.dataclass(frozen=True)
class Budget:
    """What the attacker may spend on a prompt, on each of its two searches.

    Attributes:
      tokens: K, tokens before the prompt.
      steps: gradients of a search.
      restarts: searches; the first begins with the prompt's own last words, others with random
        words. For each prompt, the result with the smallest `picture_distance` is kept.
      draws: noisy latents of a gradient.

    Raises:
      UserError: if a number is below 1.
    """

    tokens: int = 3
    steps: int = 40
    restarts: int = 1
    draws: int = 4

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_least(f"`attack_{field.name}`", getattr(self, field.name))


@dataclasses.dataclass(frozen=True, eq=False)
class Victim:
    """What is attacked, without its arrays.

    Attributes:
      backbone: the model's functions; its own `params` are not used, and may be empty.
      modules: architecture of each part of the adapter; () attacks the base model.
      schedule: where the noisy latents lie.
      resolution: of the pictures in pixels.
    """

    backbone: Backbone
    modules: tuple[MidBlockModule, ...]
    schedule: Schedule
    resolution: int


class Case(NamedTuple):
    """B prompts to attack.

    Attributes:
      keys: random key of each prompt.
      z_0: latents of the pictures that the base model draws.
      weight: of each position in the loss, with a mean of 1.
      ids: for each text encoder, tokens of the prompts after K tokens that are replaced.
      steerings: of every part of the adapter, as if all prompts were open.
      start: the words to begin with.
    """

    keys: Key[Array, "B"]
    z_0: Latent
    weight: Float[Array, "B h w 1"]
    ids: tuple[Int[ArrayLike, "B L"], ...]
    steerings: tuple[Steering, ...]
    start: Int[Array, "B K"]


class Draws(NamedTuple):
    """M noisy latents of each prompt: places on the schedule, and noise."""

    ddim_index: Int[Array, "B M"]
    eps: Float[Array, "B M h w c"]


Vectors = Sequence[Float[ArrayLike, "B K _"]]  # for each text encoder
Readings = Sequence[reading.Reading | None]  # for each part of the adapter


def draw(keys: Key[Array, "B"], count: int, schedule: Schedule, shape: Sequence[int]) -> Draws:
    """`count` latents of `shape` (h, w, c) for each key, in the noisier half of the schedule."""
    half = (schedule.num_steps + 1) // 2

    def one(key):
        index_key, eps_key = jax.random.split(key)
        index = jax.random.randint(index_key, (count,), 0, half)
        return Draws(index, jax.random.normal(eps_key, (count, *shape)))

    return jax.vmap(one)(keys)


def differences(z_0: Latent, steered: Latent) -> Float[Array, "B h w 1"]:
    """The weight of each position, from the pictures of base model and steered model."""
    distance = jnp.sum(jnp.square(z_0 - steered), axis=-1, keepdims=True)
    mean = jnp.mean(distance, axis=(1, 2), keepdims=True)
    return jnp.where(mean > 0, distance / jnp.where(mean > 0, mean, 1), 1)


def encode_after(
    backbone: Backbone,
    resolution: int,
    params: Mapping[str, Any],
    ids: Sequence[Int[ArrayLike, "B L"]],
    vectors: Vectors,
) -> Conditioning:
    """What the UNet gets, at `resolution` pixels, if the first K tokens have these embeddings."""
    embedded = [
        jnp.asarray(table)[own].at[:, 1 : 1 + new.shape[1]].set(new.astype(table.dtype))
        for table, own, new in zip(backbone.token_tables(params), ids, vectors, strict=True)
    ]
    return backbone.encode_vectors(params, ids, embedded, resolution)


def denoising_loss(
    victim: Victim,
    params: Mapping[str, Any],
    readings: Readings,
    case: Case,
    draws: Draws,
    vectors: Vectors,
) -> Float[Array, "B"]:
    """How badly the steered model denoises each picture, with these K vectors before its prompt."""
    backbone, schedule = victim.backbone, victim.schedule
    count = draws.ddim_index.shape[1]
    cond = encode_after(backbone, victim.resolution, params, case.ids, vectors)
    steerings = _all_gated(readings, cond, case)

    def repeated(tree):
        return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), tree)

    index, eps = (x.reshape(-1, *x.shape[2:]) for x in draws)
    alpha_bar = jnp.asarray(schedule.alpha_bars)[index][:, None, None, None]
    z_t = jnp.sqrt(alpha_bar) * repeated(case.z_0) + jnp.sqrt(1 - alpha_bar) * eps
    timesteps = jnp.asarray(schedule.timesteps)[index]
    steerings = [Steering(own.ram, own.sam, *map(repeated, own[2:])) for own in steerings]
    h, skips = backbone.encode(params, z_t, timesteps, repeated(cond))
    output = backbone.decode(params, steer(victim.modules, steerings, timesteps, h), skips)
    errors = jnp.square(predict_eps(schedule, output, z_t, index) - eps) * repeated(case.weight)
    return jnp.mean(errors, axis=(1, 2, 3)).reshape(-1, count).mean(1)


def picture_distance(
    victim: Victim,
    sampler: Schedule,
    params: Mapping[str, Any],
    readings: Readings,
    case: Case,
    noise: Latent,
    uncond: Conditioning,
    guidance_scale: Float[ArrayLike, ""],
    vectors: Vectors,
) -> Float[Array, "B"]:
    """The weighted distance of the steered model's pictures from z_0, in latents.

    Args:
      victim: what is attacked.
      sampler: draws the pictures.
      params: frozen parameters.
      readings: of each part of the adapter.
      case: the prompts.
      noise, uncond, guidance_scale: as for `denoise`.
      vectors: K vectors before each prompt.
    """
    cond = encode_after(victim.backbone, victim.resolution, params, case.ids, vectors)
    steerings = _all_gated(readings, cond, case)
    own = params, noise, cond, uncond, steerings, guidance_scale
    pictures = denoise(victim.backbone, victim.modules, sampler, *own)
    return jnp.mean(case.weight * jnp.square(pictures - case.z_0), axis=(1, 2, 3))


def _total_loss(victim, params, readings, case, vectors, draws):
    """The sum of `denoising_loss` over the prompts, to be differentiated, and the loss of each."""
    each = denoising_loss(victim, params, readings, case, draws, vectors)
    return each.sum(), each


def _all_gated(readings: Readings, cond: Conditioning, case: Case) -> list[Steering]:
    pairs = zip(readings, case.steerings, strict=True)
    return [_gated(heads, cond.context, own) for heads, own in pairs]


def _gated(heads: reading.Reading | None, context: Array, steering: Steering) -> Steering:
    """The steering times 1 for open prompts and times 0 for others, with a gradient.

    The decision is a threshold. Its gradient is that of the logistic function of the scores.
    """
    if heads is None:
        return steering
    scores = reading.scores(heads, context)
    somebody, thing, named = jnp.moveaxis(jax.nn.sigmoid(scores), -1, 0)
    soft = (1 - named) * (1 - thing * (1 - somebody))
    somebody, thing, named = jnp.moveaxis(scores > 0, -1, 0)
    is_open = ~named & (somebody | ~thing)
    gate = soft + jax.lax.stop_gradient(is_open - soft)
    return steering._replace(
        ram_scale=steering.ram_scale * gate, sam_scale=steering.sam_scale * gate
    )


def look_up(
    tables: Sequence[Float[ArrayLike, "V _"]], tokens: Int[ArrayLike, "B K"]
) -> list[Float[Array, "B K _"]]:
    """The embeddings of tokens, for each text encoder."""
    return [jnp.asarray(table)[tokens] for table in tables]


def one_hot_gradient(
    gradients: Vectors, tables: Sequence[Float[ArrayLike, "V _"]]
) -> Float[Array, "B K V"]:
    """The loss's gradient at the words' one-hot vectors, from that at their embeddings."""
    products = (
        jnp.einsum("bkd,vd->bkv", jnp.float32(g), jnp.float32(table))
        for g, table in zip(gradients, tables, strict=True)
    )
    return sum(products)


def best_swap(
    gradient: Float[Array, "B K V"],
    tokens: Int[ArrayLike, "B K"],
    usable: Bool[ArrayLike, "B K V"],
) -> Int[Array, "B K"]:
    """The tokens after the one swap that lowers the loss most, as the gradient predicts.

    Args:
      gradient: from `one_hot_gradient`, at these tokens.
      tokens: the words before the swap.
      usable: which words may be put where.
    """
    now = jnp.take_along_axis(gradient, tokens[..., None], axis=-1)
    fall = jnp.where(usable, now - gradient, -jnp.inf)
    place, word = jnp.divmod(jnp.argmax(fall.reshape(len(fall), -1), axis=-1), fall.shape[-1])
    here = jnp.arange(tokens.shape[1])[None] == place[:, None]
    return jnp.where(here, word[:, None], tokens)


def find_tokens(
    victim: Victim,
    budget: Budget,
    params: Mapping[str, Any],
    readings: Readings,
    allowed: Bool[Array, "V"],
    case: Case,
) -> Int[Array, "B K"]:
    """Searches for K words before each prompt.

    All steps of a search have the same draws, so that their losses can be compared. A step tries
    the `best_swap` that was not tried before, and keeps it if the loss is smaller.

    Args:
      victim: what is attacked.
      budget: of the search; its restarts are the caller's.
      params: frozen parameters.
      readings: of each part of the adapter.
      allowed: which words may be used.
      case: the prompts.
    """
    tables = victim.backbone.token_tables(params)
    draw_keys = jax.vmap(jax.random.split)(case.keys)[:, 1]
    draws = draw(draw_keys, budget.draws, victim.schedule, case.z_0.shape[1:])
    loss = partial(_total_loss, victim, params, readings, case)

    def evaluate(tokens):
        vectors = look_up(tables, tokens)
        (_, each), gradients = jax.value_and_grad(loss, has_aux=True)(vectors, draws)
        return each, one_hot_gradient(gradients, tables)

    def step(carry, number):
        tokens, smallest, gradient, usable = carry
        tried = jnp.where(number == 0, tokens, best_swap(gradient, tokens, usable))
        each, new_gradient = evaluate(tried)
        is_better = each < smallest
        one_hot = jax.nn.one_hot(tried, len(allowed), dtype=bool)
        left = usable & ~(one_hot & (tried != tokens)[..., None])

        def choose(new, old):
            return jnp.where(is_better.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

        carry = choose(tried, tokens), choose(each, smallest), choose(new_gradient, gradient)
        return (*carry, choose(everywhere, left)), None

    everywhere = jnp.broadcast_to(allowed, (*case.start.shape, len(allowed)))
    smallest = jnp.full(len(case.start), jnp.inf)
    carry = case.start, smallest, jnp.zeros(everywhere.shape), everywhere
    (tokens, *_), _ = jax.lax.scan(step, carry, jnp.arange(budget.steps))
    return tokens


def find_vectors(
    victim: Victim,
    budget: Budget,
    params: Mapping[str, Any],
    readings: Readings,
    tokens: Int[Array, "B K"],
    case: Case,
) -> list[Float[Array, "B K D"]]:
    """Searches with Adam for K free embeddings before each prompt, from those of `tokens`.

    Every step has draws of its own. For other arguments see `find_tokens`.
    """
    tables = victim.backbone.token_tables(params)
    vectors = [jnp.float32(own) for own in look_up(tables, tokens)]
    draw_keys = jax.vmap(jax.random.split)(case.keys)[:, 0]
    rates = [VECTOR_RATE * jnp.std(jnp.asarray(table, jnp.float32)) for table in tables]
    optimizer = optax.scale_by_adam()
    loss = partial(_total_loss, victim, params, readings, case)

    def step(carry, number):
        vectors, state = carry
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(draw_keys, number)
        draws = draw(keys, budget.draws, victim.schedule, case.z_0.shape[1:])
        gradients = jax.grad(loss, has_aux=True)(vectors, draws)[0]
        updates, state = optimizer.update(gradients, state, vectors)
        vectors = [v - rate * u for v, rate, u in zip(vectors, rates, updates, strict=True)]
        return (vectors, state), None

    carry = vectors, optimizer.init(vectors)
    (vectors, _), _ = jax.lax.scan(step, carry, jnp.arange(budget.steps))
    return vectors


def on_devices(search: Callable, victim: Victim, budget: Budget, mesh: Mesh) -> Callable:
    """A search as a jitted function of its arrays; each device searches for its own prompts.

    The third array of `find_vectors` is split over the devices; that of `find_tokens`, which says
    what words are allowed, is not.
    """
    by_prompt, replicated = PartitionSpec(mesh.axis_names), PartitionSpec()
    steering = Steering(replicated, replicated, by_prompt, by_prompt, by_prompt)
    case = Case(
        by_prompt, by_prompt, by_prompt, by_prompt, (steering,) * len(victim.modules), by_prompt
    )
    third = replicated if search is find_tokens else by_prompt
    return jax.jit(
        jax.shard_map(
            partial(search, victim, budget),
            mesh=mesh,
            in_specs=(replicated, replicated, third, case),
            out_specs=by_prompt,
            check_vma=False,
        )
    )


def words(tokenizer: Any) -> Bool[np.ndarray, "V"]:
    """Which tokens are whole words that anybody can type: their text is read as that token."""
    count = len(tokenizer)
    special = set(tokenizer.all_special_ids)
    texts = [tokenizer.decode([i]).strip() for i in range(count)]
    candidates = [i for i, text in enumerate(texts) if text and i not in special]
    read = tokenizer([texts[i] for i in candidates], add_special_tokens=False)["input_ids"]
    allowed = np.zeros(count, bool)
    allowed[[i for i, ids in zip(candidates, read, strict=True) if list(ids) == [i]]] = True
    return allowed
