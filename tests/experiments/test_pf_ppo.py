"""Which samples PF-PPO trusts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.policy_optimization.pf_ppo import get_config
from experiments.policy_optimization.pf_ppo import model_reward, reward_r2, select_strategy
from jaxrl_llm.data.worlds.arithmetic import ANSWER, EOS, FIRST_NUMBER

REWARDS, SCORES = jnp.array([0.1, 2, -1, 0.5, 0.7]), jnp.array([0.0, 1, 0, 1, 0])


def test_r2_by_hand():
    np.testing.assert_allclose(reward_r2(REWARDS, SCORES), 0.443379, atol=1e-6)
    np.testing.assert_allclose(reward_r2(REWARDS, SCORES, jnp.array([0.0, 1, 1, 0, 0])), 1, rtol=1e-6)
    np.testing.assert_allclose(reward_r2(REWARDS, SCORES, jnp.array([1.0, 1, 1, 0, 0])), 0.868669, atol=1e-6)
    assert reward_r2(REWARDS, jnp.ones(5)) == 0
    assert reward_r2(jnp.ones(5), SCORES) == 0


def test_the_strategy_of_the_largest_r2():
    name, r2 = select_strategy(REWARDS[None], SCORES[None], ("all", "best_worst"))
    assert name == "best_worst"
    np.testing.assert_allclose([r2["all"], r2["best_worst"]], [0.443379, 1], atol=1e-6)
    with pytest.raises(ValueError, match="worst_random"):
        select_strategy(REWARDS[None], SCORES[None], ("worst_random",))


def test_the_reward_model_errs_in_the_middle():
    config = get_config()

    @jax.jit
    def reward(digit):
        tokens = jnp.array([ANSWER, FIRST_NUMBER + digit, EOS])
        return model_reward(config, {"answer": jnp.int32(3)}, tokens, jnp.int32(3))

    rewards = np.array([reward(digit) for digit in range(10)])
    closeness = np.array([1 - min(abs(d - 3), 10 - abs(d - 3)) / 5 for d in range(10)])
    errors = np.abs(rewards - closeness)
    assert errors[[3, 8]].max() < 1e-6  # the right digit and the farthest; float32
    assert np.all(errors[[0, 1, 5, 6]] < 0.9216 + 1e-6) and errors[[0, 1, 5, 6]].max() > 0.4096
    assert np.all(errors[[2, 4, 7, 9]] < 0.4096 + 1e-6) and errors.min() < errors[[2, 4, 7, 9]].min()
