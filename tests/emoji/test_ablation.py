"""Configs and table of the ablation. Training and evaluation have their own tests."""

import pytest

from respodiff_jax.emoji import ablation, recipes
from respodiff_jax.evaluation.results import Measurement, Results
from respodiff_jax.training.config import concepts_from, validate


@pytest.mark.parametrize("task", [name for (name, *_) in ablation.TASKS.values()])
@pytest.mark.parametrize("variant", ablation.VARIANTS)
def test_variant_changes_only_the_option_in_its_name(task, variant):
    config = ablation.configure(task, variant, seed=3)
    validate(config)
    recipe = recipes.task_config(task)
    assert config.seed == 3
    kind = variant if variant in ("constant", "mlp", "conv") else recipe.module.kind
    assert config.module.kind == kind
    usual = next(iter(concepts_from(recipe))).lambda_sem
    lambda_sem = {"RAM only (lambda 0)": 0.0, "lambda 1": 1.0, "lambda 4": 4.0}.get(variant, usual)
    for concept in concepts_from(config):
        assert concept.lambda_sem == lambda_sem
        assert (concept.lr_ram, concept.lr_sam) == recipes.LEARNING_RATES[task][kind]
    assert config.rollout.kind == ("faithful" if "faithful" in variant else "streaming")
    steps = 49 if variant == "whole trajectories" else recipe.rollout.trajectory_steps
    assert config.rollout.trajectory_steps == steps < config.rollout.num_steps


def test_equal_variants_are_trained_once():
    assert ablation.distinct("gender", ["RAM + SAM", "mlp", "conv"]) == ["RAM + SAM", "conv"]
    assert ablation.distinct("safety", ["constant", "lambda 1", "mlp"]) == ["constant", "mlp"]
    # The paper's objective for safety has a constant, gender a map.
    assert ablation.distinct("both", ["RAM + SAM", "mlp"]) == ["RAM + SAM", "mlp"]


def test_table_shows_means_and_deviations_over_seeds():
    def run(*values):
        measured = zip(("deviation_ratio", "winoalign", "subject_recognised"), values, strict=True)
        return Results(
            tuple(
                Measurement(
                    metric,
                    picture_set=images,
                    attribute="gender" if metric == "deviation_ratio" else None,
                    value=value if images == "adapted" else 0.5,
                    interval=None,
                    n=1,
                    part="fairness",
                )
                for metric, value in measured
                for images in ("base", "adapted")
            ),
            *({},) * 3,
        )

    text = ablation.table("gender", {"mlp": [run(0.1, 22.0, 1.0), run(0.3, 21.0, 1.0)]})
    assert text.splitlines() == [
        "| gender | DevRat | CLIP score | recognised | seeds |",
        "|---|---|---|---|---|",
        "| base model | 0.500 | 0.500 | 0.500 | 1 |",
        "| mlp | 0.200 ± 0.141 | 21.500 ± 0.707 | 1.000 | 2 |",
    ]
