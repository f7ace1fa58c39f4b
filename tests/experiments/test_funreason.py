"""FunReason's loss, its gates and its loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.policy_optimization.funreason import multiscale_loss, self_refine_loop, two_gate_split, unanimous

NLL = jnp.array([[0.2, 0.1, 0.3, 0.2, 0.2, 0.4, 0.1, 0.3, 1.0, 0.6]])
THINK = jnp.arange(10)[None] < 8


def loss(alpha=0.7, balance="fixed", nll=NLL, think=THINK, call=~THINK, **more):
    return multiscale_loss(-nll, think, call, alpha=alpha, balance=balance, **more)


def test_worked_example():
    # float32 sums of ten numbers
    for alpha, balance, expected in [(0.7, "token", 0.34), (0.7, "fixed", 0.3975), (0.5, "fixed", 0.5125)]:
        np.testing.assert_allclose(loss(alpha, balance)[0], expected, rtol=1e-6)
    total, metrics = loss(balance="length")
    np.testing.assert_allclose([total, metrics["alpha"]], [0.685, 0.2], rtol=1e-6)
    np.testing.assert_allclose([metrics["think"], metrics["call"]], [0.225, 0.8], rtol=1e-6)
    gradient = jax.grad(lambda alpha: loss(alpha, "learned")[0])(jnp.float32(0.7))
    np.testing.assert_allclose(gradient, -0.575, rtol=1e-6)  # descent raises alpha: less weight on the harder call


def test_a_row_without_a_part_or_without_any():
    rows, nothing = jnp.concatenate([NLL] * 4), jnp.zeros((1, 10), bool)
    think = jnp.concatenate([THINK, THINK, nothing, nothing])
    call = jnp.concatenate([~THINK, nothing, ~THINK, nothing])
    for balance, whole in [("fixed", 0.3975), ("length", 0.685)]:
        total, metrics = loss(0.7, balance, rows, think, call)
        np.testing.assert_allclose(total, (whole + 0.225 + 0.8) / 3, rtol=1e-6)
        assert np.isfinite(metrics["alpha"])
    parts = [loss(0.7, "fixed", rows[i : i + 2], think[i : i + 2], call[i : i + 2], denominator=3)[0] for i in (0, 2)]
    np.testing.assert_allclose(sum(parts), loss(0.7, "fixed", rows, think, call)[0], rtol=1e-6)
    assert loss(think=nothing, call=nothing)[0] == 0


def test_bad_input():
    with pytest.raises(ValueError, match=r"alpha=1.5 must lie in \[0, 1\]"):
        loss(1.5)
    with pytest.raises(ValueError, match="must be one of token, fixed, learned, length"):
        loss(balance="none")
    with pytest.raises(ValueError, match="overlap"):
        loss(call=THINK)


def test_gates_and_judges():
    assert two_gate_split(np.array([True, True, False]), np.array([True, False, True])).tolist() == [2, 1, 0]
    assert unanimous(jnp.array([[0.5, 0.9, 1.0], [0.4, 0.9, 1.0]])).tolist() == [True, False]


def test_the_loop_takes_solved_queries_out_and_ends_when_none_is_left():
    seen = []

    def fit(state, candidates, accepted, number):
        seen.append((number, accepted.any(axis=-1).tolist()))
        return state + 1

    def judge(candidates):  # round n solves the queries up to n
        return np.arange(3)[:, None] <= np.array([candidates, -1])

    state, left = self_refine_loop(0, np.ones(3, bool), lambda state, number: number, judge, fit)
    assert (state, left.any()) == (3, False)
    assert seen == [(0, [True, False, False]), (1, [False, True, False]), (2, [False, False, True])]
    state, left = self_refine_loop(0, np.ones(3, bool), lambda state, number: number, judge, fit, max_rounds=1)
    assert (state, left.tolist()) == (1, [False, True, True])
