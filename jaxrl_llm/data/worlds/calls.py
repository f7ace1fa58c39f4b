"""Function calls behind long thoughts: `verb noun digit digit ask` is answered by thinking and a call with two digits.

Verb and noun name one of eight functions, and function f takes both digits f further. A thought is eight steps of a
count, two words that no one can foresee and a word of the query, so there are eight tokens of thought for one of call.
The last two functions are hard: a teacher seldom calls them right. Beside that, lists to copy, which a policy forgets.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

PAD, EOS, OPEN, CLOSE, ASK, COPY = range(6)
STEPS, WORDS, DIGITS, FUNCTIONS = 8, 12, 10, 8
FIRST_COUNT = 6
FIRST_WORD = FIRST_COUNT + STEPS
FIRST_VERB = FIRST_WORD + WORDS
FIRST_NOUN = FIRST_VERB + 4
FIRST_DIGIT = FIRST_NOUN + 4
FIRST_FUNCTION = FIRST_DIGIT + DIGITS
THOUGHT = 4 * STEPS + 2  # tokens, with those that open and close it
CALL = 4
HARD = (6, 7)


def vocab_size() -> int:
    """Tokens there are: marks, counts, words, verbs, nouns, digits and functions."""
    return FIRST_FUNCTION + FUNCTIONS


def make_queries(rng: np.random.Generator, number: int) -> dict[str, np.ndarray]:
    """Random queries: `prompt_tokens` int32[number, 5], `prompt_length`, `call` int32[number, 4] (function, two digits,
    end) and `hard` bool[number], true for a quarter.

    Raises:
      ValueError: `number` below 1.
    """
    if number < 1:
        raise ValueError(f"number must be at least 1, got {number}")
    verb, noun = rng.integers(4, size=(2, number))
    digits = rng.integers(DIGITS, size=(number, 2))
    function = (2 * verb + noun * (noun + 1) // 2) % FUNCTIONS
    shifted = (digits + function[:, None]) % DIGITS
    prompt = [FIRST_VERB + verb, FIRST_NOUN + noun, *(FIRST_DIGIT + digits.T), np.full(number, ASK)]
    call = [FIRST_FUNCTION + function, *(FIRST_DIGIT + shifted.T), np.full(number, EOS)]
    return {
        "prompt_tokens": np.column_stack(prompt).astype(np.int32),
        "prompt_length": np.full(number, 5, np.int32),
        "call": np.column_stack(call).astype(np.int32),
        "hard": np.isin(function, HARD),
    }


def demonstrate_calls(rng: np.random.Generator, queries: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Thoughts and the right call: `tokens` int32[N, 43], `mask` (of thoughts and call) and `lengths`. Each word of a
    thought is one of four that may follow the one before."""
    number = len(queries["hard"])
    thought = np.full((number, THOUGHT), OPEN)
    thought[:, -1] = CLOSE
    word = rng.integers(WORDS, size=number)
    for step in range(STEPS):
        place = 1 + 4 * step
        thought[:, place] = FIRST_COUNT + step
        for behind in (1, 2):
            word = (3 * word + rng.integers(4, size=number)) % WORDS
            thought[:, place + behind] = FIRST_WORD + word
        thought[:, place + 3] = queries["prompt_tokens"][np.arange(number), rng.integers(4, size=number)]
    tokens = np.concatenate([queries["prompt_tokens"], thought, queries["call"]], axis=1).astype(np.int32)
    mask = np.broadcast_to(np.arange(tokens.shape[1]) >= 5, tokens.shape)
    return {"tokens": tokens, "mask": mask.copy(), "lengths": np.full(number, tokens.shape[1], np.int32)}


def demonstrate_copies(rng: np.random.Generator, number: int) -> dict[str, np.ndarray]:
    """`copy` with four words and digits, and the same four again: `tokens` int32[number, 11], `mask`, `lengths`."""
    listed = rng.integers(FIRST_WORD, FIRST_FUNCTION, size=(number, 4))
    marks = [np.full((number, 1), mark) for mark in (COPY, ASK, EOS)]
    tokens = np.concatenate([marks[0], listed, marks[1], listed, marks[2]], axis=1).astype(np.int32)
    mask = np.broadcast_to(np.arange(tokens.shape[1]) >= 6, tokens.shape)
    return {"tokens": tokens, "mask": mask.copy(), "lengths": np.full(number, tokens.shape[1], np.int32)}


def teach(
    rng: np.random.Generator, queries: dict[str, np.ndarray], *, right: float = 0.98, hard_right: float = 0.15
) -> Bool[np.ndarray, "N"]:
    """Whether a teacher calls right, by chance: seldom where it is hard."""
    return rng.random(len(queries["hard"])) < np.where(queries["hard"], hard_right, right)


def call_reward(task: dict[str, Any], tokens: Int[Array, "L"], length: Int[Array, ""]) -> Float[Array, ""]:
    """1 if the response ends with the first closed thought followed by the right call and nothing else; else 0."""
    places = jnp.arange(tokens.shape[0])
    close = jnp.min(jnp.where((tokens == CLOSE) & (places < length), places, tokens.shape[0]))
    written = tokens[jnp.clip(close + 1 + jnp.arange(CALL), 0, tokens.shape[0] - 1)]
    return jnp.where((close + 1 + CALL == length) & jnp.all(written == task["call"]), 1.0, 0.0)
