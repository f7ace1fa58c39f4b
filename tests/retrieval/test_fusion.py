"""Fusion of rankings: the worked examples of the papers, normalization by hand, and documents that a ranking lacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.retrieval import (
    min_max_normalize,
    rankings_as_rows,
    reciprocal_rank_fusion,
    score_fusion,
    z_normalize,
)

A, B, C, D = range(4)


def test_reciprocal_ranks_worked_example():
    """Runs [a, b, c], [b, d] and [b, a], counted from 0 and from 1 (GenQRFusion); e is in no run."""
    ids, ranks, _, present = rankings_as_rows([[A, B, C], [B, D], [B, A]], size=5)
    assert ids.tolist() == [A, B, C, D, -1]
    fuse = jax.jit(reciprocal_rank_fusion, static_argnames=("k", "first_rank"))
    for first, expected in {
        0: [0.03306011, 0.04972678, 0.01612903, 0.01639344, 0],
        1: [0.03252247, 0.04891592, 0.01587302, 0.01612903, 0],
    }.items():
        # printed with eight digits
        np.testing.assert_allclose(fuse(ranks, present, first_rank=first), expected, atol=1e-8)
    weighted = reciprocal_rank_fusion(ranks, present, k=9, weights=[2, 0, 1])
    np.testing.assert_allclose(weighted, [2 / 10 + 1 / 11, 2 / 11 + 1 / 10, 2 / 12, 0, 0], rtol=1e-6)


def test_scores_by_hand():
    """Two retrievers with scales of their own; document 3 is missing in the first, 0 in the second, 4 in both."""
    scores = jnp.array([[10.0, 20.0, 30.0, jnp.nan, 0.0], [jnp.nan, 0.2, 0.4, 0.9, 0.0]])
    present = jnp.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0]], bool)
    fuse = jax.jit(score_fusion, static_argnames=("how", "normalize", "weights"))
    np.testing.assert_allclose(fuse(scores, present), [10, 20.2, 30.4, 0.9, 0], rtol=1e-6)
    np.testing.assert_allclose(fuse(scores, present, how="max"), [10, 20, 30, 0.9, 0], rtol=1e-6)
    first, second = np.array([0, 0.5, 1, 0, 0]), np.array([0, 0, 2 / 7, 1, 0])
    mixed = fuse(scores, present, normalize="min_max", weights=(0.3, 0.7))
    np.testing.assert_allclose(mixed, 0.3 * first + 0.7 * second, atol=1e-6)
    low = fuse(scores, present, how="min", normalize="min_max")
    np.testing.assert_allclose(low, np.minimum(first, second), atol=1e-6)
    one, two = np.array([10, 20, 30.0]), np.array([0.2, 0.4, 0.9])
    one, two = (one - one.mean()) / one.std(), (two - two.mean()) / two.std()
    first, second = np.r_[one, one[0], one[0]], np.r_[two[0], two, two[0]]  # what is missing counts as the worst
    np.testing.assert_allclose(fuse(scores, present, normalize="z"), first + second, atol=1e-6)


@pytest.mark.parametrize("normalize", [min_max_normalize, z_normalize])
def test_equal_scores_and_empty_rows_are_zero(normalize):
    x = jnp.array([[0.1] * 7, [1, 2, 3, 4, 5, 6, 7], [5] * 7, [jnp.nan] * 7])
    valid = jnp.array([[1] * 7, [0] * 7, [1, 0, 0, 0, 0, 0, 0], [0] * 7], bool)
    np.testing.assert_array_equal(normalize(x, valid), np.zeros((4, 7)))
    assert normalize(jnp.array([1, 2, 3], jnp.bfloat16), jnp.ones(3, bool)).dtype == jnp.float32
    nothing = score_fusion(x[1:2], valid[1:2], normalize="z")
    np.testing.assert_array_equal(nothing, np.zeros(7))


def test_rankings_as_rows():
    ids, ranks, scores, present = rankings_as_rows([[7, 3, -1], np.array([3])], [[0.9, 0.5, 0], [4]], size=3)
    assert ids.tolist() == [7, 3, -1] and ranks.tolist() == [[1, 2, 0], [0, 1, 0]]
    np.testing.assert_array_equal(scores, np.array([[0.9, 0.5, 0], [0, 4, 0]], np.float32))
    assert present.tolist() == [[True, True, False], [False, True, False]]


def test_bad_input():
    ranks, present = jnp.ones((2, 3), int), jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match=r"ranks and present must both be \[R, N\], got \(2, 3\) and \(3,\)"):
        reciprocal_rank_fusion(ranks, present[0])
    with pytest.raises(ValueError, match="weights must be one for each of the 2 rankings, got 1"):
        score_fusion(ranks, present, weights=[1])
    with pytest.raises(ValueError, match=r"k \+ first_rank must be positive, got 0 \+ 0"):
        reciprocal_rank_fusion(ranks, present, k=0, first_rank=0)
    with pytest.raises(ValueError, match="how must be one of .*'sum'.* got 'mean'"):
        score_fusion(ranks, present, how="mean")
    with pytest.raises(ValueError, match="normalize must be one of .*'z'.* got 'softmax'"):
        score_fusion(ranks, present, normalize="softmax")
    with pytest.raises(ValueError, match="ranking 0 names document 4 twice"):
        rankings_as_rows([[4, 4]], size=3)
    with pytest.raises(ValueError, match="more than size=1 different documents"):
        rankings_as_rows([[4, 5]], size=1)
    with pytest.raises(ValueError, match="ranking 0 has 2 documents and 1 scores"):
        rankings_as_rows([[4, 5]], [[1]], size=2)
