"""The shaped score of errors that used tools."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.policy_optimization.demystify_agentic_rl import tool_shaped_score

TURNS = jnp.array([2, 4, 6, 10, 14])


def test_worked_example():
    # exact but for the rounding of tenths
    np.testing.assert_allclose(tool_shaped_score(-jnp.ones(5), TURNS), [-1, -0.9, -0.8, -0.6, -0.6], rtol=1e-6)
    assert tool_shaped_score(jnp.ones(5), TURNS).tolist() == [1] * 5


def test_without_a_bonus_it_is_the_score():
    assert tool_shaped_score(-jnp.ones(5), TURNS, per_round=0.0, cap=-1.0).tolist() == [-1] * 5


def test_no_answer_is_no_episode():
    with pytest.raises(ValueError, match="at least 2, a question and an answer, got 1"):
        tool_shaped_score(-jnp.ones(2), jnp.array([4, 1]))
