"""Advantages of pieces, the mean over rollouts, and episodes in pieces."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.policy_optimization import supo
from experiments.policy_optimization._training import make_policy
from jaxrl_llm import ops
from jaxrl_llm.data.worlds import updates
from jaxrl_llm.sampling import score_rollout

PIECES = jnp.array([0, 0, 1, 2, 2, 2])
REWARDS, GROUPS = jnp.array([1.0, 0, 1]), jnp.zeros(3, jnp.int32)
MASK = jnp.ones((6, 1), bool)


def advantages(finished=(True, True, True), **options):
    found = supo.piece_advantages(REWARDS, GROUPS, PIECES, MASK, jnp.array(finished), **options)
    return found[:, 0].tolist()


def test_worked_example():
    a, b = 0.577349, -1.154699  # printed to six places
    np.testing.assert_allclose(advantages(), [a, a, b, a, a, a], atol=1e-6)
    np.testing.assert_allclose(advantages((True, False, True)), [a, a, 0, a, a, a], atol=1e-6)
    np.testing.assert_allclose(advantages((True, False, True), mask_from_baseline=True), np.zeros(6))
    np.testing.assert_allclose(advantages((True, False, True), mask_unfinished=False), advantages())


def test_weights_make_a_token_mean_one_over_rollouts():
    key = jax.random.split(jax.random.key(0))
    x, mask = jax.random.normal(key[0], (6, 5)), jax.random.bernoulli(key[1], 0.6, (6, 5)).at[2].set(False)
    got = ops.reduce_loss(x, mask, weights=supo.rollout_weights(mask, PIECES, 3))
    # float32 sums of 30 terms
    np.testing.assert_allclose(got, ops.reduce_loss(x, mask, agg="rollout", rollout_ids=PIECES), rtol=1e-5)


def test_pieces_of_an_episode():
    """Each begins with what the one before wrote; rewards and ends are the episode's; tokens score as sampled."""
    config = importlib.import_module("configs.policy_optimization.supo").get_config("tiny")
    world = supo.update_world(config)
    model = make_policy(config, world)
    params = model.init(jax.random.key(0))
    tasks = jax.tree.map(lambda leaf: leaf[:8], world.train_tasks)
    played = jax.jit(lambda key: supo.play_pieces(config, model, params, world, tasks, key, 2))(jax.random.key(1))
    sampled = played.rollout
    assert sampled.rollout_ids.tolist() == np.repeat(np.arange(8), 3).tolist()
    for row in range(24):
        episode, piece = divmod(row, 3)
        took_place = piece < int(played.num_pieces[episode])
        assert bool(sampled.mask[row].any()) == took_place
        if took_place and piece + 1 < int(played.num_pieces[episode]):
            written = sampled.tokens[row][played.summaries[row]]
            assert 0 < len(written) <= config.max_turn_tokens
            following = sampled.tokens[row + 1, : int(sampled.prompt_lengths[row + 1])]
            assert following.tolist() == [updates.BEGIN, *written.tolist()]
    assert int(played.num_pieces.max()) > 1
    logprobs, _ = score_rollout(model, params, sampled, decoding=sampled.decoding)
    # sampler and trainer sum in different orders
    np.testing.assert_allclose(np.where(sampled.mask, sampled.logprobs - logprobs, 0), 0, atol=1e-4)


def test_settings_are_checked():
    config = importlib.import_module("configs.policy_optimization.supo").get_config("tiny")
    config.memory = "forget"
    with pytest.raises(ValueError, match="'forget' must be one of summary, truncate"):
        supo.build(config)
