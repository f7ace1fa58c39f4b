"""Masks, draws and pairs: the papers' worked examples in literal numbers, ties, and rows with nothing to choose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import ops as eager
from tests.ops.oracles import JITTED as ops
from tests.ops.oracles import array, check

REWARDS = array(0.1, 2, -1, 0.5, 0.7)
ONE_GROUP = jnp.zeros(5, jnp.int32)


@pytest.mark.parametrize(
    "strategy, expected",
    [
        ("best_worst", [0, 0.5, 0.5, 0, 0]),
        ("best_random", [0.125, 0.5, 0.125, 0.125, 0.125]),
        ("best", [0, 1, 0, 0, 0]),
        ("power", np.array([0.01, 4, 1, 0.25, 0.49]) / 5.75),
        ("all", [0.2] * 5),
    ],
)
def test_policy_filtration(strategy, expected):
    """PF-PPO's five samples in one group; then a group of equals, a lone sample and one that does not count."""
    check(ops.reward_filter_weights(REWARDS, ONE_GROUP, strategy=strategy), expected)
    rewards = array(0, 0, 0, 5, jnp.nan)
    ids, valid = jnp.array([3, 3, 3, 1, 1]), jnp.array([True, True, True, True, False])
    equals = {
        "best_worst": [0.5, 0, 0.5],  # the first is worst, the last is best
        "best_random": [1 / 6, 1 / 6, 4 / 6],
        "best": [0, 0, 1],
    }
    weights = ops.reward_filter_weights(rewards, ids, valid, strategy=strategy)
    check(weights, [*equals.get(strategy, [1 / 3] * 3), 1, 0])


def test_pass_rates():
    rates = array(0, 0.001, 0.2, 0.9, 1, jnp.nan)
    check(ops.pass_rate_mask(rates), [0, 1, 1, 1, 0, 0])  # neither never nor always solved
    check(ops.pass_rate_mask(rates, low=-1), [1, 1, 1, 1, 0, 0])  # LoongRL: not yet solved every time
    check(ops.pass_rate_mask(rates, high=0.001, closed=True), [1, 1, 0, 0, 0, 0])  # Guide: needs a hint
    check(ops.pass_rate_mask(rates, low=0.2, high=0.8, closed=True), [0, 0, 1, 0, 0, 0])  # PRIME


def test_best_and_hardest():
    """DRIVE's hardest problems, and what is left when fewer are there than asked for."""
    rates = array(0.9, 0.1, 0.0, 0.5)
    ids, weight = ops.top_k_select(-rates, k=2)
    assert ids.tolist() == [2, 1] and weight.tolist() == [1, 1]
    ids, weight = ops.top_k_select(-rates, jnp.array([True, False, True, False]), k=3)
    assert ids.tolist()[:2] == [2, 0] and weight.tolist() == [1, 1, 0] and len({*ids.tolist()}) == 3
    ids, _ = ops.top_k_select(array(1, 3, 3, -jnp.inf), jnp.array([False, True, True, True]), k=3)
    assert ids.tolist() == [1, 2, 3]  # of equals the first; minus infinity is a score like any other


def test_top_fraction():
    """GRPO-lambda selects ceil(0.4 * 5) groups by their share of right answers, none of share 0."""
    accuracy = array(0.75, 0.25, 1, 0, 0.5)
    selected = lambda lam: ops.top_fraction_mask(accuracy, fraction=lam) & (accuracy > 0)  # noqa: E731
    assert selected(0.4).tolist() == [True, False, True, False, False]
    assert selected(0.2).tolist() == [False, False, True, False, False]  # not two for 0.2 * 5 = 1 + rounding
    assert selected(1.0).tolist() == [True, True, True, False, True]
    assert not selected(0.0).any()
    valid = jnp.array([[True, False, False, True, True], [False] * 5])
    kept = ops.top_fraction_mask(jnp.stack([accuracy] * 2), valid, fraction=0.1, min_keep=2)
    assert kept.tolist() == [[True, False, False, False, True], [False] * 5]


