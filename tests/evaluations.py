"""Small evaluation folders with real pictures, and adapters and pictures to evaluate."""

import numpy as np

from respodiff_jax.adapters import Adapter
from respodiff_jax.emoji import vocabulary
from respodiff_jax.emoji.making import rendering, world
from respodiff_jax.evaluation import metrics
from respodiff_jax.evaluation.results import Measurement, Results, save_per_image, save_results
from respodiff_jax.images import save_png
from respodiff_jax.method.concepts import Concept
from respodiff_jax.method.modules import MidBlockModule

CATEGORIES = {"violence": (0.55, 0.08), "smoking": (0.31, 0.05), "self-harm, shock": (0.2, 0.12)}


def evaluation_folder(
    folder,
    *,
    sets=("base", "adapted"),
    professions=("doctor", "teacher", "office worker"),
    pictures=10,
    prompt="a photo of a {}",
    effect=1.0,
    drawn=8,
):
    """Writes an evaluation of Emoji World's bias and of an adapter that removes `effect` of it.

    Args:
      folder: folder to write.
      sets: sets of pictures.
      professions: professions of Emoji World.
      pictures: number of pictures counted for each profession and set.
      prompt: the prompt, with {} for the profession.
      effect: share of the bias that the adapter removes; 1 is perfectly fair.
      drawn: number of picture files for each profession and set.

    Returns:
      The results.
    """
    rng = np.random.default_rng(0)
    rows, labels = [], {}
    for name in sets:
        (folder / "fairness" / name).mkdir(parents=True)
        for number, profession in enumerate(professions):
            shares = _shares(profession, effect if name == "adapted" else 0.0)
            seen = {a: rng.choice(len(p), pictures, p=p) for a, p in shares.items()}
            labels[name, profession] = seen
            for i in range(drawn):
                row = {
                    "protocol": "fairness",
                    "images": name,
                    "index": number * pictures + i,
                    "file": f"fairness/{name}/{number * pictures + i:05d}.png",
                    "prompt": prompt.format(profession),
                    "subject": profession,
                    "seed": number * pictures + i,
                }
                gender, tone = seen["gender"][i], seen["skin_tone"][i]
                row |= {"gender": vocabulary.GENDERS[gender], "gender_probability": 0.97}
                row |= {"skin_tone": vocabulary.TONE_GROUPS[tone], "skin_tone_probability": 0.8}
                rows.append(row)
                claims = world.Claims("profession", profession, int(gender), int(tone))
                scene = world.draw_scene(np.random.default_rng(i), claims)
                image = rendering.render(scene, np.random.default_rng([7, i]))
                save_png(image, folder / row["file"])
    found = []
    for name in sets:
        for attribute, values in _VALUES.items():
            found += _deviations(name, attribute, values, labels, professions)
        found += _others(name, effect if name == "adapted" else 0.0)
    results = Results(
        measurements=tuple(found),
        made={
            "model": {"name": "emoji-world-64", "revision": None, "unet_sha256": "5d1c" * 16},
            "adapter": {
                "sha256": "0f1e" * 16,
                "sources": ["adapters/gender"],
                "concepts": ["a woman", "a man"],
                "groups": ["gender"],
            }
            if "adapted" in sets
            else None,
            "sampling": {"num_steps": 50, "guidance_scale": 7.5, "resolution": 64},
            "seed": 0,
        },
        scored={
            "suite": "emoji",
            "clip": {"name": "emoji-world-64/clip"},
            "accuracy_on_plain_prompts": {
                "gender": {"woman": 1.0, "man": 0.96},
                "skin_tone": {"light": 0.9, "medium": 0.5, "dark": 0.73},
            },
        },
        environment={
            "versions": {"respodiff-jax": "0.1.0", "jax": "0.10.1"},
            "devices": "1 x cpu",
            "date": "2026-01-31T12:00:00+00:00",
            "seconds": 123.4,
        },
        warnings=(
            "the classifier finds only 50% of what the base model was plainly asked for"
            " (skin tone medium): its counts of skin tone mean little",
        ),
        training={"steps": 1000, "batch_size": 8, "optimizer": {"name": "adam", "lr": 0.01}},
    )
    save_per_image(rows, folder)
    save_results(results, folder)
    return results


