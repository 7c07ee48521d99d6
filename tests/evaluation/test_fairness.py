"""Fairness: assignment of concepts, targets and intersections, computed by hand."""

import dataclasses

import numpy as np
import pytest
from evaluations import concept, constant_adapter
from test_adapters import with_scales

from respodiff_jax.errors import UserError
from respodiff_jax.evaluation import drawing, fairness
from respodiff_jax.evaluation import pictures as pictures_lib
from respodiff_jax.evaluation.classifier import Prediction, intersect
from respodiff_jax.evaluation.suites import Prompt, load_suite


def test_intersection_counts_combinations():
    gender = Prediction(("woman", "man"), np.array([0, 1, 1, 0]), np.ones(4))
    tone = Prediction(("light", "medium", "dark"), np.array([2, 0, 2, 2]), np.full(4, 0.5))
    joint = intersect({"gender": gender, "tone": tone})
    assert joint.counts() == {
        "woman x light": 0,
        "woman x medium": 0,
        "woman x dark": 2,
        "man x light": 1,
        "man x medium": 0,
        "man x dark": 1,
    }
    np.testing.assert_allclose(joint.probabilities, 0.5)


@pytest.mark.parametrize(("seen", "value"), [(0, 0.0), (1, 1.0)])
def test_mean_deviation_has_an_interval_where_all_subjects_agree(seen, value):
    """Ten pictures of twenty professions, five of each gender (or all of one)."""
    labels = np.tile([0, 1], 100) if seen == 0 else np.zeros(200, int)
    prediction = Prediction(("woman", "man"), labels, np.ones(200))
    subjects = np.repeat([f"profession {i}" for i in range(20)], 10)
    (overall, _), *own = fairness._deviation_ratios(
        "adapted", "gender", prediction, subjects, (0.5, 0.5)
    )
    assert overall.value == value and len(own) == 20
    low, high = own[0][0].interval
    expected = (0, high / 20**0.5) if seen == 0 else (1 - (1 - low) / 20**0.5, 1)
    assert overall.interval == pytest.approx(expected) and 0 < expected[1] - expected[0] < 0.13


def test_subjects_take_their_templates_in_turn(suite):
    requests = drawing.requests_per_subject(suite.prompts_for("fairness"), 3, seed=7)
    assert [(r.prompt, r.seed, r.subject) for r in requests] == [
        ("a photo of a cook", 7, "cook"),
        ("image of cook", 8, "cook"),
        ("a photo of a cook", 9, "cook"),
        ("a photo of an artist", 10, "artist"),
        ("image of artist", 11, "artist"),
        ("a photo of an artist", 12, "artist"),
    ]


def test_fair_weights_meet_the_target_and_intersect(tiny_backbone):
    adapter = with_scales(constant_adapter(tiny_backbone, 1.0), 1.0, 0.5, 1.0, 1.0, 1.0)
    prompts = [Prompt("a cook", "cook"), Prompt("a judge", "judge")]
    requests = drawing.requests_per_subject(prompts, 4, seed=0)
    alone = fairness.fair_weights(
        adapter, ["gender"], {"gender": {"man": 0.25, "woman": 0.75}}, requests, 4, seed=0
    )
    # One man of four, at the concept's own scale.
    np.testing.assert_array_equal(alone.reshape(2, 4, 5).sum(1)[:, :2], [[3, 0.5], [3, 0.5]])
    with pytest.raises(UserError, match="concept 'a woman' fits the values"):
        target = {"gender": {"f": 0.5, "m": 0.5}}
        fairness.fair_weights(adapter, ["gender"], target, requests, 4, seed=0)
    with pytest.raises(UserError, match=r"'old' is to have 0.5 .* fits the concepts \[\]"):
        target = {"gender": {"woman": 0.25, "man": 0.25, "old": 0.5}}
        fairness.fair_weights(adapter, ["gender"], target, requests, 4, seed=0)
    adapter = constant_adapter(tiny_backbone, 1.0)
    both = fairness.fair_weights(adapter, ["gender", "age"], {}, requests, 8, seed=0)
    pairs = [tuple(np.flatnonzero(row)) for row in both]
    assert sorted(pairs) == sorted([(0, 2), (0, 3), (1, 2), (1, 3)] * 2)
    np.testing.assert_allclose(both.max(0), [0.6, 0.6, 0.4, 0.4, 0])
    with pytest.raises(UserError, match=r"0 concept\(s\) of the group 'race'.*age.*gender"):
        fairness.fair_weights(adapter, ["race"], {}, requests, 4, seed=0)


@pytest.mark.parametrize(
    ("concepts", "images", "each"),
    [(2, 150, {15}), (3, 150, {10}), (2, 15, {1, 2}), (3, 10, {0, 1})],
)
def test_concepts_are_spread_over_every_template(tiny_backbone, concepts, images, each):
    adapter = dataclasses.replace(
        constant_adapter(tiny_backbone, 1.0),
        concepts=tuple(concept(f"c{i}", "g" if i < concepts else "h") for i in range(5)),
    )
    requests = drawing.requests_per_subject(
        load_suite("winobias").prompts_for("fairness")[:20], images, seed=0
    )
    weights = fairness.fair_weights(adapter, ["g"], {}, requests, images, seed=0)
    counts = {}
    for request, row in zip(requests, weights, strict=True):
        counts[request.prompt] = counts.get(request.prompt, 0) + row[:concepts]
    assert len(counts) == 20 and {int(n) for row in counts.values() for n in row} == each
    # Concepts are mixed: a report shows the first pictures.
    first = weights.reshape(4, images, -1)[:, :30, :concepts].sum(1)
    assert (first > 0).all()


def test_targets_and_intersections_by_hand(suite, monkeypatch):
    suite = dataclasses.replace(
        suite,
        attributes={"gender": dict.fromkeys("wm", ("x",)), "tone": dict.fromkeys("ldn", ("x",))},
        subject_classes=None,
    )
    seen = {"gender": [0, 0, 0, 1, 1, 1], "tone": [0, 0, 1, 0, 0, 2]}

    def see(clip, features, classes):
        name = "gender" if len(classes) == 2 else "tone"
        return Prediction(tuple(classes), np.array(seen[name]), np.ones(6))

    monkeypatch.setattr(fairness, "classify", see)
    pictures = [pictures_lib.Picture(None, "given", i, None, "cook") for i in range(6)]
    target = {"tone": {"n": 0.2, "d": 0.3, "l": 0.5}}
    measured, _ = fairness.measure(pictures, None, suite, None, target, [("gender", "tone")])
    found = {m.attribute: m for m, _ in measured if m.subject == "cook"}
    assert found["gender"].value == 0 and found["gender"].interval[1] > 0.5
    # Shares are l 4/6, d 1/6, n 1/6 for targets 0.5, 0.3, 0.2; the largest deviation is 1 - 0.2.
    assert found["tone"].value == pytest.approx((4 / 6 - 0.5) / 0.8)
    joint = found["gender x tone"]
    assert list(joint.counts.values()) == [2, 1, 0, 2, 0, 1]
    assert joint.target == pytest.approx((0.25, 0.15, 0.1, 0.25, 0.15, 0.1))
    # m x d has a share of 0 for a target of 0.15.
    assert joint.value == pytest.approx(0.15 / 0.9)
    (overall,) = [m for m, _ in measured if m.attribute == "tone" and m.subject is None]
    # One profession: the mean is its own.
    assert overall.value == found["tone"].value
    assert overall.interval == pytest.approx(found["tone"].interval)
