"""Measures Emoji World's recipes on professions, things and noise that no setting was chosen on.

    python -m respodiff_jax.emoji.making.reference --out REFERENCE
    python -m respodiff_jax.emoji.audit --out DIR [--seeds 21 22 23] [--use gender both ...]
        [--reference REFERENCE] [--scales 0.6 0.8 1.0] [--max-timesteps 900 1000] [--attack N]

trains the recipes of each use from every seed and evaluates them together: gender, skin tone,
safety, hardened safety, and gender with hardened safety. By default these are all measured. Reading
of prompts was fitted to other professions and things than these. It prints a Markdown table of
means and standard deviations over the seeds, and writes it to `DIR/audit.md`. `--scales` lists
factors of the adapters' scales to measure (default: 1), and `--max-timesteps` timesteps up to which
they steer (default: the recipes'). `--attack` attacks safety concepts
(`respodiff_jax.evaluation.attack`) and draws N pictures of each attacked prompt. Finished trainings
and evaluations are not repeated.

Pictures are drawn of open prompts without added words, of captions and, for safety, of prompts that
ask for unsafe objects. Prompts that name a value, prompts with a look ("old"), an unknown word
("successful") or a thing, and prompts without people, are only read.
"""

import argparse
import collections
import dataclasses
import itertools
import pathlib
from collections.abc import Sequence

import numpy as np

from respodiff_jax.adapters import Adapter, CombinedAdapter, combine, load_adapter
from respodiff_jax.adapters.reading import read_prompts
from respodiff_jax.backbone import Backbone, load_backbone
from respodiff_jax.data.prompt_files import fill_in, with_article
from respodiff_jax.emoji import recipes, vocabulary
from respodiff_jax.evaluation import Results, evaluate
from respodiff_jax.evaluation.results import Measurement, load_per_image
from respodiff_jax.evaluation.spec import ATTACKS, curve_conditions
from respodiff_jax.evaluation.suites import ASKED, Suite, load_suite
from respodiff_jax.method.reading import Decision
from respodiff_jax.training.waves import train

EVALUATION_SEED = 20_000_000
MODEL = "emoji-world"
# A use of adapters -> the tasks, see `recipes`, whose adapters steer together
USES = {
    "gender": ("gender",),
    "skin_tone": ("skin_tone",),
    "safety": ("safety",),
    "hardened": ("safety_hardened",),
    "both": ("gender", "safety_hardened"),
}

# (heading, metric, attribute, whether adapted / base is shown); rows without figures are left out
_ROWS = (
    ("deviation ratio, gender", "deviation_ratio", "gender", False),
    ("deviation ratio, skin tone", "deviation_ratio", "skin_tone", False),
    ("profession recognised", "subject_recognised", None, False),
    ("CLIP score of professions", "winoalign", None, True),
    ("CLIP score of captions", "clip_score", None, True),
    ("Fréchet distance of captions", "clip_frechet_distance", None, True),
    ("Fréchet distance of captions, to biased pictures", "clip_frechet_distance", "biased", True),
    ("unsafe when not asked for", "unsafe_when_not_asked", None, False),
    ("unsafe when asked for", "unsafe_when_asked", None, False),
    *((f"unsafe, {name}", "attack_success", name, False) for name in ATTACKS),
    ("gender kept", "kept", "gender", False),
    ("skin tone kept", "kept", "skin_tone", False),
    ("open prompts steered", "steered", "open", False),
    ("open prompts with a look steered", "steered", "look", False),
    ("open prompts with an unknown word steered", "steered", "unknown", False),
    ("open prompts with a thing steered", "steered", "with thing", False),
    ("prompts that name a value steered", "steered", "named", False),
    ("prompts that name another attribute steered", "steered", "another", False),
    ("prompts without people steered", "steered", "nobody", False),
    ("prompts without people, with an unknown word, steered", "steered", "unknown thing", False),
    ("prompts of two things steered", "steered", "two things", False),
)


def held_out_suite() -> Suite:
    """The model's suite, with the professions that no setting was chosen on."""
    return dataclasses.replace(load_suite(None, MODEL), subjects=recipes.HELD_OUT)


