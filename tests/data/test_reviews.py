"""The world of reviews."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.worlds.reviews import (
    AND,
    EOS,
    FIRST,
    STOP,
    demonstrate_reviews,
    make_review_starts,
    sentiment_reward,
    vocab_size,
)

NAMES = sorted(FIRST, key=FIRST.get)


def kind(token):
    """The class of a word, or the mark itself."""
    return token if token < 4 else [name for name in NAMES if FIRST[name] <= token][-1]


def test_reviews_keep_to_the_grammar():
    adjectives = ("good", "bad", "plain")
    may_follow = {"article": ("noun",), "noun": ("verb",), "verb": adjectives, AND: adjectives, STOP: ("article", EOS)}
    may_follow |= {name: (AND, STOP) for name in adjectives}
    shown = demonstrate_reviews(np.random.default_rng(0), 200)
    for row in range(200):
        words = [kind(token) for token in shown["tokens"][row, : shown["lengths"][row]]]
        assert words[0] == "article" and words[-1] == EOS and words.count(STOP) in (1, 2, 3)
        assert all(after in may_follow[word] for word, after in zip(words, words[1:], strict=False))
    np.testing.assert_array_equal(shown["mask"].sum(1), shown["lengths"] - 2)
    assert shown["tokens"].max() < vocab_size() == FIRST["plain"] + 4


def test_starts_and_bad_input():
    starts = make_review_starts(np.random.default_rng(0), 50)
    assert {kind(token) for token in starts["prompt_tokens"][:, 0]} == {"article"}
    assert {kind(token) for token in starts["prompt_tokens"][:, 1]} == {"noun"}
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_review_starts(np.random.default_rng(0), 0)


def test_sentiment_by_hand():
    good, bad = FIRST["good"], FIRST["bad"]
    words = jnp.array([FIRST["verb"], good, AND, good + 3, STOP, bad + 3, FIRST["plain"], good])
    assert sentiment_reward({}, words, jnp.int32(8)) == pytest.approx(0.4)
    assert sentiment_reward({}, words, jnp.int32(5)) == pytest.approx(0.4)  # what stands behind the end is not read
    assert sentiment_reward({}, words, jnp.int32(6)) == pytest.approx(0.2)
    assert sentiment_reward({}, jnp.full(8, good), jnp.int32(8)) == 1
    assert sentiment_reward({}, jnp.full(8, bad), jnp.int32(8)) == -1
