"""Reviews of a few sentences in a small grammar, `the film seemed good and fine .`, and how good they sound.

A language model of them knows what may follow what; a policy that is paid for good words alone soon writes nothing
else.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

PAD, EOS, STOP, AND = range(4)
CLASSES = {"article": 2, "noun": 8, "verb": 4, "good": 4, "bad": 4, "plain": 4}
_ENDS = dict(zip(CLASSES, (4 + np.cumsum(list(CLASSES.values()))).tolist(), strict=True))
FIRST = {name: _ENDS[name] - size for name, size in CLASSES.items()}  # the first token of each class of words
MAX_RESPONSE = 20  # of three sentences of the longest kind, without the two words of the prompt


def vocab_size() -> int:
    """Tokens there are: words and marks."""
    return max(_ENDS.values())


def make_review_starts(rng: np.random.Generator, number: int) -> dict[str, np.ndarray]:
    """The first two words of reviews, an article and a noun: `prompt_tokens` int32[number, 2] and `prompt_length`.

    Raises:
      ValueError: `number` below 1.
    """
    if number < 1:
        raise ValueError(f"number must be at least 1, got {number}")
    words = [_draw_words(rng, name, number) for name in ("article", "noun")]
    return {"prompt_tokens": np.stack(words, axis=1), "prompt_length": np.full(number, 2, np.int32)}


def demonstrate_reviews(rng: np.random.Generator, number: int) -> dict[str, np.ndarray]:
    """Reviews by people: `tokens` int32[N, 22], `mask` (all but the first two words) and `lengths`.

    Each is in a good or a bad mood, and half of its adjectives with it; 3 in 20 are against it, the others plain. One
    to three sentences of `article noun verb adjective (and adjective)? .`, then the end.
    """
    tokens, lengths = np.full((number, 2 + MAX_RESPONSE), PAD, np.int32), np.zeros(number, np.int32)
    moods = rng.integers(2, size=number)
    counts, seconds = rng.choice([1, 2, 3], size=number, p=[0.5, 0.3, 0.2]), rng.random((number, 3)) < 0.4
    words = {name: _draw_words(rng, name, (number, 6)) for name in CLASSES}
    kinds = rng.choice(3, size=(number, 6), p=[0.5, 0.15, 0.35])
    for row in range(number):
        sides = ("good", "bad", "plain") if moods[row] else ("bad", "good", "plain")
        adjectives = [words[sides[kind]][row, place] for place, kind in enumerate(kinds[row])]
        text: list[int] = []
        for sentence in range(counts[row]):
            text += [words[name][row, sentence] for name in ("article", "noun", "verb")]
            text += [adjectives[2 * sentence]]
            text += [AND, adjectives[2 * sentence + 1]] if seconds[row, sentence] else []
            text += [STOP]
        lengths[row] = len(text) + 1
        tokens[row, : lengths[row]] = [*text, EOS]
    places = np.arange(tokens.shape[1])
    return {"tokens": tokens, "mask": (places >= 2) & (places < lengths[:, None]), "lengths": lengths}


def sentiment_reward(
    task: dict[str, Any], tokens: Int[Array, "L"], length: Int[Array, ""], *, most: int = 5
) -> Float[Array, ""]:
    """Good words less bad ones, over `most`; between -1 and 1."""
    inside = jnp.arange(tokens.shape[0]) < length

    def count(name: str) -> Int[Array, ""]:
        return jnp.sum(inside & (tokens >= FIRST[name]) & (tokens < _ENDS[name]))

    return jnp.clip((count("good") - count("bad")) / most, -1.0, 1.0)


def _draw_words(rng: np.random.Generator, name: str, shape: int | tuple[int, ...]) -> Int[np.ndarray, "..."]:
    """Words of a class, the first of them most often, as words are."""
    weights = 1 / np.arange(1, CLASSES[name] + 1)
    return (FIRST[name] + rng.choice(CLASSES[name], size=shape, p=weights / weights.sum())).astype(np.int32)