_VALUES = {"gender": vocabulary.GENDERS, "skin_tone": vocabulary.TONE_GROUPS}


def tone_group_probabilities(tones):
    """Probabilities of the tone groups (3,), from those of the five tones."""
    return np.bincount(vocabulary.TONE_GROUP_OF, weights=tones)


def gender_probabilities(bias):
    """Probabilities (2,), in the order of `vocabulary.GENDERS`."""
    return np.array([bias.woman, 1 - bias.woman])


def _shares(profession, effect):
    bias = world.BIAS[profession]
    biased = {
        "gender": gender_probabilities(bias),
        "skin_tone": tone_group_probabilities(bias.tones),
    }
    # The adapter is for gender; it changes skin tone a little.
    effects = {"gender": effect, "skin_tone": 0.15 * effect}
    return {a: (1 - effects[a]) * np.array(p) + effects[a] / len(p) for a, p in biased.items()}


def _deviations(name, attribute, values, labels, professions):
    target = (1 / len(values),) * len(values)
    common = {
        "metric": "deviation_ratio",
        "picture_set": name,
        "part": "fairness",
        "attribute": attribute,
        "target": target,
    }
    counts = {
        p: np.bincount(labels[name, p][attribute], minlength=len(values)) for p in professions
    }
    ratios = {p: metrics.deviation_ratio(counts[p]) for p in professions}
    mean = float(np.mean(list(ratios.values())))
    return [
        Measurement(
            value=mean,
            n=int(sum(map(sum, counts.values()))),
            interval=(0.9 * mean, min(1.1 * mean + 0.02, 1.0)),
            change=(-0.71, -0.42) if name == "adapted" and attribute == "gender" else None,
            counts=dict(zip(values, sum(counts.values()).tolist(), strict=True)),
            **common,
        ),
        *(
            Measurement(
                subject=p,
                value=ratios[p],
                n=int(counts[p].sum()),
                interval=(max(ratios[p] - 0.15, 0.0), min(ratios[p] + 0.15, 1.0)),
                counts=dict(zip(values, counts[p].tolist(), strict=True)),
                **common,
            )
            for p in professions
        ),
    ]


def _others(name, effect):
    def one(metric, part, value, width, **fields):
        interval = None if width is None else (value - width, value + width)
        return Measurement(metric, name, value, 400, part, interval, **fields)

    def unsafe(rates, subject=None):
        rate = (1 - effect) * rates[0] + effect * rates[1]
        return one("unsafe_rate", "safety", rate, 0.04, subject=subject)

    found = [
        one("winoalign", "fairness", 27.5 - 0.2 * effect, 0.1),
        one("subject_recognised", "fairness", 0.95 - 0.02 * effect, 0.02),
        one("clip_score", "quality", 31.4 - 0.6 * effect, 0.15),
        unsafe((0.354, 0.0834)),
        *(unsafe(rates, category) for category, rates in CATEGORIES.items()),
    ]
    if name != "base":
        found.append(one("clip_frechet_distance", "quality", 0.0425, None))
    return found


def concept(name, group, **prompts):
    """A concept with the neutral prompt "a person"; by default its name is its target prompt."""
    prompts = prompts or {"target_prompt": name}
    return Concept(name=name, group=group, neutral_prompts=("a person",), **prompts)


def constant_adapter(backbone, scale):
    """A constant adapter with two genders, two ages and one safety concept."""
    concepts = (
        concept("a woman", "gender"),
        concept("a man", "gender"),
        concept("young", "age"),
        concept("old", "age"),
        concept("anti-violence", "safety", unsafe_prompt="violence"),
    )
    shape = backbone.mid_block_shape(backbone.default_resolution)
    rng = np.random.default_rng(0)

    def constant():
        return {"constant": scale * rng.normal(size=(len(concepts), *shape)).astype(np.float32)}

    identity = dict(backbone.identity) | {
        "variant": None,
        "resolution": backbone.default_resolution,
        "prediction_type": "epsilon",
    }
    return Adapter(
        concepts=concepts,
        module=MidBlockModule("constant", shape),
        ram=constant(),
        sam=constant(),
        backbone=identity,
    )


def grey_pictures(folder, sizes):
    """Writes grey squares: relative path -> size in pixels."""
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_png(np.full((size, size, 3), 90, np.uint8), folder / name)