def test_draw_probabilities():
    hard = array(16, 3.2, 0.941176)  # QwenLong-L1: 1 / (mean reward + 1 / 2G)
    check(ops.score_probs(hard, transform="proportional"), [0.794392, 0.158878, 0.046729])
    scores, eligible = array(0.1, 0.5, 0.9, 0), jnp.array([True, False, True, False])
    check(ops.score_probs(scores, eligible), [0.310026, 0, 0.689974, 0])  # GROOVE
    check(ops.score_probs(scores, eligible, transform="rank"), [1 / 3, 0, 2 / 3, 0])
    check(ops.score_probs(scores, transform="rank", temperature=0.5), np.array([1 / 9, 1 / 4, 1, 1 / 16]) / (205 / 144))
    solved = ops.score_probs(1 - array(1, 1, 1), jnp.array([True, True, False]), transform="proportional")
    check(solved, [0.5, 0.5, 0])
    assert not ops.score_probs(scores, eligible & False, transform="proportional").any()


def test_resampling():
    """Shares of a hundred thousand draws, within five standard errors; a comb gives them within one draw."""
    weights = jnp.broadcast_to(array(1, 0, 3, 4), (2, 4)).at[1].set(array(0, 0, 0, 2))
    number = 50_000
    drawn = np.asarray(ops.resample_indices(jax.random.key(0), weights, num=number))
    shares = np.bincount(drawn[0], minlength=4) / number
    assert shares[1] == 0 and np.all(drawn[1] == 3)
    assert np.all(np.abs(shares - [0.125, 0, 0.375, 0.5]) < 5 * np.sqrt(0.25 / number))
    for seed in range(5):
        comb = np.asarray(ops.resample_indices(jax.random.key(seed), weights, num=10, method="systematic"))
        counts = np.bincount(comb[0], minlength=4)
        assert counts[1] == 0 and np.all(np.abs(counts - [1.25, 0, 3.75, 5]) < 1) and np.all(np.diff(comb[0]) >= 0)
    nobody = jax.jit(lambda w: eager.resample_indices(jax.random.key(0), w, 3))(jnp.zeros((1, 4)))
    assert nobody.tolist() == [[-1, -1, -1]]


def test_shortest_right_answer():
    lengths = jnp.array([30, 20, 20, 10, 50, 60])
    right = jnp.array([True, True, True, False, False, False])
    rows = ops.shortest_correct(lengths, right, jnp.array([7, 7, 7, 7, 2, 2]))
    assert rows.tolist() == [1, 1, 1, 1, -1, -1]


def test_pairs():
    """CREAM's best and worst; pairs that ties, gaps and a baseline rule out."""
    scores = array([0.9, 0.1, 0.5, 0.3, 0.7], [0.5] * 5, [0.9, 0.9, 0.1, 0.1, 0.4])
    chosen, worst, keep = ops.best_worst_pairs(scores)
    assert chosen.tolist() == [0, 0, 0] and worst.tolist() == [1, 0, 2] and keep.tolist() == [True, False, True]
    _, second, keep = ops.best_worst_pairs(scores, rejected="second", min_gap=0.1)
    assert second.tolist() == [4, 1, 1] and keep.tolist() == [True, False, False]
    valid = jnp.array([[False, True, False, True, False], [True] * 5, [True] + [False] * 4])
    chosen, worst, keep = ops.best_worst_pairs(scores, valid)
    assert (int(chosen[0]), int(worst[0])) == (3, 1) and keep.tolist() == [True, False, False]
    above = ops.best_worst_pairs(scores, baseline=array(0.95, 0, 0.8))[2]
    assert above.tolist() == [False, False, True]
    draw = jax.jit(jax.vmap(lambda key: eager.best_worst_pairs(scores, valid, key=key, rejected="random")[1]))
    others = np.asarray(draw(jax.random.split(jax.random.key(1), 200)))
    assert {*others[:, 0]} == {1} and {*others[:, 1]} == {1, 2, 3, 4}
