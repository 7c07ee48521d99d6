"""What the attacker finds for each prompt: searched in batches, and saved after each.

The folder of the part has `found.json`, with the budget, the prompts and the distance of each found
picture from the base model's, and `vectors.npz`, with the free embeddings of each prompt. An
interrupted search continues where it stopped.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from respodiff_jax.adapters import Adapter, CombinedAdapter, steerings
from respodiff_jax.adapters.reading import read_contexts, read_prompts
from respodiff_jax.backbone import Backbone, Conditioning
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation.attack.search import (
    Budget,
    Case,
    Victim,
    differences,
    encode_after,
    find_tokens,
    find_vectors,
    look_up,
    on_devices,
    picture_distance,
    words,
)
from respodiff_jax.evaluation.drawing import Request, draw_pictures
from respodiff_jax.evaluation.pictures import Picture
from respodiff_jax.generation.sampling import (
    SamplerOptions,
    default_batch_size,
    denoise,
    initial_noise,
)
from respodiff_jax.method.schedule import Schedule
from respodiff_jax.progress import Progress
from respodiff_jax.storage import read_json, write_whole

if TYPE_CHECKING:
    from respodiff_jax.evaluation.spec import EvaluationSpec

FOUND_FILE, VECTORS_FILE = "found.json", "vectors.npz"


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found for P prompts.

    Attributes:
      prompts: each prompt with the words before it.
      ids: for each text encoder the token ids of the prompts, after K places that the attack fills,
        int `(P, L)`.
      vectors: for each text encoder the free embeddings, `(P, K, D)`.
    """

    prompts: tuple[str, ...]
    ids: list[np.ndarray]
    vectors: list[np.ndarray]

    @property
    def sha256(self) -> str:
        """A digest of the free embeddings."""
        return hashlib.sha256(b"".join(own.tobytes() for own in self.vectors)).hexdigest()

    def conditioning(self, model: Backbone, rows: Sequence[int], resolution: int) -> Conditioning:
        """What the UNet gets, at `resolution` pixels, of these prompts with their embeddings."""
        key = "attack", resolution
        if key not in model.programs:
            functions = replace(model, params={}, load=None)
            model.programs[key] = jax.jit(partial(encode_after, functions, resolution))
        rows = np.asarray(rows)
        ids, vectors = [x[rows] for x in self.ids], [x[rows] for x in self.vectors]
        encoders = {k: v for k, v in model.params.items() if k.startswith("text_encoder")}
        return model.programs[key](encoders, ids, vectors)


