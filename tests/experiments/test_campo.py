"""What CAMPO takes from a reward."""

import jax.numpy as jnp
import numpy as np

from experiments.policy_optimization.campo import campo_rewards
from jaxrl_llm import ops


def test_worked_example():
    repetition = jnp.array([0, 2 / 3, 1, 1 / 3])
    rewards = campo_rewards(jnp.array([1.0, 0, 1, 0]), repetition, jnp.zeros(4, bool))
    np.testing.assert_allclose(rewards, [1, -2 / 3, 0, -1 / 3], rtol=1e-6)
    advantages = ops.grpo_advantages(rewards, jnp.zeros(4, int), jnp.ones((4, 1), bool))[:, 0]
    # printed to six places, of values around 1; the mean is 0 but for float32
    np.testing.assert_allclose(advantages, [1.388728, -0.925819, 0, -0.462910], atol=2e-6)


def test_the_released_penalty_is_a_constant_for_loops_that_fill_the_limit():
    rewards = campo_rewards(
        jnp.array([1.0, 1, 0, 0]),
        jnp.array([0.5, 0.0, 0.5, 0.5]),
        jnp.array([True, True, False, True]),
        mode="fixed_if_truncated",
        fixed=0.1,
    )
    np.testing.assert_allclose(rewards, [0.9, 1, 0, -0.1], rtol=1e-6)
