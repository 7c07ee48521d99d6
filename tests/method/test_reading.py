"""The heads that read prompts: scores, decisions and their fit."""

import numpy as np

from respodiff_jax.method.reading import (
    SHARPNESS,
    Decision,
    Reading,
    always,
    decide,
    fit_heads,
    scores,
)

RNG = np.random.default_rng(0)
CONTEXT = RNG.normal(size=(3, 5, 4)).astype(np.float32)
HEADS = Reading(
    RNG.normal(size=(2, 3, 4)).astype(np.float32), RNG.normal(size=(2, 3)).astype(np.float32)
)


def test_score_is_the_smooth_maximum_of_the_tokens_responses():
    responses = np.einsum("bld,nhd->blnh", CONTEXT, HEADS.weight)
    expected = np.log(np.exp(SHARPNESS * responses).mean(1)) / SHARPNESS + HEADS.bias
    np.testing.assert_allclose(scores(HEADS, CONTEXT), expected, rtol=1e-5, atol=1e-6)
    assert (responses.max(1) + HEADS.bias >= expected - 1e-6).all()


def test_score_does_not_depend_on_where_a_token_stands_or_how_often_it_is_repeated():
    found = np.asarray(scores(HEADS, CONTEXT))
    np.testing.assert_allclose(scores(HEADS, CONTEXT[:, ::-1]), found, rtol=1e-5, atol=1e-6)
    repeated = np.concatenate([CONTEXT, CONTEXT], axis=1)
    np.testing.assert_allclose(scores(HEADS, repeated), found, rtol=1e-5, atol=1e-6)


def test_decisions():
    somebody_thing_named = [
        ((1, -1, -1), Decision.OPEN),
        ((-1, -1, -1), Decision.OPEN),  # an unknown word
        ((1, 1, -1), Decision.OPEN),
        ((1, -1, 1), Decision.NAMED),
        ((-1, -1, 1), Decision.NAMED),
        ((-1, 1, -1), Decision.NOBODY),
        ((-1, 1, 1), Decision.NOBODY),  # "a queen bee"
    ]
    for found, expected in somebody_thing_named:
        assert decide(np.float32([[found]])).tolist() == [[expected]]
    assert (decide(np.asarray(scores(always(3, 4), CONTEXT))) == Decision.OPEN).all()


def test_each_fitted_head_finds_its_direction_in_any_token():
    context = 0.3 * RNG.normal(size=(200, 5, 8)).astype(np.float32)
    labels = np.stack([np.arange(200) % n == 0 for n in (4, 3, 5)], axis=1)
    for head, place in enumerate((0, 4, 2)):
        context[labels[:, head], place, head] += 3
    heads = fit_heads(context[:100], labels[:100], np.ones((100, 3)))
    unseen = 0.3 * RNG.normal(size=(100, 5, 8)).astype(np.float32)
    for head in range(3):
        unseen[labels[100:, head], 1 + head, head] += 3
    found = np.asarray(scores(heads, unseen))[:, 0] > 0
    assert (found == labels[100:]).mean() > 0.97
    assert np.abs(heads.weight[0]).argmax(1).tolist() == [0, 1, 2]
