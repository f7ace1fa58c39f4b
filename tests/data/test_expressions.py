"""The world of expressions with synonyms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.worlds.expressions import (
    EQUALS,
    FIRST_END,
    FIRST_NUMBER,
    FIRST_OPERATOR,
    VOCAB_SIZE,
    demonstrate_expressions,
    expression_reward,
    make_expression_tasks,
    meaning_ids,
)

PLUS, MINUS, TIMES = FIRST_OPERATOR, FIRST_OPERATOR + 4, FIRST_OPERATOR + 8
TASK = {"target": jnp.int32(9)}
reward = jax.jit(jax.vmap(expression_reward, (None, 0, 0)))


def n(value):
    return FIRST_NUMBER + value


def test_rewards_by_hand():
    answers = [
        [PLUS, n(2), PLUS + 3, n(7), FIRST_END],
        [PLUS, n(3), TIMES, n(4), MINUS + 1, n(3), FIRST_END + 1],  # 12 - 3
        [MINUS, n(5), PLUS, n(1), FIRST_END],  # -4 modulo 13
        [PLUS, n(2), PLUS, n(7)],  # no end
        [PLUS, n(9), FIRST_END],  # one step
        [PLUS, n(2), PLUS, n(6), FIRST_END],
        [n(2), PLUS, PLUS, n(7), FIRST_END],
        [PLUS, n(1), PLUS, n(1), PLUS, n(1), PLUS, n(6), FIRST_END],
        [PLUS, n(1), PLUS, n(1), PLUS, n(1), PLUS, n(1), PLUS, n(5), FIRST_END],  # five
    ]
    tokens = jnp.array([answer + [FIRST_END] * (12 - len(answer)) for answer in answers])
    lengths = jnp.array([len(answer) for answer in answers])
    assert reward(TASK, tokens, lengths).tolist() == [1, 1, 1, 0, 0, 0, 0, 1, 0]


def test_meaning_has_no_spelling():
    tokens = jnp.array([[PLUS, n(1), FIRST_END, 0], [PLUS + 2, n(1), FIRST_END + 1, 7], [MINUS, n(1), FIRST_END, 0]])
    ids = meaning_ids(tokens, jnp.array([3, 3, 3]))
    assert ids[0] == ids[1] != ids[2] and ids[0] != meaning_ids(tokens[0], jnp.int32(2))


def test_demonstrations():
    shown = demonstrate_expressions(np.random.default_rng(0), 200, wrong=0.0)
    target = jnp.asarray(shown["tokens"][:, 0] - FIRST_NUMBER)
    answers, lengths = jnp.asarray(shown["tokens"][:, 2:]), jnp.asarray(shown["lengths"] - 2)
    every = jax.jit(jax.vmap(expression_reward))({"target": target}, answers, lengths)
    assert np.all(every == 1) and shown["tokens"].max() < VOCAB_SIZE and np.all(shown["tokens"][:, 1] == EQUALS)
    np.testing.assert_array_equal(shown["mask"].sum(1), lengths)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_expression_tasks(np.random.default_rng(0), 0)
