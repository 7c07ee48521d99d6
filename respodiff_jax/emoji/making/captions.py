"""Draws captions of Emoji World, each with a scene that it describes.

The kind of subject is drawn first, then which attributes the caption names, then their values, then
the rest of the scene. Named values are uniform, so that rare combinations are learned too. The rest
of the scene follows `world.BIAS`.
"""

import dataclasses

from respodiff_jax.data.prompt_files import with_article
from respodiff_jax.emoji import vocabulary
from respodiff_jax.emoji.making import world

PERSON_WORDS = ("person", "person", "person", "human")
GENDER_WORDS = (("woman", "female"), ("man", "male"))  # as a noun, as an adjective
TEMPLATES = {
    "{a}": 3,
    "a photo of {a}": 8,
    "a picture of {a}": 2,
    "an image of {a}": 2,
    "a portrait of {a}": 1,
    "a headshot of {a}": 1,
    "photo of {bare}": 1,
    "picture of {bare}": 1,
    "image of {bare}": 1,
    "portrait of {bare}": 1,
    "headshot of {bare}": 1,
}
SCENE_CAPTIONS = ("a scene", "a scene", "a photo of a scene", "a picture")
CONCEPT_CAPTIONS = {
    "violence": ("violence", "a violent scene", "a photo of violence", "a scene with violence"),
    "smoking": ("smoking", "a smoking scene", "a photo of smoking", "a scene with smoking"),
}

# subject of a caption -> probability
KINDS = {
    "nothing": 0.10,
    "scene": 0.04,
    "concept": 0.04,
    "person": 0.17,
    "profession": 0.36,
    "activity": 0.07,
    "look": 0.07,
    "thing": 0.15,
}


@dataclasses.dataclass(frozen=True)
class Naming:
    """How often captions about people and things name an attribute, as probabilities."""

    gender: float = 0.35
    tone: float = 0.25
    unsafe: float = 0.15
    safe: float = 0.04


def unsafe_objects(concept):
    """The unsafe objects of a concept, such as {"cigarette"} for "smoking"."""
    return frozenset(name for name, (_, of) in vocabulary.UNSAFE.items() if of == concept)


def describe(claims, style=0):
    """Describes the subject of `world.Claims` with a kind, as a noun phrase without an article.

    For example "dark-skinned woman doctor", "blond man", "person running" or "dog". `style`, any
    int, chooses among equivalent words.
    """
    if claims.kind == "thing":
        return claims.subject
    words = []
    if claims.tone_group is not None:
        words.append(f"{vocabulary.TONE_GROUPS[claims.tone_group]}-skinned")
    person, adjective = PERSON_WORDS[style % len(PERSON_WORDS)], None
    if claims.gender is not None:
        person, adjective = GENDER_WORDS[claims.gender]
    if claims.kind == "profession":
        if adjective:
            words.append(person if style % 3 else adjective)
        words.append(claims.subject)
    elif claims.kind == "activity":
        words += [person, claims.subject]
    else:
        words += [claims.subject, person] if claims.subject else [person]
    return " ".join(words)


def _pick(rng, options):
    return options[rng.integers(len(options))]


def _weighted(rng, weights):
    keys = list(weights)
    total = rng.random() * sum(weights.values())
    for key in keys:
        total -= weights[key]
        if total < 0:
            return key
    return keys[-1]


def draw(rng, naming=None, table=world.BIAS):
    """Draws a caption, its `world.Claims`, and a `world.Scene` that it describes.

    `naming` None is `Naming()`. The table, `world.BIAS` or `world.EVEN`, is the distribution of
    what the caption leaves open.
    """
    kind = _weighted(rng, KINDS)
    if kind == "nothing":
        caption, claims = "", world.Claims()
    elif kind == "scene":
        # "A scene" is always safe, although it does not say so. "A person" is often unsafe.
        safe = world.Claims(unsafe=frozenset())
        caption, claims = _pick(rng, SCENE_CAPTIONS), world.Claims()
        if rng.random() < 0.2:
            caption, claims = "a safe scene", safe
        return caption, claims, world.draw_scene(rng, safe, table)
    elif kind == "concept":
        concept = _pick(rng, vocabulary.UNSAFE_CONCEPTS)
        caption = _pick(rng, CONCEPT_CAPTIONS[concept])
        claims = world.Claims(unsafe=unsafe_objects(concept))
    else:
        caption, claims = _draw_subject_caption(rng, kind, naming or Naming())
    return caption, claims, world.draw_scene(rng, claims, table)


def _draw_subject_caption(rng, kind, naming):
    """(caption, claims) about a person or a thing."""
    named = {name: rng.random() < p for name, p in dataclasses.asdict(naming).items()}
    unsafe, prefix, suffix = None, "", ""
    if named["unsafe"] and rng.random() < 0.25:
        concept = _pick(rng, vocabulary.UNSAFE_CONCEPTS)
        unsafe, prefix = unsafe_objects(concept), vocabulary.UNSAFE_ADJECTIVES[concept]
    elif named["unsafe"]:
        thing = _pick(rng, list(vocabulary.UNSAFE))
        unsafe, suffix = frozenset({thing}), " " + _pick(rng, vocabulary.UNSAFE_PHRASES[thing])
    elif named["safe"]:
        unsafe, prefix = frozenset(), "safe"
    is_person = kind != "thing"
    claims = world.Claims(
        kind=kind,
        subject=None if kind == "person" else _pick(rng, world.subjects(kind)),
        gender=int(rng.integers(2)) if is_person and named["gender"] else None,
        tone_group=int(rng.integers(3)) if is_person and named["tone"] else None,
        unsafe=unsafe,
    )
    bare = describe(claims, style=int(rng.integers(12))) + suffix
    template = f"a {prefix} photo of {{a}}" if prefix else _weighted(rng, TEMPLATES)
    return template.format(a=with_article(bare), bare=bare), claims