def draw_attacked(
    model: Backbone,
    adapter: Adapter | CombinedAdapter | None,
    spec: "EvaluationSpec",
    requests: Sequence[Request],
    weights: np.ndarray | None,
    reads: bool,
    options: SamplerOptions,
    settings: Mapping[str, Any],
    out: pathlib.Path,
) -> dict[str, list[Picture]]:
    """Attacks the prompts, and draws the pictures of what was found.

    Args:
      model: the model.
      adapter: the N concepts, or None to attack the base model.
      spec: of the evaluation.
      requests: M pictures of the prompts as they are, `spec.images_per_prompt` of each.
      weights: `(M, N)`, weight of each concept in each picture, as if all prompts were open.
      reads: whether the adapter's decisions on prompts apply.
      options, settings: of the pictures.
      out: folder of the evaluation.

    Returns:
      The pictures by folder, those of found words, then those of free embeddings.
    """
    each = spec.images_per_prompt
    found = attack(
        model,
        adapter,
        None if weights is None else weights[::each],
        reads,
        requests[::each],
        options,
        spec.budget,
        spec.seed,
        out / "attack",
        settings,
    )
    rows = [i // each for i in range(len(requests))]
    with_words = [replace(r, prompt=found.prompts[i]) for i, r in zip(rows, requests, strict=True)]
    # Free embeddings have no text. Their rows in `found` stand for them.
    numbered = [f"<{i}> {r.prompt}" for i, r in zip(rows, requests, strict=True)]
    row_of = dict(zip(numbered, rows, strict=True))
    with_vectors = [replace(r, prompt=text) for text, r in zip(numbered, requests, strict=True)]

    def encode_free(texts):
        return found.conditioning(model, [row_of[text] for text in texts], options.resolution)

    def read_free(texts):
        return read_contexts(adapter, encode_free(texts).context)

    pictures = {}
    for name, attacked, encode, read in (
        ("found words", with_words, None, partial(read_prompts, adapter, model)),
        ("free embeddings", with_vectors, encode_free, read_free),
    ):
        steering = spec.weights(adapter, attacked, each, read) if reads else weights
        digest = {"vectors": found.sha256} if encode else {}
        pictures[f"attack/{name}"] = draw_pictures(
            model,
            attacked,
            out / "attack" / name,
            options,
            adapter,
            weights,
            {**settings, **digest},
            steering,
            encode,
        )
    return pictures


def check_attack(
    out: pathlib.Path,
    spec: "EvaluationSpec",
    requests: Mapping[str, Sequence[Request]],
    model: Backbone,
) -> None:
    """Checks budget and folder before weights are read.

    Raises:
      UserError: if the tokens leave no room for a prompt, or the folder has another attack.
    """
    budget, length = spec.budget, min(len(ids[0]) for ids in model.tokenise([""]))
    (plain,) = spec.folders("attack")
    _read(out / "attack", _record(requests[plain][:: spec.images_per_prompt], budget, spec.seed))
    if budget.tokens > length - 3:
        raise UserError(
            f"`attack_tokens` is {budget.tokens}, but the text encoder of"
            f" {model.identity['name']} reads {length} tokens, with begin and end; expected at most"
            f" {length - 3}, which leaves one to the prompt"
        )


def attack(
    model: Backbone,
    adapter: Adapter | CombinedAdapter | None,
    weights: np.ndarray | None,
    reads: bool,
    requests: Sequence[Request],
    options: SamplerOptions,
    budget: Budget,
    seed: int,
    folder: pathlib.Path,
    settings: Mapping[str, Any],
) -> Found:
    """Attacks each prompt; continues an interrupted attack.

    Args:
      model: the model.
      adapter: the N concepts, or None to attack the base model.
      weights: `(P, N)`, weight of each concept, as if all prompts were open; None without adapter.
      reads: whether the adapter's decisions on prompts apply.
      requests: one for each of P prompts; its seed gives the base model's picture to reach.
      options: how pictures are sampled.
      budget: of the attacker.
      seed: of its random numbers.
      folder: receives what is found.
      settings: JSON-able, everything else that the result depends on.

    Raises:
      UserError: if the folder has what another attack found, naming what differs.
    """
    allowed = words(model.tokenizers[0])
    # K filler words keep the places of the tokens that the attack will put there.
    filler = model.tokenizers[0].decode([int(np.flatnonzero(allowed)[0])]).strip()
    before = " ".join([filler] * budget.tokens)
    ids = model.tokenise([f"{before} {request.prompt}" for request in requests])
    record = _record(requests, budget, seed, settings)
    found, vectors = _read(folder, record)
    folder.mkdir(parents=True, exist_ok=True)
    if len(found) < len(requests):
        search = _searcher(model, adapter, reads, options, budget, seed, allowed)
        devices, resolution = jax.local_device_count(), options.resolution
        at_a_time = options.batch_size or default_batch_size(len(requests), devices, resolution)
        # A gradient computes `draws` latents of each prompt at once.
        size = max(at_a_time // devices // budget.draws, 1) * devices
        progress = Progress(total=len(requests), desc="attack", initial=len(found), unit="prompt")
        for start in range(len(found), len(requests), size):
            rows = np.arange(start, min(start + size, len(requests)))
            padded = np.resize(rows, size)  # all batches have one size, so they compile once
            tokens, new_vectors, distances = search(
                padded,
                [requests[row] for row in padded],
                [i[padded] for i in ids],
                None if weights is None else weights[padded],
            )
            for place, row in enumerate(rows):
                text = model.tokenizers[0].decode(tokens[place]).strip()
                found.append(
                    {
                        "prompt": f"{' '.join(text.split())} {requests[row].prompt}",
                        "tokens": tokens[place].tolist(),
                        "distance_tokens": round(float(distances[0][place]), 6),
                        "distance_vectors": round(float(distances[1][place]), 6),
                    }
                )
            parts = (vectors, new_vectors) if vectors else (new_vectors,)
            vectors = [np.concatenate(x)[: len(found)] for x in zip(*parts, strict=True)]
            _write(folder, record | {"found": found}, vectors)
            progress.update(len(rows))
        progress.close()
    return Found(tuple(entry["prompt"] for entry in found), ids, vectors)


def _record(
    requests: Sequence[Request],
    budget: Budget,
    seed: int,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What the result depends on, as JSON gives it back."""
    record = {
        "budget": dataclasses.asdict(budget),
        "chosen_by": "picture_distance",
        "seed": seed,
        "requests": [dataclasses.asdict(request) for request in requests],
    }
    return json.loads(json.dumps(record | ({"settings": settings} if settings else {})))


def _searcher(
    model: Backbone,
    adapter: Adapter | CombinedAdapter | None,
    reads: bool,
    options: SamplerOptions,
    budget: Budget,
    seed: int,
    allowed: np.ndarray,
):
    """A function that attacks one batch of prompts; its programs are compiled once."""
    parts = () if adapter is None else adapter.parts
    modules = tuple(part.module for part in parts)
    schedule = Schedule.from_config(model.scheduler_config, options.num_steps)
    sampled = Schedule.from_config(model.scheduler_config, options.num_steps, options.sampler)
    functions = replace(model, params={}, load=None)
    mesh = Mesh(np.asarray(jax.local_devices()), ("data",))
    name = "attack", modules, schedule.num_steps, options.sampler, options.resolution, budget, mesh
    if name not in model.programs:
        victim = Victim(functions, modules, schedule, options.resolution)
        model.programs[name] = (
            jax.jit(partial(denoise, functions, (), sampled)),
            jax.jit(partial(denoise, functions, modules, sampled)),
            jax.jit(partial(picture_distance, victim, sampled)),
            *(on_devices(search, victim, budget, mesh) for search in (find_tokens, find_vectors)),
        )
    base, steered, distance, for_tokens, for_vectors = model.programs[name]
    by_prompt = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.device_put(model.params, NamedSharding(mesh, PartitionSpec()))
    readings = tuple(part.reading if reads else None for part in parts)
    uncond = model.encode_prompts([options.negative_prompt], options.resolution, params)
    tables = [np.asarray(table) for table in model.token_tables(model.params)]
    key = jax.random.key(seed)

    def search(numbers, requests, ids, weights):
        prompts, seeds = zip(*((r.prompt, r.seed) for r in requests), strict=True)
        noise = initial_noise(seeds, model.latent_shape(options.resolution))
        cond = model.encode_prompts(prompts, options.resolution, params)
        noise, cond = jax.device_put((noise, cond), by_prompt)
        z_0 = base(params, noise, cond, uncond, (), options.guidance_scale)
        chosen = () if adapter is None else steerings(adapter, weights)
        weight = jnp.ones((*z_0.shape[:-1], 1))
        if adapter is not None:
            picture = steered(params, noise, cond, uncond, chosen, options.guidance_scale)
            weight = differences(z_0, picture)
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.asarray(numbers))
        rngs = [np.random.default_rng([seed, number]) for number in numbers]
        by_words = by_vectors = None
        for restart in range(budget.restarts):
            search_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, restart)
            if restart:
                starts = [[rng.choice(np.flatnonzero(allowed), budget.tokens) for rng in rngs]]
            else:
                last = [last_words(row, allowed, budget.tokens) for row in ids[0]]
                starts = [last, [np.full_like(row, row[-1]) for row in last]]
            starts = [jnp.asarray(np.stack(start)) for start in starts]
            case = Case(search_keys, z_0, weight, tuple(ids), chosen, starts[0])

            def judge(best, found, vectors, case=case):
                drawing = case, noise, uncond, options.guidance_scale
                distances = distance(params, readings, *drawing, vectors)
                return _better(best, jax.device_get((found, distances)))

            tokens = for_tokens(params, readings, allowed, case)
            for found in (*starts, tokens):
                by_words = judge(by_words, found, look_up(tables, found))
            vectors = for_vectors(params, readings, tokens, case)
            by_vectors = judge(by_vectors, vectors, vectors)
        tokens, words_distance = by_words
        vectors, distances = _better((look_up(tables, tokens), words_distance), by_vectors)
        return tokens, vectors, (words_distance, distances)

    return search


def last_words(ids: np.ndarray, allowed: np.ndarray, count: int) -> np.ndarray:
    """The last `count` words of a prompt that stands after `count` filler tokens.

    A prompt with fewer words repeats them; one without usable words gives the filler.

    Args:
      ids: tokens of the prompt, `(L,)`.
      allowed: which tokens are words, bool `(V,)`.
      count: K.

    Returns:
      int `(K,)`.
    """
    own = ids[1 + count :]
    words = own[allowed[own]]
    words = words if len(words) else ids[1 : 1 + count]
    return np.resize(words[::-1], count)[::-1]


def _better(
    old: tuple[Any, np.ndarray] | None, new: tuple[Any, np.ndarray]
) -> tuple[Any, np.ndarray]:
    """Of two results the one with the smaller distance, prompt by prompt."""
    if old is None:
        return new
    is_new = new[1] < old[1]

    def choose(a, b):
        return np.where(is_new.reshape(-1, *(1,) * (a.ndim - 1)), b, a)

    return jax.tree.map(choose, old, new)


def _read(
    folder: pathlib.Path, record: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """What an earlier call found for the first prompts, in a folder that may be empty."""
    path = folder / FOUND_FILE
    if not path.is_file():
        return [], []
    old = read_json(path, "record of an attack")
    if differing := [name for name in record if old.get(name) != record[name]]:
        raise UserError(
            f"{path} is of another attack, which differs in {', '.join(differing)}; choose another"
            f" `out`, or remove {folder}"
        )
    try:
        with np.load(io.BytesIO((folder / VECTORS_FILE).read_bytes())) as stored:
            vectors = [stored[name] for name in stored.files]
        found = old["found"][: len(vectors[0])]
        return found, [own[: len(found)] for own in vectors]
    except (OSError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{folder} does not hold a whole attack ({error}); remove that folder, then run the"
            " same command again"
        ) from error


def _write(folder: pathlib.Path, record: Mapping[str, Any], vectors: Sequence[np.ndarray]) -> None:
    """Saves what was found so far.

    The vectors come first: after an interruption there may be more vectors than prompts; `_read`
    drops them.
    """
    content = io.BytesIO()
    np.savez(content, *vectors)
    write_whole(folder / VECTORS_FILE, content.getvalue())
    write_whole(folder / FOUND_FILE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
