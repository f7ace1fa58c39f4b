"""The world of lookups."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.worlds.lookups import (
    ANSWER,
    ASK,
    EOS,
    EQUALS,
    FIRST_KEY,
    FIRST_VALUE,
    GIVEN,
    KEYS,
    LOOK,
    RESULT,
    UNKNOWN,
    demonstrate_lookups,
    given_tokens,
    look_up_prompts,
    make_lookups,
    read_plan,
    read_value,
)

A, B, ONE, TWO = FIRST_KEY, FIRST_KEY + 1, FIRST_VALUE + 1, FIRST_VALUE + 2


def padded(rows):
    tokens = np.zeros((len(rows), 6), np.int32)
    for row, written in enumerate(rows):
        tokens[row, : len(written)] = written
    return jnp.asarray(tokens), jnp.array([len(row) for row in rows])


def test_problems_are_sums_of_the_table():
    problems = make_lookups(np.random.default_rng(0), 100)
    for table, question, length, answer in zip(
        *(problems[name] for name in ("table", "prompt_tokens", "prompt_length", "answer")), strict=True
    ):
        keys = question[1 : length - 1]
        assert question[0] == ASK and question[length - 1] == EQUALS and 1 <= len(set(keys)) == len(keys) <= 3
        values = [table[2 * (key - FIRST_KEY) + 1] - FIRST_VALUE for key in keys]
        assert answer == FIRST_VALUE + sum(values) % 10 and table[::2].tolist() == list(range(A, A + KEYS))
    with pytest.raises(ValueError, match="number must be at least 1"):
        make_lookups(np.random.default_rng(0), 0)


def test_plans():
    calls, counts, ok = read_plan(
        *padded([[A, B, EOS], [B, EOS], [EOS], [A, ONE, EOS], [A, B], [A, B, A, B, EOS], [A, B, A, B, A, EOS]])
    )
    assert counts.tolist() == [2, 1, 0, 0, 0, 4, 0] and ok.tolist() == [True, True, *[False] * 3, True, False]
    assert calls[0, :2].tolist() == [A, B] and calls[5].tolist() == [A, B, A, B]


def test_values():
    rows = [
        [RESULT, ONE, EOS],
        [TWO, TWO, RESULT, ONE, EOS],
        [RESULT, A, EOS],
        [RESULT, ONE],
        [ANSWER, ONE, EOS],
        [EOS],
    ]
    values, ok = read_value(*padded(rows), RESULT)
    assert ok.tolist() == [True, True, False, False, False, False] and values[:2].tolist() == [ONE, ONE]


def test_what_is_asked_and_given():
    table = jnp.arange(12)[None]
    assert look_up_prompts(table, jnp.array([B]))[0, 11:].tolist() == [11, LOOK, B]
    assert given_tokens(jnp.array([[A, B]]), jnp.array([[ONE, UNKNOWN]])).tolist() == [[GIVEN, A, ONE, B, UNKNOWN]]


def test_demonstrations():
    rng = np.random.default_rng(1)
    problems = make_lookups(rng, 80)
    shown = demonstrate_lookups(rng, problems)
    for row in range(80):
        own = shown["tokens"][row][shown["mask"][row]]
        before = shown["tokens"][row, : shown["lengths"][row] - len(own)].tolist()
        question = problems["prompt_tokens"][row, : problems["prompt_length"][row]].tolist()
        table = problems["table"][row].tolist()
        mark, right = (RESULT, table[2 * (question[1] - FIRST_KEY) + 1]) if row % 4 == 1 else (ANSWER, None)
        if row % 4 == 0:
            assert before == question and own.tolist() == [*question[1:-1], EOS]
            continue
        assert before[: len(table)] == table or before[: len(question) + 1] == [*question, GIVEN]
        values, ok = read_value(*padded([own.tolist()]), mark)
        assert ok[0] and values[0] == (problems["answer"][row] if right is None else right)
    noisy = demonstrate_lookups(rng, problems, wrong=0.5)
    assert (noisy["lengths"] == shown["lengths"]).all() and (noisy["tokens"] != shown["tokens"]).any()
