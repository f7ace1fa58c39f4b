"""Rollouts that branch inside one jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import SingleTurnEnv
from jaxrl_llm.models import DecoderConfig, make_decoder
from jaxrl_llm.sampling import BegunEnv, branching_rollout, score_rollout
from jaxrl_llm.types import Decoding
from tests.sampling.worlds import VOCAB, random_prompts

MODEL = make_decoder(DecoderConfig(VOCAB, width=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=32))
PARAMS = jax.jit(MODEL.init)(jax.random.key(1))
P, G = 6, 5
TASKS = random_prompts(P)
ENV = SingleTurnEnv(lambda task, tokens, length: jnp.sum(jnp.where(jnp.arange(len(tokens)) < length, tokens, 0)))


@jax.jit
def grow(params, eps_key):
    """The score of a token is its log-prob, negative: where the policy was surprised."""
    sampled = branching_rollout(
        *(MODEL, params, ENV, TASKS, eps_key),
        score=lambda rows: -rows.logprobs,
        eps=0.3,
        group_size=G,
        max_length=20,
        max_turn_tokens=20,
        stop_sequences=[[3], [11]],
        num_slots=4,
    )
    return sampled, score_rollout(MODEL, params, sampled, decoding=Decoding())[0]


@pytest.fixture(scope="module")
def tree():
    sampled, logprobs = grow(PARAMS, jax.random.key(0))
    return jax.tree.map(np.asarray, sampled), np.asarray(logprobs)


def test_a_branch_is_its_parent_up_to_the_fork(tree):
    sampled, logprobs = tree
    np.testing.assert_array_equal(sampled.group_ids, np.repeat(np.arange(P), G))
    np.testing.assert_array_equal(sampled.prompt_lengths, np.repeat(TASKS["prompt_length"], G))
    branches = np.flatnonzero(sampled.parent >= 0)
    assert 0 < len(branches) < P * (G - 1) and np.all(sampled.parent[::G] == -1)  # about 7 in 10 of 24
    for row in branches:
        parent, fork = sampled.parent[row], sampled.fork_position[row]
        assert parent < row and sampled.group_ids[parent] == sampled.group_ids[row]
        assert sampled.prompt_lengths[row] <= fork < sampled.lengths[parent]
        for field in (sampled.tokens, sampled.mask, sampled.logprobs):
            np.testing.assert_array_equal(field[row, :fork], field[parent, :fork])
        assert sampled.lengths[row] > fork  # the token at the fork is drawn again
    assert np.all(sampled.fork_position[sampled.parent < 0] == 0)
    # a cached and a full pass
    np.testing.assert_allclose(sampled.logprobs, logprobs, atol=1e-4)


def test_the_fork_is_where_the_score_was_highest(tree):
    sampled, _ = tree
    for row in np.flatnonzero(sampled.parent >= 0):
        before = slice(row - row % G, row)
        scores = np.where(sampled.mask[before], -sampled.logprobs[before], -np.inf)
        assert scores[sampled.parent[row] - before.start, sampled.fork_position[row]] == scores.max()


def test_rewards_see_the_whole_response(tree):
    sampled, _ = tree
    np.testing.assert_array_equal(sampled.rewards, np.sum(sampled.tokens * sampled.mask, axis=1))
    places = np.arange(sampled.mask.shape[1])
    inside = (places >= sampled.prompt_lengths[:, None]) & (places < sampled.lengths[:, None])
    np.testing.assert_array_equal(sampled.mask, inside)


def test_a_begun_turn():
    env = BegunEnv(ENV)
    own = {"prompt_tokens": jnp.array([7, 8]), "prompt_length": jnp.int32(2)}
    for kept, first in ((4, [5, 6]), (0, [])):
        state, tokens, length = env.reset(jax.random.key(0), (own, jnp.array([7, 8, 5, 6, 1]), jnp.int32(kept)))
        assert tokens[:length].tolist() == [7, 8, *first]
        state, _, _, reward, done = env.step(state, jnp.array([9, 2, 2]), jnp.int32(1))
        assert reward == sum(first) + 9 and done
        assert env.step(state, jnp.array([9, 2, 2]), jnp.int32(2))[3] == 11  # the second turn is its own


def test_bad_input():
    for options, message in (({"group_size": 0}, "group_size"), ({"eps": 1.5}, r"eps must lie in \[0, 1\]")):
        with pytest.raises(ValueError, match=message):
            branching_rollout(
                *(MODEL, PARAMS, ENV, TASKS, jax.random.key(0)),
                score=lambda rows: rows.logprobs,
                **({"eps": 0.5, "group_size": 2, "max_length": 20, "max_turn_tokens": 4} | options),
            )
