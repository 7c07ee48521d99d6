"""The paper's three tasks on Emoji World, with the optimiser settings that suit its small UNet.

Gender and skin tone have the paper's objective, from "a person". Safety has a safe counterpart of
each neutral prompt, so that it also acts where a prompt asks for what is unsafe. RAM and SAM see no
profession. The reading of prompts is fitted to every second profession and to three of four things.

All are maps of the mid-block's output (`mlp`). `ablation` measures the other kinds of module, and
the paper's objective for safety.

Adam's epsilon is as large as the gradient of one element of a constant, about 5e-6. (For safety,
`metrics.jsonl` has the norm of the gradient over all 3,072 elements.) With the usual 1e-8, all
elements move equally fast, however little they matter, and lambda, which scales SAM's loss, makes
no difference.
"""

from ml_collections import ConfigDict

from respodiff_jax.data import contrast
from respodiff_jax.data.prompt_files import with_article
from respodiff_jax.emoji import vocabulary
from respodiff_jax.method.concepts import Concept
from respodiff_jax.training.config import add_concepts, default

# task -> kind of module -> learning rates of RAM and SAM. The first kind is the recipe's. Constants
# have higher rates: one of their elements acts on one position, a weight of a map on all.
LEARNING_RATES = {
    "gender": {"mlp": (3e-3, 3e-4), "conv": (1e-3, 3e-4), "constant": (0.1, 0.01)},
    "skin_tone": {"mlp": (1e-3, 3e-4), "conv": (1e-3, 3e-4), "constant": (0.03, 0.009)},
    "safety": {"mlp": (3e-3, 3e-4)},
    "safety_hardened": {"mlp": (3e-3, 3e-4)},
    "safety_as_published": {"constant": (0.3, 0.2), "mlp": (1e-3, 1e-3), "conv": (1e-3, 3e-4)},
}

# task -> value -> the phrases that name it
WORDS = {
    "gender": {
        noun: (noun, f"{noun} {{person}}", f"{adjective} {{person}}")
        for noun, adjective in (("woman", "female"), ("man", "male"))
    },
    "skin_tone": {
        tone: tuple(f"{tone}-skinned {who}" for who in ("person", "{person}", "woman", "man"))
        for tone in vocabulary.TONE_GROUPS
    },
}


def task_config(task: str, kind: str | None = None) -> ConfigDict:
    """Builds the training config of a task.

    * `gender`: "a woman" and "a man" from "a person".
    * `skin_tone`: a light-, a medium- and a dark-skinned person from "a person".
    * `safety`: from prompts that ask for violence or smoking, or do not, to safe photos.
    * `safety_hardened`: the same, trained against an adversary. The base model takes the first
      steps alone, which decide gender and skin tone.
    * `safety_as_published`: away from violence and from smoking, from "a scene".

    Args:
      task: a key of `LEARNING_RATES`.
      kind: kind of the modules, a key of `LEARNING_RATES[task]`; None is the first.

    Returns:
      An unlocked config.
    """
    kind = kind or next(iter(LEARNING_RATES[task]))
    rates = dict(zip(("lr_ram", "lr_sam"), LEARNING_RATES[task][kind], strict=True))
    config = default()
    config.model.name = "emoji-world"
    config.model.dtype = "float32"
    config.module.kind = kind
    if (task, kind) == ("skin_tone", "mlp"):
        config.module.hidden_channels = 192  # the same number as the mid-block
    config.concept_defaults.update(rates)
    config.optimizer.eps = 1e-5
    config.optimizer.lr_schedule = "cosine"
    config.optimizer.warmup_steps = 100
    # After 400 steps, 17 of 360 pictures show a wrong skin tone; after 800, 11.
    config.train.steps = 800 if task in ("skin_tone", "safety_as_published") else 400
    config.train.batch_size = 8
    if task == "safety_hardened":
        config.adversary.every = 4
    config.checkpoint.every = 100
    config.log.grid_every = 200
    config.log.grid_steps = 20
    config.log.grid_prompts = tuple(f"a photo of {with_article(word)}" for word in HELD_OUT[:4])
    config.log.grid_guidance_scale = 3.0
    config.reading.people = _people()
    # Not "woman farmer": the captions of Emoji World begin with an article or with "photo". The
    # base model does not understand prompts that begin otherwise.
    config.reading.templates = tuple(t for t in contrast.TEMPLATES if t != "{subject}")
    things = [word for word in vocabulary.THINGS if word not in HELD_OUT_THINGS]
    config.reading.things = (*things, *vocabulary.UNSAFE)

    add_concepts(config, _concepts(task, rates))
    return config


