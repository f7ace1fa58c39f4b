"""The reward of SSRL, and when it asks a real engine."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.policy_optimization.ssrl import query_entropy, self_search_rewards, use_real_search
from jaxrl_llm.data.text import span_mask
from jaxrl_llm.data.worlds.facts import ANSWER, EOS, INFORMATION, SEARCH, THINK

BLOCKS = {"t": THINK, "s": SEARCH, "i": INFORMATION, "a": ANSWER}


def response(kinds):
    """A token in each block."""
    return [token for kind in kinds for token in (BLOCKS[kind][0], 20, BLOCKS[kind][1])] + [EOS]


def test_worked_example_and_broken_information():
    broken = [*THINK[:1], 20, THINK[1], INFORMATION[0], 20, ANSWER[0], 20, ANSWER[1], EOS]
    written = [*(response(kinds) for kinds in ("tsita", "ta", "tsia", "tsitsita", "tsa", "ttsita")), broken]
    tokens = np.zeros((7, 30), np.int32)
    for row, one in enumerate(written):
        tokens[row, : len(one)] = one
    right, lengths = jnp.array([1.0, 1, 1, 0, 1, 1, 1]), jnp.array([len(one) for one in written])
    rewards, terms = jax.jit(self_search_rewards)(right, jnp.asarray(tokens), lengths)
    np.testing.assert_allclose(rewards, [1, 0.95, 0.925, 0.1, 0.9, 0.966667, 0.9], atol=1e-6)  # as printed
    np.testing.assert_allclose(terms["format"], np.mean([1, 0.5, 0.25, 1, 0, 2 / 3, 0]), rtol=1e-6)
    hidden = jax.jit(span_mask, static_argnums=(1, 2))(jnp.asarray(tokens), *INFORMATION)
    assert hidden[6].tolist() == [False] * 3 + [True] * 27  # to the end


def test_real_search_where_entropy_rises():
    every = jnp.ones(3, bool)
    assert use_real_search(jnp.array([0.3, 0.2, 0.25]), every).tolist() == [True, False, True]
    assert use_real_search(jnp.array([0.3, 0.3, 0.2]), every).tolist() == [True, False, False]  # strictly
    assert use_real_search(jnp.array([0.3, 0.1, 0.2]), jnp.array([False, True, True])).tolist() == [False, True, True]
    assert not use_real_search(jnp.zeros(3), ~every).any()


def test_entropy_of_a_query():
    logprobs = jnp.log(jnp.array([[0.5, 0.25, 0.125]]))
    mask = jnp.array([[True, True, False]])
    np.testing.assert_allclose(query_entropy(logprobs, mask), [0.5], rtol=1e-6)  # 0.5 * 1 and 0.25 * 2 bits
    assert query_entropy(logprobs, ~mask & mask).item() == 0
