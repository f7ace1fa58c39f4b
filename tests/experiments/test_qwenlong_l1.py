"""Phases, past samples and the reward of QwenLong-L1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.policy_optimization.qwenlong_l1 import (
    docqa_reward,
    hybrid_reward,
    phase_schedule,
    retrospective_weights,
    sample_phase,
)


def test_weights_by_hand():
    past = jnp.array([True, True, True, False])
    weights = retrospective_weights(jnp.array([0, 0.25, 1, -1]), group_size=8, in_past=past)
    np.testing.assert_allclose(weights, [16, 3.2, 0.941176, 0], atol=1e-6)  # as printed
    np.testing.assert_allclose(weights / weights.sum(), [0.794392, 0.158878, 0.046729, 0], atol=1e-6)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got \[-1.\]"):
        retrospective_weights(jnp.array([0, 0.25, 1, -1]), group_size=8, in_past=~past)


def test_phases():
    assert phase_schedule(np.array([10, 64, 65, 192]), (64, 192)).tolist() == [0, 0, 1, 1]
    for limits, problem in (((64, 64), "increase"), ((64, 100), "beyond the last"), ((5, 192), "phase 0")):
        with pytest.raises(ValueError, match=problem):
            phase_schedule(np.array([10, 64, 65, 192]), limits)


def test_a_share_of_the_batch_is_from_the_past():
    phase_of = jnp.repeat(jnp.arange(2), 8)
    draw = jax.jit(lambda key, weights, phase: sample_phase(key, phase_of, weights, phase, 4, past_fraction=0.5))
    weights = jnp.where(phase_of == 0, jnp.array([0, 0, 0, 5, 0, 0, 3, 0] * 2), 0.0)
    chosen = draw(jax.random.key(0), weights, 1)
    assert (chosen[:2] >= 8).all() and sorted(chosen[2:].tolist()) == [3, 6]
    assert len(set(chosen.tolist())) == 4
    alone = draw(jax.random.key(0), jnp.zeros(16), 0)
    assert (alone < 8).all() and len(set(alone.tolist())) == 4


def test_reward_of_text():
    assert docqa_reward("<think>hm</think> So **the answer is Jane Smith.**", "Smith") == 1
    assert docqa_reward("</think> the answer is London.", "the answer is Paris") == 0
    assert docqa_reward("</think> the answer is Paris, no, the answer is London...", "London") == 1
    for text in ("the answer is Paris", "</think> Paris", "</think> The answer is Paris", "</think> the answer is ."):
        assert docqa_reward(text, "Paris") == 0
    assert docqa_reward("</think> the answer is 42", "4") == 0
    assert docqa_reward("</think> the answer is 42", "4", containment="char") == 1
    asked = []
    judge = lambda answer, gold: asked.append((answer, gold)) or 1.0  # noqa: E731
    assert docqa_reward("</think> the answer is NYC.", "New York", judge=judge) == 1 and asked == [("NYC", "New York")]
    assert docqa_reward("</think> the answer is New York", "New York", judge=judge) == 1 and len(asked) == 1
    np.testing.assert_array_equal(hybrid_reward(jnp.array([0, 1, 0]), jnp.array([0, 0, 1])), [0, 1, 1])
