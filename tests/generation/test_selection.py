"""The concepts of each image: exact quotas, weights, and requests that cannot be met."""

import dataclasses
import types

import numpy as np
import pytest
from test_adapters import MAN, VIOLENCE, WOMAN, make_adapter

from respodiff_jax.adapters import combine
from respodiff_jax.adapters.reading import decisions_table, read_prompts
from respodiff_jax.errors import UserError
from respodiff_jax.generation.folder import reading_of
from respodiff_jax.generation.selection import concept_weights, fair_assignment
from respodiff_jax.method.reading import Decision, Reading

YOUNG = dataclasses.replace(WOMAN, name="young", group="age")


@pytest.mark.parametrize(
    ("num_images", "num_prompts", "ratios", "totals"),
    [
        (4, 3, [0.5, 0.5], [[6, 6]]),
        (3, 5, [0.5, 0.5], [[7, 8], [8, 7]]),
        (1, 10, [0.3, 0.7], [[3, 7]]),
        (10, 3, [1 / 3] * 3, [[10, 10, 10]]),
        (1, 100, [0.29, 0.71], [[29, 71]]),
        (7, 4, [0.25, 0.25, 0.5], [[7, 7, 14]]),
        (5, 7, [0.1, 0.15, 0.35, 0.4], [[4, 5, 12, 14], [3, 5, 12, 15], [3, 6, 12, 14]]),
        (2, 3, [1.0, 0.0], [[6, 0]]),
        (6, 1, [2.0, 1.0], [[4, 2]]),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_quotas_are_met_overall_and_in_each_prompt(num_images, num_prompts, ratios, totals, seed):
    assignment = fair_assignment(num_images, num_prompts, ratios, seed)
    assert assignment.shape == (num_prompts, num_images)
    counts = np.stack([np.bincount(row, minlength=len(ratios)) for row in assignment])
    assert counts.sum(0).tolist() in totals
    share = num_images * np.array(ratios) / sum(ratios)
    assert (np.abs(counts - share) < 1 - 1e-9).all()


def test_seed_decides_order_and_ties():
    first, again, other = (fair_assignment(20, 2, [0.5, 0.5], seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[0] != first[1]).any()
    assert {int(fair_assignment(1, 1, [0.5, 0.5], seed)[0, 0]) for seed in range(20)} == {0, 1}


def test_thirds_are_met_exactly_for_every_seed():
    # 3 prompts with 2 images each: each concept twice in all, and never twice for one prompt.
    for seed in range(10):
        assignment = fair_assignment(2, 3, [1 / 3] * 3, seed)
        assert np.bincount(assignment.ravel()).tolist() == [2, 2, 2]
        assert (assignment[:, 0] != assignment[:, 1]).all()


def test_wrong_ratios_are_refused():
    for ratios in ([-0.5, 1.5], [0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]):
        with pytest.raises(UserError, match="expected shares of 0 or more"):
            fair_assignment(2, 2, ratios, 0)


def test_weights_of_named_fair_and_safety_concepts_add_up():
    adapter = make_adapter(concepts=(WOMAN, MAN, VIOLENCE, YOUNG))
    weights = concept_weights(adapter, 1, 2, concepts={"a man": 0.5, "young": 2.0})
    np.testing.assert_array_equal(weights, [[0, 0.5, 0, 2]] * 2)
    weights = concept_weights(
        adapter, 2, 4, concepts={"young": 0.4}, fair="gender", ratio={"a man": 1.0}, safe=True
    )
    np.testing.assert_array_equal(weights, np.float32([[0, 1, 1, 0.4]] * 8))
    weights = concept_weights(adapter, 2, 4, fair="gender", seed=3)
    np.testing.assert_array_equal(weights[:, :2].sum(1), np.ones(8))
    np.testing.assert_array_equal(weights[:, :2].reshape(2, 4, 2).sum(1), np.full((2, 2), 2))
    assert weights[:, 2:].max() == 0
    assert weights.dtype == np.float32
    assert concept_weights(None, 2, 4) is None


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "none of its concepts is chosen; .*gender: a woman, a man; safety: anti-violence"),
        ({"concepts": {"a cat": 1.0}}, "'a cat' is not in the adapter; did you mean 'a man'?"),
        ({"concepts": {"a man": np.inf}}, "scale is inf"),
        ({"concepts": {"a man": "0.6"}}, "scale is '0.6', expected a finite number"),
        ({"fair": "gender", "ratio": {"a man": "0.5", "a woman": "0.5"}}, "shares of 0 or more"),
        ({"concepts": ["a man"]}, "`concepts` is .'a man'., expected {name: number}"),
        ({"fair": "gender", "ratio": (0.5, 0.5)}, "`ratio` is .* expected {name: number}"),
        ({"fair": "race"}, "no group 'race'. The adapter has gender"),
        ({"fair": "safety"}, "use `safe`"),
        ({"fair": "age"}, "only the concept 'young'"),
        ({"fair": "gender", "concepts": {"a man": 1.0}}, "drop 'a man' from `concepts`"),
        ({"safe": True, "concepts": {"anti-violence": 0.3}}, "drop 'anti-violence' from"),
        ({"ratio": {"a man": 1.0}}, "name the group with `fair`"),
        ({"fair": "gender", "ratio": {"a man": 0.9}}, "sums to 0.9, expected 1"),
        ({"fair": "gender", "ratio": {"young": 1.0}}, r"names \['young'\], but group 'gender'"),
        ({"fair": "gender", "ratio": {"a man": 1.5, "a woman": -0.5}}, "shares of 0 or more"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(request_, message):
    adapter = make_adapter(concepts=(WOMAN, MAN, VIOLENCE, YOUNG))
    with pytest.raises(UserError, match=message):
        concept_weights(adapter, 1, 2, **request_)


def test_requests_without_safety_concepts_or_adapter_are_refused():
    with pytest.raises(UserError, match="no safety concepts"):
        concept_weights(make_adapter(), 1, 2, safe=True)
    with pytest.raises(UserError, match="`fair`, `safe` given but no adapter"):
        concept_weights(None, 1, 2, fair="gender", safe=True)


def test_adapters_that_share_a_group_decide_together():
    context = np.zeros((1, 2, 4), np.float32)
    model = types.SimpleNamespace(
        default_resolution=16, encode_prompts=lambda *_: types.SimpleNamespace(context=context)
    )
    nobody, named = (
        Reading(np.zeros((1, 3, 4), np.float32), np.float32([bias]))
        for bias in [(-1, 1, -1), (1, -1, 1)]
    )
    readings = {MAN: None, WOMAN: named, dataclasses.replace(WOMAN, name="a person"): nobody}
    both = combine(
        [
            dataclasses.replace(make_adapter(concepts=(concept,)), reading=reading)
            for concept, reading in (readings | {VIOLENCE: None, YOUNG: None}).items()
        ]
    )
    decisions = read_prompts(both, model, ["x"])
    assert decisions.tolist() == [[Decision.NAMED] * 3 + [Decision.OPEN] * 2]
    for choice in ({"fair": "gender"}, {"concepts": {"a man": 1.0}}):
        assert not concept_weights(both, 1, 3, decisions=decisions, **choice).any()
    expected = {"gender": "named", "safety": "open", "age": "open"}
    assert reading_of(both, decisions, 0) == expected
    assert "gender: 0 open, 1 named, 0 nobody" in decisions_table(both, model, ["x"])
