"""Preferred strings: each key has a best answer of six letters, and an answer is worth how much of it is right.

The reference answer errs in its last letter, so that it can be surpassed.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

PAD, EOS, EQUALS = range(3)
FIRST_LETTER = 3
LETTERS = 8
KEY_LENGTH, ANSWER_LENGTH = 4, 6


def vocab_size() -> int:
    """Tokens there are: letters and marks."""
    return FIRST_LETTER + LETTERS


def make_preferences(rng: np.random.Generator, number: int) -> dict[str, np.ndarray]:
    """Random keys: `prompt_tokens` int32[number, 5], `prompt_length`, `best` and `reference` int32[number, 7], the
    answers with their end.

    Letter i of the best answer is letter i of the key (which is gone through again after four), one further for each
    time. The reference has the letter before it in the last place.

    Raises:
      ValueError: `number` below 1.
    """
    if number < 1:
        raise ValueError(f"number must be at least 1, got {number}")
    key = rng.integers(LETTERS, size=(number, KEY_LENGTH))
    places = np.arange(ANSWER_LENGTH)
    best = (key[:, places % KEY_LENGTH] + places // KEY_LENGTH) % LETTERS
    reference = best.copy()
    reference[:, -1] = (best[:, -1] - 1) % LETTERS

    def ended(letters: np.ndarray, mark: int) -> np.ndarray:
        return np.pad(letters + FIRST_LETTER, ((0, 0), (0, 1)), constant_values=mark).astype(np.int32)

    return {
        "prompt_tokens": ended(key, EQUALS),
        "prompt_length": np.full(number, KEY_LENGTH + 1, np.int32),
        "best": ended(best, EOS),
        "reference": ended(reference, EOS),
    }


def preference_score(
    best: Int[Array, "... 7"], tokens: Int[Array, "... L"], length: Int[Array, "..."]
) -> Float[Array, "..."]:
    """How good an answer is: 1 for the best, 0.8, 0.6 and 0.4 with one, two or three letters wrong, else 0; 0 too if it
    has not six letters and an end."""
    right = jnp.sum(tokens[..., :ANSWER_LENGTH] == best[..., :ANSWER_LENGTH], axis=-1)
    whole = (length == ANSWER_LENGTH + 1) & (tokens[..., ANSWER_LENGTH] == EOS)
    return jnp.where(whole & (right >= 3), 0.2 * (right - 1), 0.0)


def preference_reward(task: dict[str, Any], tokens: Int[Array, "L"], length: Int[Array, ""]) -> Float[Array, ""]:
    """`preference_score` of a response to a task."""
    return preference_score(task["best"], tokens, length)
