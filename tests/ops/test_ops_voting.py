"""Votes, chances over several tries, ratings: literal numbers, and closed forms in exact arithmetic."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import ops as eager
from tests.ops import oracles
from tests.ops.oracles import JITTED as ops
from tests.ops.oracles import array, check


def test_votes():
    answers = jnp.array([[5, 2, 5, 2, 9], [5, 2, 5, 2, 9], [5, 2, 2, 9, 9]])
    scores = array([1, 1, 1, 1, 1], [0.2, 0.6, 0.3, 0.1, 0.65], [jnp.nan, 0.1, 0.1, 0.3, 0])
    valid = jnp.ones((3, 5), bool).at[2, 0].set(False)
    assert ops.weighted_vote(scores, answers, valid).tolist() == [5, 2, 9]
    assert ops.weighted_vote(scores, answers, valid & False).tolist() == [-1] * 3


def test_pass_at_k():
    n, c = np.array([10, 10, 10, 200, 8, 8]), np.array([3, 0, 10, 1, 6, 7])
    for k in (1, 2, 8):
        exact = [1 - math.comb(a - b, k) / math.comb(a, k) for a, b in zip(n, c, strict=True)]
        check(ops.pass_at_k(jnp.asarray(n), jnp.asarray(c), k=k), exact)
    check(ops.pass_at_k(jnp.array([2, 2]), jnp.array([0, 1]), k=5), [0, 1])  # under jit, where n cannot be looked at


def test_chances():
    check(ops.signal_probability(array(0.02, 0, 1, 0.5), group=8), [0.149237, 0, 0, 1 - 2**-7])
    check(ops.signal_probability(array(0.02), group=64), 0.725546)
    small = ops.best_of_k_value(array(1e-7, 1), k=4)
    check(small, [4e-7, 1], rtol=1e-5, atol=0)


def test_gradients_of_chances():
    rates = np.array([0.03, 0.4, 0.9])
    oracles.compare(lambda q: eager.best_of_k_value(q, 4), lambda q: 1 - (1 - q) ** 4, rates)
    oracles.compare(lambda p: eager.signal_probability(p, 8), lambda p: 1 - p**8 - (1 - p) ** 8, rates)
    assert jax.grad(lambda q: eager.best_of_k_value(q, 3))(jnp.float32(1)) == 1  # finite where the logarithm is not


def test_ratings():
    """RAGnarok's two battles; then four players of known strength, whose order comes out of their shares of wins."""
    check(jnp.array(eager.elo_update(1200, 1000, 1)), [1201.20127, 998.79873], atol=1e-3)  # float32 near 1000: 6e-5
    check(jnp.array(eager.elo_update(1100, 900, 0.5)), [1098.70127, 901.29873], atol=1e-3)
    strength = np.array([150.0, -50, 300, -400])
    wins = 1 / (1 + 10 ** ((strength[None] - strength[:, None]) / 400))
    np.fill_diagonal(wins, 0)
    play = jax.jit(lambda wins, key: eager.elo_ratings(wins, k=8, rounds=1000, key=key))
    ratings = np.asarray(play(jnp.asarray(wins, jnp.float32), jax.random.key(0)))
    # Shares carry no noise: what is left of a rating's error is the last battles' steps, each at most k.
    assert np.all(np.abs(ratings - ratings.mean() - strength) < 8)
    assert abs(ratings.mean() - 1000) < 0.01
    stranger = play(jnp.asarray(wins, jnp.float32).at[3].set(0).at[:, 3].set(0), jax.random.key(0))
    assert stranger[3] == 1000


def test_share_of_wins():
    scores, rivals = array(1, 0.5, 0.2, jnp.nan), array(0, 0.5, 0.9, 0)
    valid = jnp.array([True, True, True, False])
    check(ops.win_rate(scores, rivals, valid), 1 / 3)
    check(ops.win_rate(scores, rivals, valid, tie=0.5), 0.5)
    check(ops.win_rate(scores, rivals, valid & False), 0)
