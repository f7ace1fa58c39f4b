"""Pieces of an episode that is longer than its context."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.sampling import Event, reset_context, should_summarize, split_on_summary

EVENTS = [
    Event("policy", [1, 2]),
    Event("observation", [3]),
    Event("summary", [4, 5]),
    Event("policy", [6]),
    Event("summary", []),
    Event("policy", [7]),
]


def split(events=EVENTS, window=10, reserve=3, max_summaries=2):
    return split_on_summary([9], events, window=window, reserve=reserve, max_summaries=max_summaries)


def test_pieces_begin_with_prompt_and_summary():
    first, second, third = split()
    assert first == ([9, 1, 2, 3, 4, 5], [False, True, True, False, True, True], True)
    assert second == ([9, 4, 5, 6], [False, False, False, True], True)
    assert third == ([9, 7], [False, True], False)


def test_what_is_behind_the_last_summary_is_left_out():
    assert split(max_summaries=1) == split()[:2]
    assert split([]) == [([9], [False], False)]


def test_windows_that_are_too_small():
    with pytest.raises(ValueError, match="window=4 must be larger than the prompt of 1 tokens and reserve=3"):
        split(window=4)
    with pytest.raises(ValueError, match="piece 0 has 6 tokens, more than window=5"):
        split(window=5)


def test_a_summary_is_due_before_the_reserve_is_touched():
    assert should_summarize(8, window=10, reserve=3) and not should_summarize(7, window=10, reserve=3)
    assert should_summarize(jnp.array([7, 8]), window=10, reserve=3).tolist() == [False, True]


def test_the_next_context():
    tokens, lengths = reset_context(
        jnp.array([[1, 2], [3, 0]]), jnp.array([2, 1]), jnp.array([[4, 5, 6], [7, 8, 0]]), jnp.array([3, 2])
    )
    np.testing.assert_array_equal(tokens, [[1, 2, 4, 5, 6], [3, 7, 8, 0, 0]])
    assert lengths.tolist() == [5, 3]
