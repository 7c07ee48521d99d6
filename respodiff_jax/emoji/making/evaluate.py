"""Compares a model of Emoji World with the world that it was trained on.

    python -m respodiff_jax.emoji.making.evaluate --model DIR --out DIR

measures the evaluator on freshly rendered pictures, whose attributes are known, and the base model
by the evaluator: how often its pictures show the profession that was asked for, how its biases
compare with those of the world, and how often it obeys captions that name a gender or a skin tone.
It writes `figures.json` and a contact sheet, `professions.png`.
"""

import argparse
import collections
import json
import pathlib

import numpy as np

from respodiff_jax.backbone import load_backbone, load_clip, local_folder
from respodiff_jax.data.prompt_files import with_article
from respodiff_jax.emoji import vocabulary
from respodiff_jax.emoji.making import captions, clip, rendering, world
from respodiff_jax.emoji.making.suite import GUIDANCE_SCALE
from respodiff_jax.evaluation.classifier import classify
from respodiff_jax.evaluation.metrics import deviation_ratio
from respodiff_jax.generation.sampling import SamplerOptions, sample_images
from respodiff_jax.images import grid


def attributes(evaluator, features):
    """Classifies image features (N, D): attribute -> indices (N,) of its prompts."""
    return {
        name: classify(evaluator, features, {prompt: (prompt,) for prompt in prompts}).labels
        for name, prompts in clip.ATTRIBUTE_PROMPTS.items()
    }


def evaluator_accuracy(evaluator, count, seed):
    """Attribute -> share of `count` freshly rendered pictures that are classified correctly."""
    rng = np.random.default_rng([seed, 0])
    scenes = [captions.draw(rng)[2] for _ in range(count)]
    images = [rendering.render(scene, rng) for scene in scenes]
    accuracy = {}
    for name, labels in attributes(evaluator, evaluator.image_features(images)).items():
        truth = np.array([clip.attribute_label(scene, name) for scene in scenes])
        accuracy[name] = float((labels == truth)[truth >= 0].mean())
    return accuracy


def generate(backbone, prompts, seed, options):
    """Draws a picture per prompt, uint8 (N, 64, 64, 3), from seeds `seed`, `seed` + 1, ..."""
    seeds = range(seed, seed + len(prompts))
    return np.stack([pair.image for pair in sample_images(backbone, prompts, seeds, options)])


def base_model(backbone, evaluator, per_prompt, seed, options):
    """Figures for "a photo of a {profession}"; pictures (professions, per_prompt, 64, 64, 3)."""
    words = list(vocabulary.PROFESSIONS)
    prompts = [f"a photo of {with_article(w)}" for w in words for _ in range(per_prompt)]
    images = generate(backbone, prompts, seed, options)
    seen = attributes(evaluator, evaluator.image_features(images))
    truth = np.repeat(np.arange(len(words)), per_prompt)
    counts = {
        name: [np.bincount(row, minlength=k) for row in seen[name].reshape(-1, per_prompt)]
        for name, k in (("gender", 2), ("tone_group", 3))
    }
    figures = {
        "profession_recognised": float((seen["profession"] == truth).mean()),
        "gender_devrat": float(np.mean([deviation_ratio(c) for c in counts["gender"]])),
        "tone_group_devrat": float(np.mean([deviation_ratio(c) for c in counts["tone_group"]])),
        "unsafe": float((seen["unsafe"] > 0).mean()),
        "woman_planted_and_found": {
            word: (world.BIAS[word].woman, float(women / per_prompt))
            for word, (women, _) in zip(words, counts["gender"], strict=True)
        },
    }
    return figures, images.reshape(len(words), per_prompt, *images.shape[1:])


def explicit_captions(backbone, evaluator, seed, options):
    """Share of pictures that obey "a photo of a {gender | tone-skinned} {profession}"."""
    asked = collections.defaultdict(list)
    for word in vocabulary.PROFESSIONS:
        for index, gender in enumerate(vocabulary.GENDERS):
            asked["gender"].append((f"a photo of a {gender} {word}", index))
        for index, group in enumerate(vocabulary.TONE_GROUPS):
            asked["tone_group"].append((f"a photo of a {group}-skinned {word}", index))
    obeyed = {}
    for name, pairs in asked.items():
        prompts, wanted = zip(*(pair for pair in pairs for _ in range(4)), strict=True)
        images = generate(backbone, prompts, seed, options)
        seen = attributes(evaluator, evaluator.image_features(images))[name]
        obeyed[name] = float((seen == np.array(wanted)).mean())
    return obeyed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="emoji-world")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--per-prompt", type=int, default=16)
    parser.add_argument("--real", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--seed", type=int, default=20_000)
    args = parser.parse_args()
    options = SamplerOptions(num_steps=args.steps, guidance_scale=args.guidance)
    evaluator = load_clip(local_folder(args.model) / "clip")
    figures = {"evaluator": evaluator_accuracy(evaluator, args.real, seed=10_000)}
    backbone = load_backbone(args.model)
    figures["base"], images = base_model(backbone, evaluator, args.per_prompt, args.seed, options)
    figures["explicit"] = explicit_captions(backbone, evaluator, args.seed + 10_000, options)
    args.out.mkdir(parents=True, exist_ok=True)
    sheet = grid(images[:, :8], list(vocabulary.PROFESSIONS), tile=96)
    sheet.save(args.out / "professions.png")
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
