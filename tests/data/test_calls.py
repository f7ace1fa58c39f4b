"""The world of function calls."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data import span_mask
from jaxrl_llm.data.worlds import calls


def test_calls_follow_from_their_queries():
    queries = calls.make_queries(np.random.default_rng(0), 400)
    prompt, call = queries["prompt_tokens"], queries["call"]
    function = call[:, 0] - calls.FIRST_FUNCTION
    names = {tuple(row) for row in np.column_stack([prompt[:, :2], call[:, 0]])}
    assert len(names) == 16 and set(function) == set(range(calls.FUNCTIONS))  # each verb and noun names one function
    shifts = (call[:, 1:3] - prompt[:, 2:4]) % calls.DIGITS
    assert (shifts == function[:, None]).all()
    np.testing.assert_array_equal(queries["hard"], function >= 6)
    assert 0.15 < queries["hard"].mean() < 0.35
    taught = calls.teach(np.random.default_rng(1), queries)
    assert taught[~queries["hard"]].mean() > 0.9 and taught[queries["hard"]].mean() < 0.4
    with pytest.raises(ValueError, match="number must be at least 1, got 0"):
        calls.make_queries(np.random.default_rng(0), 0)


def test_demonstrations_think_and_call():
    queries = calls.make_queries(np.random.default_rng(0), 20)
    shown = calls.demonstrate_calls(np.random.default_rng(1), queries)
    assert shown["tokens"].shape == (20, 43) and shown["tokens"].max() < calls.vocab_size()
    thought = np.asarray(span_mask(jnp.asarray(shown["tokens"]), calls.OPEN, calls.CLOSE))
    assert (thought.sum(axis=1) == calls.THOUGHT).all() and (shown["mask"] & ~thought).sum() == 20 * calls.CALL
    task = {"call": jnp.asarray(queries["call"][0])}
    response = jnp.pad(jnp.asarray(shown["tokens"][0, 5:]), (0, 2))
    length = jnp.int32(38)
    assert calls.call_reward(task, response, length) == 1
    assert calls.call_reward(task, response, length - 1) == calls.call_reward(task, response, length + 1) == 0
    assert calls.call_reward(task, response.at[35].add(1), length) == 0
    assert calls.call_reward(task, response.at[33].set(calls.OPEN), length) == 0


def test_copies():
    shown = calls.demonstrate_copies(np.random.default_rng(0), 10)
    np.testing.assert_array_equal(shown["tokens"][:, 1:5], shown["tokens"][:, 6:10])
    assert shown["mask"].sum() == 50 and (shown["lengths"] == 11).all()