# Professions and things that no setting was chosen on and that no reading is trained on.
HELD_OUT = tuple(vocabulary.PROFESSIONS)[1::2]
HELD_OUT_THINGS = tuple(vocabulary.THINGS)[::4]


def _people() -> tuple[str, ...]:
    """People for contrast prompts: with and without gender and skin tone."""
    professions = [word for word in vocabulary.PROFESSIONS if word not in HELD_OUT]
    tones = [f"{tone}-skinned" for tone in vocabulary.TONE_GROUPS]
    phrases = ["person", "human", *professions]
    for tone in tones:
        phrases += [f"{tone} person", *(f"{tone} {word}" for word in professions[::2])]
    for noun, adjective in (("woman", "female"), ("man", "male")):
        phrases += [noun, *(f"{noun} {word}" for word in professions[::3])]
        phrases += [f"{adjective} {word}" for word in professions[1::3]]
    phrases += [f"person {activity}" for activity in vocabulary.ACTIVITIES]
    looks = [look for look in vocabulary.LOOKS if look]
    phrases += [f"{look} {word}" for look, word in zip(looks, professions[::2], strict=True)]
    return (*phrases, *(f"{look} person" for look in looks))


def _concepts(task: str, rates: dict[str, float]) -> dict[str, Concept]:
    """The concepts of a task by key, with the given learning rates."""
    if task in ("safety", "safety_hardened"):
        is_hardened = task == "safety_hardened"
        pairs = _safe_counterparts()
        neutral, safe, asks = zip(*pairs, strict=True)
        concept = Concept(
            name="anti-unsafe",
            group="safety",
            neutral_prompts=neutral,
            target_prompt=safe,
            unsafe_prompt=" and ".join(vocabulary.UNSAFE_CONCEPTS),
            guidance_scale=tuple(5.0 if asking else 1.0 for asking in asks),
            default_scale=0.77 if is_hardened else 0.7,
            max_timestep=900 if is_hardened else None,
            **rates,
        )
        return {"unsafe": concept}
    if task == "safety_as_published":
        return {
            word: Concept(
                name=f"anti-{word}",
                group="safety",
                neutral_prompts=("a scene",),
                unsafe_prompt=word,
                guidance_scale=28.0,
                lambda_sem=1.0,
                **rates,
            )
            for word in vocabulary.UNSAFE_CONCEPTS
        }
    targets = {
        "gender": {word: f"a {word}" for word in vocabulary.GENDERS},
        "skin_tone": {word: f"a {word}-skinned person" for word in vocabulary.TONE_GROUPS},
    }[task]
    # The first steps decide what else a picture shows: the base model takes them alone.
    scale, max_timestep = {"gender": (1.0, 900), "skin_tone": (1.2, 950)}[task]
    return {
        key: Concept(
            name=target,
            group=task,
            neutral_prompts=("a person",),
            target_prompt=target,
            guidance_scale=4.0,
            lambda_sem=0.5,
            words=WORDS[task][key],
            default_scale=scale,
            max_timestep=max_timestep,
            **rates,
        )
        for key, target in targets.items()
    }


def _safe_counterparts() -> list[tuple[str, str, bool]]:
    """Neutral prompts, each with its safe counterpart and whether it asks for what is unsafe.

    Each subject stands twice: as it is, and asking.
    """
    tones = ["", *(f"{tone}-skinned " for tone in vocabulary.TONE_GROUPS)]
    people = [f"{tone}{word}" for word in ("person", *vocabulary.GENDERS) for tone in tones]
    activities = list(vocabulary.ACTIVITIES)[::2]
    active = [f"{word} {activities[i % len(activities)]}" for i, word in enumerate(people)]
    looks = [f"{look} person" for look in vocabulary.LOOKS if look]
    things = [word for i, word in enumerate(vocabulary.THINGS) if i % 4][::32]
    phrases = [phrase for named in vocabulary.UNSAFE_PHRASES.values() for phrase in named]
    adjectives = list(vocabulary.UNSAFE_ADJECTIVES.values())
    prompts = []
    for i, subject in enumerate([*people, *active, *looks, *things]):
        a_subject = with_article(subject)
        asking = f"a photo of {a_subject} {phrases[i % len(phrases)]}"
        if i % 3 == 2:
            asking = f"a {adjectives[i // 3 % len(adjectives)]} photo of {a_subject}"
        safe = f"a safe photo of {a_subject}"
        prompts += [(f"a photo of {a_subject}", safe, False), (asking, safe, True)]
    return prompts
