"""Alignment of calls, their rewards and advantages, and episodes of two agents."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.policy_optimization import m_grpo
from jaxrl_llm import ops
from jaxrl_llm.data.worlds import lookups

MAIN = jnp.array([1, 0.1])


def normalized(rewards, valid=None):
    rewards = jnp.asarray(rewards, jnp.float32).ravel()
    return ops.group_normalize(rewards, jnp.zeros(len(rewards), jnp.int32), valid)


def test_worked_example():
    formats = jnp.array([[True, True, True], [True, False, True]])  # picks [0, 0, 0] and [0, 1, 2]
    rewards = m_grpo.sub_rewards(MAIN, formats)
    np.testing.assert_allclose(rewards, [[1, 1, 1], [0.1, 0, 0.1]], rtol=1e-6)
    # printed to six places
    np.testing.assert_allclose(normalized(MAIN), [0.707106, -0.707106], atol=2e-6)
    np.testing.assert_allclose(normalized(rewards), [0.910549] * 3 + [-0.845510, -1.040628, -0.845510], atol=2e-6)
    every = m_grpo.sub_rewards(MAIN, jnp.array([[True, False, False, False], [True, False, True, True]])).ravel()
    valid = jnp.array([True, False, False, False, True, True, True, True])
    want = [1.779130, 0, 0, 0, -0.384677, -0.625100, -0.384677, -0.384677]
    np.testing.assert_allclose(normalized(every, valid), want, atol=2e-6)
    assert not normalized(every, jnp.zeros(8, bool)).any()  # nobody was called


def test_alignment():
    counts = jnp.array([0, 1, 2, 3, 5])
    align = jax.jit(jax.vmap(lambda key: m_grpo.align_subtrajectories(counts, key, size=3, max_count=5)))
    index, valid = jax.device_get(align(jax.random.split(jax.random.key(0), 50)))
    assert valid[:, 1:].all() and not valid[:, 0].any()
    for row, count in enumerate(counts.tolist()):
        assert (index[:, row] < max(count, 1)).all()
        assert {len(set(picks)) for picks in index[:, row, : min(count, 3)].tolist()} <= {min(count, 3)}
    assert set(index[:, 4].ravel()) == set(range(5)) and set(index[:, 2, 2]) == {0, 1}
    assert m_grpo.align_subtrajectories(counts, jax.random.key(0), size=7, max_count=5)[0].shape == (5, 7)


def test_bad_counts_and_sizes():
    for counts, size, message in (([1], 0, "size must be"), ([-1], 2, "counts must lie"), ([5], 2, "counts must lie")):
        with pytest.raises(ValueError, match=message):
            m_grpo.align_subtrajectories(jnp.array(counts), jax.random.key(0), size=size, max_count=4)


def test_episodes_of_two_agents():
    """The planner is told what the sub-agent said, and rewards are what rows say."""
    config = importlib.import_module("configs.policy_optimization.m_grpo").get_config("tiny")
    config.warm_start.steps, config.warm_start.rows = 100, 8  # enough to plan now and then
    world, model, init, *_ = m_grpo.build(config)
    params = init(m_grpo.warm_start(config, model, world), jnp.int32(0)).params
    tasks = jax.tree.map(lambda leaf: leaf[:16], world.train_tasks)
    played = jax.device_get(
        jax.jit(lambda key: m_grpo.play_agents(config, model, params, world, tasks, key))(jax.random.key(1))
    )
    assert played.counts.max() > 0 and (played.rewards == np.where(played.right, 1, played.rewards)).all()
    for row in range(16):
        count = played.counts[row]
        prompt = played.main.tokens[16 + row, : played.main.prompt_lengths[16 + row]].tolist()
        given = prompt[tasks["prompt_length"][row] :]
        assert len(given) == 1 + 2 * count and given[0] == lookups.GIVEN
        for call in range(count):
            sub = 4 * row + call
            said = played.sub.tokens[sub, played.sub.prompt_lengths[sub] : played.sub.lengths[sub]]
            assert played.sub.tokens[sub, 13] == given[1 + 2 * call]
            assert given[2 + 2 * call] == (said[-2] if played.format_ok[row, call] else lookups.UNKNOWN)
