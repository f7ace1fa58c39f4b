"""The world of sums: problems, demonstrations, and what an answer is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.worlds.arithmetic import (
    ANSWER,
    EOS,
    EQUALS,
    FIRST_NUMBER,
    PLUS,
    WAIT,
    demonstrate_sums,
    make_sums,
    sum_reward,
    vocabulary,
)

reward = jax.jit(sum_reward)


def number(value):
    return FIRST_NUMBER + value


def score(response, answer=7, length=None):
    tokens = np.zeros(8, np.int32)
    tokens[: len(response)] = response
    return float(reward({"answer": jnp.int32(answer)}, jnp.asarray(tokens), jnp.int32(length or len(response))))


def test_problems_are_sums():
    sums = make_sums(np.random.default_rng(0), 300, terms=(2, 4), modulus=10)
    assert np.bincount(sums["terms"]).tolist() == [0, 0, 150, 0, 150]
    for prompt, length, answer, terms in zip(
        *(sums[name] for name in ("prompt_tokens", "prompt_length", "answer", "terms")), strict=True
    ):
        words = [vocabulary(10)[token] for token in prompt[:length]]
        assert words[-1] == "=" and words[1:-1:2] == ["+"] * (terms - 1) and not prompt[length:].any()
        assert sum(map(int, words[0::2])) % 10 == answer
    assert {EQUALS, PLUS} < set(sums["prompt_tokens"].flat)


@pytest.mark.parametrize("options", [{}, {"write_steps": 1.0}, {"waits": 3.0}, {"waits": 3.0, "wait_first": False}])
def test_demonstrations_without_errors_earn_the_reward(options):
    rng = np.random.default_rng(1)
    sums = make_sums(rng, 64, terms=(2, 3), modulus=7)
    shown = demonstrate_sums(rng, sums, modulus=7, **options)
    for row in range(64):
        start, end = sums["prompt_length"][row], shown["lengths"][row]
        response = shown["tokens"][row, start:end]
        assert shown["mask"][row].nonzero()[0].tolist() == list(range(start, end))
        padded = np.zeros(40, np.int32)
        padded[: len(response)] = response
        task = {"answer": jnp.asarray(sums["answer"][row])}
        assert reward(task, jnp.asarray(padded), jnp.int32(len(response))) == 1
        numbers = (response >= FIRST_NUMBER).sum()
        assert numbers == (sums["terms"][row] - 1 if options.get("write_steps") else 1)
    if "waits" in options:
        waits = (shown["tokens"] == WAIT).sum(axis=1)
        assert 1.5 < waits.mean() < 4.5  # geometric of mean 3, 64 draws: 4 standard errors of 0.43, cut at 25
        first = [row[mask][0] == WAIT for row, mask in zip(shown["tokens"], shown["mask"], strict=True)]
        assert any(first) == options.get("wait_first", True)


def test_errors_are_as_frequent_as_asked():
    rng = np.random.default_rng(2)
    sums = make_sums(rng, 2000, terms=(2,), modulus=10)
    shown = demonstrate_sums(rng, sums, wrong=0.5)
    last = shown["tokens"][np.arange(2000), shown["lengths"] - 2] - FIRST_NUMBER
    assert abs(np.mean(last == sums["answer"]) - 0.55) < 0.045  # a random digit is right once in ten; 4 standard errors


def test_what_an_answer_is():
    assert score([ANSWER, number(7), EOS]) == 1
    assert score([ANSWER, number(7), WAIT, WAIT, EOS]) == 1
    assert score([number(3), ANSWER, number(2), ANSWER, number(7), EOS]) == 1, "the last one counts"
    assert score([ANSWER, number(7), ANSWER, number(2), EOS]) == 0
    assert score([ANSWER, number(7)]) == 0, "did not end"
    assert score([number(7), EOS]) == 0, "no answer"
    assert score([number(7), WAIT, ANSWER]) == score([ANSWER, EOS]) == 0
    assert score([ANSWER, number(7), EOS], length=2) == 0, "what lies behind the length is not read"


@pytest.mark.parametrize("options", [{"terms": (1, 2)}, {"terms": ()}, {"modulus": 1}])
def test_bad_sizes(options):
    with pytest.raises(ValueError, match="a sum has two terms"):
        make_sums(np.random.default_rng(0), 4, **options)