def reading_measurements(
    adapter: Adapter | CombinedAdapter, model: Backbone, suite: Suite, group: str
) -> list[Measurement]:
    """The shares of a suite's prompts that a group's concepts steer, by what the prompts say."""
    prompts: dict[str, list[str]] = collections.defaultdict(list)
    words = {
        "look": [look for look in vocabulary.LOOKS if look],
        "unknown": [c.adjective for c in curve_conditions(1).values() if c.adjective],
    }
    for subject in suite.subjects:
        prompts["open"] += suite.prompts(subject)
        for kind, before in words.items():
            prompts[kind] += [p for word in before for p in suite.prompts(f"{word} {subject}")]
        for attribute, templates in (suite.named or {}).items():
            kind = "named" if attribute == group else "another"
            prompts[kind] += fill_in(templates.values(), subject)
        for thing in recipes.HELD_OUT_THINGS[::8]:
            prompts["with thing"] += suite.prompts(f"{subject} with {with_article(thing)}")
            prompts["with thing"] += suite.prompts(f"{thing} and {with_article(subject)}")
    things = recipes.HELD_OUT_THINGS
    for thing, other in zip(things, (*things[1:], things[0]), strict=True):
        prompts["two things"] += suite.prompts(f"{thing} and {with_article(other)}")
        for unsafe in vocabulary.UNSAFE:
            prompts["two things"].append(
                f"a photo of {with_article(thing)} with {with_article(unsafe)}"
            )
        prompts["nobody"] += suite.prompts(thing)
        prompts["unknown thing"] += [f"a photo of a {word} {thing}" for word in words["unknown"]]
    concept = [c.group for c in adapter.concepts].index(group)
    found = []
    for kind, texts in prompts.items():
        is_open = read_prompts(adapter, model, texts)[:, concept] == Decision.OPEN
        share = float(is_open.mean())
        found.append(Measurement("steered", "adapted", share, len(texts), "intent", attribute=kind))
    return found


def kept_measurements(folder: pathlib.Path, groups: Sequence[str]) -> list[Measurement]:
    """The shares of pictures of people that keep gender or skin tone, where that is not steered."""
    rows = [row for row in load_per_image(folder) if row["subject"] and row.get("gender")]
    labels = {(r["protocol"], r["index"], r["images"]): r for r in rows if r["subject"] != ASKED}
    pairs = [
        (labels[protocol, index, "base"], row)
        for (protocol, index, images), row in labels.items()
        if images == "adapted"
    ]
    return [
        Measurement(
            "kept",
            "adapted",
            float(np.mean([base[name] == row[name] for base, row in pairs])),
            len(pairs),
            "fairness",
            attribute=name,
        )
        for name in ("gender", "skin_tone")
        if name not in groups
    ]


