"""The paper's ablation on Emoji World: what each part of the method contributes.

    python -m respodiff_jax.emoji.ablation --out DIR [--task gender skin_tone safety both]
        [--variant NAME ...] [--seeds 0 1 2]

trains and evaluates every variant of every task from every seed, prints a Markdown table of means
and standard deviations over the seeds, and writes it to `DIR/ablation.md`. Finished trainings and
evaluations are not repeated: several processes can share the work by variant or seed, and one more
run over all of them makes the table. `JAX_COMPILATION_CACHE_DIR` lets them share compiled programs.

In the task `both`, the adapters of gender and safety steer together. The pictures come from noise
seeds that were used neither in training nor to choose hyper-parameters.
"""

import argparse
import pathlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from respodiff_jax.adapters import load_adapter
from respodiff_jax.backbone import load_backbone
from respodiff_jax.emoji import recipes
from respodiff_jax.evaluation import Results, evaluate
from respodiff_jax.training.waves import train

EVALUATION_SEED = 700_000
# variant -> what it changes in the config of a task; `concepts.*` is every concept.
VARIANTS = {
    "RAM + SAM": {},  # the recipe: lambda 0.5, for safety 1
    # SAM starts at zero, and with lambda 0 it stays there.
    "RAM only (lambda 0)": {"concepts.*.lambda_sem": 0.0},
    "lambda 1": {"concepts.*.lambda_sem": 1.0},
    "lambda 4": {"concepts.*.lambda_sem": 4.0},
    "constant": {"module.kind": "constant"},
    "mlp": {"module.kind": "mlp"},
    "conv": {"module.kind": "conv"},
    # Streaming trajectories that take every step of the schedule.
    "whole trajectories": {"rollout.trajectory_steps": 49},
    "faithful rollout": {"rollout.kind": "faithful"},
}
_SAFETY = "safety_as_published"  # the ablation is that of the paper's objective
# task -> the trainings whose adapters steer together
TASKS = {
    "gender": ("gender",),
    "skin_tone": ("skin_tone",),
    "safety": (_SAFETY,),
    "both": ("gender", _SAFETY),
}
_ALIGNED = (("CLIP score", "winoalign", None), ("recognised", "subject_recognised", None))
# task -> columns of its table: (heading, metric, attribute)
_COLUMNS = {
    "gender": (("DevRat", "deviation_ratio", "gender"), *_ALIGNED),
    "skin_tone": (("DevRat", "deviation_ratio", "skin_tone"), *_ALIGNED),
    "safety": (("unsafe", "unsafe_rate", None), ("CLIP score, captions", "clip_score", None)),
    "both": (
        ("DevRat", "deviation_ratio", "gender"),
        *_ALIGNED,
        ("unsafe", "unsafe_rate", None),
    ),
}


def configure(task: str, variant: str, seed: int) -> ConfigDict:
    """Builds the config of one training."""
    changes = VARIANTS[variant]
    config = recipes.task_config(task, changes.get("module.kind"))
    config.seed = seed
    config.log.grid_every = 0
    for key, value in changes.items():
        keys = [key.replace("*", name) for name in config.concepts] if "*" in key else [key]
        config.update_from_flattened_dict(dict.fromkeys(keys, value))
    return config.lock()


def distinct(task: str, variants: Sequence[str]) -> list[str]:
    """Drops the variants that are the same as an earlier one in this task."""
    configs = {}
    for variant in variants:
        changed = [configure(part, variant, 0).to_json() for part in TASKS[task]]
        configs.setdefault(tuple(changed), variant)
    return list(configs.values())


def run_one(task: str, variant: str, seed: int, out: pathlib.Path, num_steps: int) -> Results:
    """Trains and evaluates one variant of a task from one seed, unless that is already done."""

    def folder(part):
        return out / part / variant.replace(" ", "_") / str(seed)

    parts = []
    for part in TASKS[task]:
        config = configure(part, variant, seed)
        train(config, folder(part) / "run")
        parts.append(load_adapter(folder(part) / "run" / "adapter"))
    safe = _SAFETY in TASKS[task]
    groups = [part for part in TASKS[task] if part != _SAFETY]
    return evaluate(
        load_backbone(config.model.name, dtype=config.model.dtype, abstract=True),
        parts,
        out=folder(task) / "evaluation",
        # Captions of all kinds show what safety does to ordinary pictures.
        part=["fairness" if groups else "quality"] + ["safety"] * safe,
        preset="paper",  # for all prompts
        steer_always=True,  # as the paper does
        groups=groups,
        safe=safe,
        images_per_subject=12,
        images_per_caption=2,
        images_per_prompt=8,
        seed=EVALUATION_SEED,
        num_steps=num_steps,
    )


def table(task: str, results: dict[str, list[Results]]) -> str:
    """Formats a Markdown table: mean and standard deviation over seeds, a row per variant."""
    columns = _COLUMNS[task]
    lines = [
        f"| {task} | " + " | ".join(heading for heading, *_ in columns) + " | seeds |",
        "|---" * (len(columns) + 2) + "|",
    ]

    def row(name, runs, images):
        cells = []
        for _, metric, attribute in columns:
            values = [run.value(metric, images, attribute=attribute) for run in runs]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(set(values)) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        return f"| {name} | " + " | ".join(cells) + f" | {len(runs)} |"

    base = next(iter(results.values()))[:1]
    lines += [row("base model", base, "base")]
    lines += [row(variant, runs, "adapted") for variant, runs in results.items()]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps of the pictures")
    args = parser.parse_args()
    tables = []
    for task in args.task:
        results = {
            variant: [run_one(task, variant, seed, args.out, args.steps) for seed in args.seeds]
            for variant in distinct(task, args.variant)
        }
        tables.append(table(task, results))
    text = "\n\n".join(tables) + "\n"
    (args.out / "ablation.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
