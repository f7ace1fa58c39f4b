"""The loss of Guide-GRPO and what it reports."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.policy_optimization.guide_grpo import capability_split, guide_grpo_loss
from jaxrl_llm import ops


def test_worked_example():
    log_ratios, guided = jnp.array([[-2, 0.5, 0, -0.7]]), jnp.array([True])
    mask, old = jnp.ones((1, 4), bool), jnp.full((1, 4), -1.5)

    def loss(logprobs):
        return guide_grpo_loss(logprobs, old, jnp.ones((1, 4)), mask, guided)[0]

    value, grads = jax.value_and_grad(loss)(old + log_ratios)
    # printed to six places; the mean over four tokens
    np.testing.assert_allclose(value, -np.mean([0.085147, 0.531361, 0.407481, 0.254569]), atol=1e-6)
    np.testing.assert_allclose(-4 * grads[0], [0.077897, 0.249016, 0.241440, 0.189764], atol=2e-6)


def test_plain_rows_are_ppo_and_both_share_one_mean():
    key = jax.random.split(jax.random.key(0), 3)
    logprobs, old, advantages = (jax.random.normal(k, (4, 5)) for k in key)
    mask = jnp.arange(5) < jnp.array([5, 3, 0, 4])[:, None]
    none, half = jnp.zeros(4, bool), jnp.array([False, True, True, False])
    plain, _ = guide_grpo_loss(logprobs, old, advantages, mask, none)
    np.testing.assert_allclose(plain, ops.ppo_clip_loss(logprobs, old, advantages, mask)[0], rtol=1e-6)
    mixed, _ = guide_grpo_loss(logprobs, old, advantages, mask, half)
    shaped = ops.shape_ratio(jnp.exp(logprobs - old), mask & half[:, None])
    want = ops.ppo_clip_loss(logprobs, old, advantages, mask & ~half[:, None], denominator=12.0)[0]
    np.testing.assert_allclose(mixed, want - np.sum(advantages * shaped) / 12, rtol=1e-5)  # sums of 12 terms


def test_capability_and_self_distillation():
    before = jnp.array([[0, 0], [1, 0], [1, 1], [0, 0]], bool)
    after = jnp.array([[1, 0], [1, 1], [1, 1], [0, 0]], bool)
    split = capability_split(before, after)
    assert float(split["capability_gain"]) == 0.25 and float(split["self_distillation"]) == 0.25
