"""The audit's table and amounts. Training and evaluation have their own tests."""

import pathlib

import numpy as np
import pytest

from respodiff_jax.adapters import load_adapter
from respodiff_jax.emoji import audit, recipes, vocabulary
from respodiff_jax.emoji.making import world
from respodiff_jax.emoji.making.reference import FOLDERS, draw_reference
from respodiff_jax.emoji.making.suite import captioned_things
from respodiff_jax.evaluation import Results
from respodiff_jax.evaluation.results import Measurement
from respodiff_jax.evaluation.spec import ATTACKS
from respodiff_jax.evaluation.suites import load_suite

STORED = pathlib.Path(__file__).parent.parent / "data" / "emoji_gender" / "adapter"


def _run(**values):
    """Results of metrics (base, adapted); None was not measured."""
    measured = [
        Measurement(metric, picture_set, value, 12, "intent", attribute=attribute)
        for (metric, attribute), pair in values["measured"].items()
        for picture_set, value in zip(("base", "adapted"), pair, strict=True)
        if value is not None
    ]
    return Results(tuple(measured), {}, {}, {})


def test_table_compares_with_the_base_and_gives_the_spread_over_seeds():
    runs = [
        _run(
            measured={
                ("deviation_ratio", "gender"): (0.7, change),
                ("clip_score", None): (13.0, 13.0 * kept),
                ("steered", "nobody"): (None, 0.0),
            }
        )
        for change, kept in ((0.01, 1.0), (0.03, 0.98))
    ]
    assert audit.table("gender, scale 0.8", runs).splitlines() == [
        "| gender, scale 0.8 | base model | RAM + SAM | of the base's | pictures |",
        "|---|---|---|---|---|",
        "| deviation ratio, gender | 0.700 | 0.020 ± 0.014 |  | 12 |",
        "| CLIP score of captions | 13.000 | 12.870 ± 0.184 | 0.990 ± 0.014 | 12 |",
        "| prompts without people steered |  | 0.000 |  | 12 |",
    ]


def test_audit_has_only_what_no_reading_was_fitted_to():
    read = recipes.task_config("gender").reading
    assert captioned_things() == recipes.HELD_OUT_THINGS
    assert not set(captioned_things()) & set(read.things)
    suite = audit.held_out_suite()
    assert suite.subjects == recipes.HELD_OUT and len(suite.subjects) == 10
    assert not any(
        subject in phrase.split() for subject in suite.subjects for phrase in read.people
    )


def test_uses_are_recipes_and_only_the_hardened_one_has_an_adversary():
    tasks = {task for use in audit.USES.values() for task in use}
    attacked = {task for task in tasks if recipes.task_config(task).adversary.every}
    assert attacked == {"safety_hardened"} < tasks


def test_table_has_a_row_for_each_attack():
    measured = {("attack_success", name): (1.0, 0.1 * i) for i, name in enumerate(ATTACKS)}
    lines = audit.table("hardened", [_run(measured=measured)]).splitlines()[2:]
    assert lines == [
        f"| unsafe, {name} | 1.000 | {0.1 * i:.3f} |  | 12 |" for i, name in enumerate(ATTACKS)
    ]


def test_scale_multiplies_every_concepts_own_and_the_largest_timestep_replaces_it():
    adapter = load_adapter(STORED)
    scaled = audit._changed(adapter, 0.5, None)
    assert scaled.default_scales == pytest.approx([s / 2 for s in adapter.default_scales])
    assert scaled.max_timesteps is None
    early = audit._changed(audit._changed(adapter, 1.0, 900), 1.0, None)
    assert early.max_timesteps.tolist() == [900.0, 900.0]
    labels = {audit._label(*own) for own in ((1.0, None), (0.5, None), (1.0, 900), (1.0, 901))}
    assert len(labels) == 4  # names of folders


def test_reference_has_pictures_of_every_caption(tmp_path):
    draw_reference(tmp_path, 1)
    people = len(vocabulary.PROFESSIONS) + len(vocabulary.ACTIVITIES) + len(vocabulary.LOOKS)
    drawn = {
        name: [path.read_bytes() for path in sorted((tmp_path / name).glob("*.png"))]
        for name in FOLDERS
    }
    for pictures in drawn.values():
        assert len(set(pictures)) == len(pictures) == people + len(captioned_things())
    rows = (tmp_path / "all" / "metadata.csv").read_text().splitlines()[1:]
    captions = load_suite(None, audit.MODEL).captions
    assert rows == [f"{i:03d}_0.png,{caption}" for i, caption in enumerate(captions)]
    for name in ("gender", "skin_tone"):  # the same scenes, but for one attribute of people
        same = [a == b for a, b in zip(drawn["all"], drawn[name], strict=True)]
        assert all(same[people:])
        assert 0 < sum(same[:people]) < people


def test_even_world_has_no_bias_in_one_attribute():
    for subject, bias in world.even("tones").items():
        groups = np.bincount(vocabulary.TONE_GROUP_OF, bias.tones)
        np.testing.assert_allclose(groups, 1 / 3)
        assert (bias.woman, bias.unsafe) == (world.BIAS[subject].woman, world.BIAS[subject].unsafe)
    assert {bias.woman for bias in world.even("woman").values()} == {0.5}
    assert world.even("woman", "tones", "unsafe") == world.EVEN
