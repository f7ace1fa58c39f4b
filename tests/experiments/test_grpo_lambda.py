"""The rewards of GRPO-lambda."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.policy_optimization.grpo_lambda import grpo_lambda_rewards, select_efficient_groups
from jaxrl_llm import ops

CORRECT = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]], bool)
LENGTHS = jnp.tile(jnp.array([10, 20, 30, 40]), (5, 1))


def test_worked_example():
    assert select_efficient_groups(CORRECT, lam=0.4).tolist() == [True, False, True, False, False]
    rewards = grpo_lambda_rewards(CORRECT, LENGTHS, alpha=0.2, lam=0.4)
    np.testing.assert_allclose(rewards[0], [0.954580, 0.9, 0.845420, 0], atol=1e-6)  # as printed
    np.testing.assert_allclose(rewards[2], [0.958552, 0.921995, 0.878005, 0.841448], atol=1e-6)
    np.testing.assert_array_equal(rewards[jnp.array([1, 3, 4])], CORRECT[jnp.array([1, 3, 4])].astype(np.float32))
    groups, mask = jnp.repeat(jnp.arange(5), 4), jnp.ones((20, 1), bool)
    advantages = ops.grpo_advantages(rewards.ravel(), groups, mask).reshape(5, 4)
    # std + 1e-6 against a std of 0.05 to 0.5, and rounded print
    np.testing.assert_allclose(advantages[0], [0.618262, 0.497565, 0.376868, -1.492695], atol=2e-5)
    np.testing.assert_allclose(advantages[2], [1.146495, 0.430686, -0.430686, -1.146495], atol=5e-5)


def test_edges():
    assert not select_efficient_groups(CORRECT, lam=0.0).any()
    assert select_efficient_groups(CORRECT, lam=1.0).tolist() == [True, True, True, False, True]
    by_threshold = select_efficient_groups(CORRECT, lam=0.0, select="threshold", threshold=0.5)
    assert by_threshold.tolist() == [True, False, True, False, True]
    np.testing.assert_array_equal(grpo_lambda_rewards(CORRECT, LENGTHS, alpha=0.2, lam=0.0), CORRECT.astype(np.float32))
    one_right = grpo_lambda_rewards(CORRECT[1:2], LENGTHS[:1], alpha=0.2, lam=1.0)
    np.testing.assert_allclose(one_right, [[0.9, 0, 0, 0]], rtol=1e-6)  # z = 0, and nothing for short wrong answers
    for options in ({"alpha": 1.5, "lam": 0.2}, {"alpha": 0.2, "lam": -0.1}):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            grpo_lambda_rewards(CORRECT, LENGTHS, **options)