def run_one(
    use: str,
    seed: int,
    scale: float,
    max_timestep: int | None,
    out: pathlib.Path,
    reference: pathlib.Path | None,
    num_steps: int,
    attacks: int = 0,
) -> Results:
    """Trains and evaluates the adapters of a use from one seed, unless that is already done.

    Args:
      use: a key of `USES`.
      seed: of the trainings.
      scale: multiplies the adapters' default scales.
      max_timestep: of all concepts; None is the recipes'.
      out: folder of trainings and evaluations.
      reference: what `making.reference` wrote, or None. Fair pictures are compared with those of a
        world in which the group is even, and with those of the biased world; safe pictures with
        those without unsafe objects.
      num_steps: sampling steps of the pictures.
      attacks: pictures of each attacked prompt; 0 attacks none.
    """
    adapters = []
    for task in USES[use]:
        config = recipes.task_config(task)
        config.seed, config.log.grid_every = seed, 0
        run = out / task / str(seed)
        train(config.lock(), run)
        adapters.append(_changed(load_adapter(run / "adapter"), scale, max_timestep))
    groups = [task for task in USES[use] if not task.startswith("safety")]
    is_safe = len(groups) < len(USES[use])
    folder = out / f"evaluation/{use}/{seed}/{_label(scale, max_timestep)}"
    suite = held_out_suite()
    model = load_backbone(MODEL, dtype="float32", abstract=True)
    common = {
        "preset": "paper",  # for all prompts; the amounts are below
        "groups": groups,
        "safe": is_safe,
        "suite": dataclasses.replace(suite, named={}, nobody=()),
        "seed": EVALUATION_SEED,
        "num_steps": num_steps,
    }

    def compared_with(pictures: str) -> Results:
        return evaluate(
            model,
            adapters,
            out=folder,
            part=["fairness"] * bool(groups) + ["quality"] + ["intent"] * is_safe,
            reference=reference and reference / pictures,
            images_per_subject=12,
            images_per_caption=1,
            images_per_prompt=3,
            **common,
        )

    added = []
    if reference and not is_safe:
        biased = compared_with("all").find("clip_frechet_distance")
        added += [dataclasses.replace(found, attribute="biased") for found in biased]
    results = compared_with("safe" if is_safe else groups[0])
    added += kept_measurements(folder, groups)
    if is_safe and attacks:
        own = {
            "out": folder.with_name(f"{folder.name} attack"),
            "part": "attack",
            "images_per_prompt": attacks,
        }
        added += evaluate(model, adapters, **own, **common).measurements
    if groups:
        model = load_backbone(MODEL, dtype="float32")
        added += reading_measurements(combine(adapters), model, suite, *groups)
    measurements = *results.measurements, *added
    return dataclasses.replace(results, measurements=measurements)


def _changed(adapter: Adapter, scale: float, max_timestep: int | None) -> Adapter:
    concepts = [
        dataclasses.replace(
            concept,
            default_scale=scale * concept.default_scale,
            max_timestep=concept.max_timestep if max_timestep is None else max_timestep,
        )
        for concept in adapter.concepts
    ]
    return dataclasses.replace(adapter, concepts=tuple(concepts))


def _label(scale: float, max_timestep: int | None) -> str:
    limit = "" if max_timestep is None else f", timesteps up to {max_timestep}"
    return f"scale {scale:g}{limit}"


def table(title: str, runs: Sequence[Results]) -> str:
    """Formats a Markdown table: base model, then mean and standard deviation over the seeds."""
    lines = [f"| {title} | base model | RAM + SAM | of the base's | pictures |", "|---" * 5 + "|"]
    for heading, metric, attribute, compared in _ROWS:
        cells = []
        for picture_set in ("base", "adapted"):
            values = [run.value(metric, picture_set, attribute=attribute) for run in runs]
            cells.append([value for value in values if value is not None])
        base, adapted = cells
        if not base and not adapted:
            continue
        share = [a / b for a, b in zip(adapted, base, strict=True)] if compared else []
        count = max(m.n for run in runs for m in run.find(metric, attribute=attribute))
        texts = [_mean(base), _mean(adapted), _mean(share)]
        lines.append(f"| {heading} | " + " | ".join(texts) + f" | {count} |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    """Mean and standard deviation, the latter if the values differ."""
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(set(values)) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--use", nargs="+", choices=USES, default=list(USES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[21, 22, 23])
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0])
    parser.add_argument("--max-timesteps", nargs="+", type=int, default=[None])
    parser.add_argument(
        "--reference", type=pathlib.Path, metavar="DIR", help="what making.reference wrote"
    )
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps of the pictures")
    parser.add_argument(
        "--attack", type=int, default=0, metavar="N", help="pictures of each attacked prompt"
    )
    args = parser.parse_args()
    tasks = [task for use in args.use for task in USES[use]]
    if args.attack and not any(task.startswith("safety") for task in tasks):
        parser.error(f"--attack attacks safety concepts, but --use {' '.join(args.use)} has none")
    tables = []
    for use in args.use:
        for scale, max_timestep in itertools.product(args.scales, args.max_timesteps):
            own = scale, max_timestep, args.out, args.reference, args.steps, args.attack
            runs = [run_one(use, seed, *own) for seed in args.seeds]
            tables.append(table(f"{use.replace('_', ' ')}, {_label(scale, max_timestep)}", runs))
    text = "\n\n".join(tables) + "\n"
    (args.out / "audit.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
