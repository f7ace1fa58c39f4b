"""Ways to a number: `9 =` asks for steps such as `+ 2 - 6 .` that lead from 0 to 9 modulo 13.

There are many right answers, and each operator, as well as the end, has several spellings that mean the same.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

PAD, EQUALS = range(2)
FIRST_END, ENDS = 2, 2
FIRST_OPERATOR, OPERATORS, SPELLINGS = 4, 3, 4  # plus, minus, times, each in four spellings
FIRST_NUMBER, MODULUS = FIRST_OPERATOR + OPERATORS * SPELLINGS, 13
VOCAB_SIZE = FIRST_NUMBER + MODULUS
MOST_STEPS = 4
LONGEST = 2 * MOST_STEPS + 1


def make_expression_tasks(rng: np.random.Generator, number: int) -> dict[str, np.ndarray]:
    """Where to get to from 0: `prompt_tokens` int32[number, 2], `prompt_length` and `target`.

    Raises:
      ValueError: `number` below 1.
    """
    if number < 1:
        raise ValueError(f"number must be at least 1, got {number}")
    target = rng.integers(MODULUS, size=number).astype(np.int32)
    prompts = np.stack([FIRST_NUMBER + target, np.full(number, EQUALS, np.int32)], axis=1)
    return {"prompt_tokens": prompts, "prompt_length": np.full(number, 2, np.int32), "target": target}


def demonstrate_expressions(rng: np.random.Generator, number: int, *, wrong: float) -> dict[str, np.ndarray]:
    """Answers in turn with plus and minus: `tokens` int32[N, 11], `mask` (of the answer) and `lengths`.

    Two to four steps, all but the last by 1 to 3, the last to the target, or with the chance `wrong` by any number.
    Spellings are coin flips.
    """
    tasks = make_expression_tasks(rng, number)
    steps = rng.choice([2, 3, 4], size=number, p=[0.5, 0.3, 0.2])
    numbers = rng.integers(1, 4, size=(number, MOST_STEPS))
    signs = np.where(np.arange(MOST_STEPS) % 2, -1, 1)
    last = np.arange(MOST_STEPS) == steps[:, None] - 1
    so_far = np.where(np.arange(MOST_STEPS) < steps[:, None] - 1, signs * numbers, 0).sum(axis=1)
    needed = ((tasks["target"] - so_far)[:, None] * signs) % MODULUS
    needed = np.where(rng.random((number, 1)) < wrong, rng.integers(MODULUS, size=(number, 1)), needed)
    numbers = np.where(last, needed, numbers)
    text = np.full((number, LONGEST), PAD)
    spelled = rng.integers(SPELLINGS, size=(number, MOST_STEPS))
    text[:, 0:-1:2] = FIRST_OPERATOR + SPELLINGS * (np.arange(MOST_STEPS) % 2) + spelled
    text[:, 1::2] = FIRST_NUMBER + numbers
    places, ends = np.arange(LONGEST), FIRST_END + rng.integers(ENDS, size=(number, 1))
    text = np.where(places < 2 * steps[:, None], text, np.where(places == 2 * steps[:, None], ends, PAD))
    tokens = np.concatenate([tasks["prompt_tokens"], text], axis=1).astype(np.int32)
    lengths = (3 + 2 * steps).astype(np.int32)
    inside = np.arange(tokens.shape[1])
    return {"tokens": tokens, "mask": (inside >= 2) & (inside < lengths[:, None]), "lengths": lengths}


def collapse_spellings(tokens: Int[Array, "... L"]) -> Int[Array, "... L"]:
    """Each token as the first of those that mean the same."""
    operator = (tokens >= FIRST_OPERATOR) & (tokens < FIRST_NUMBER)
    first = tokens - (tokens - FIRST_OPERATOR) % SPELLINGS
    end = (tokens >= FIRST_END) & (tokens < FIRST_OPERATOR)
    return jnp.where(operator, first, jnp.where(end, FIRST_END, tokens))


def meaning_ids(tokens: Int[Array, "... L"], lengths: Int[Array, "..."]) -> Int[Array, "..."]:
    """The same number for answers that mean the same, and with great likelihood for no others."""
    inside = jnp.arange(tokens.shape[-1]) < lengths[..., None]
    words = jnp.where(inside, collapse_spellings(tokens) + 1, 0)
    powers = np.cumprod(np.full(tokens.shape[-1], 31, np.uint32), dtype=np.uint32)  # modulo 2^32
    return jnp.sum(words.astype(jnp.uint32) * powers, axis=-1).astype(jnp.int32)


def expression_reward(task: dict[str, Any], tokens: Int[Array, "L"], length: Int[Array, ""]) -> Float[Array, ""]:
    """1 for two to four steps that lead to the target, and an end; else 0."""
    words = collapse_spellings(tokens)
    value, valid = jnp.int32(0), (length % 2 == 1) & (length >= 5) & (length <= LONGEST)
    for step in range(min(MOST_STEPS, (tokens.shape[0] - 1) // 2)):
        operator, number = words[2 * step], words[2 * step + 1] - FIRST_NUMBER
        there = 2 * step + 1 < length
        known = (operator >= FIRST_OPERATOR) & (operator < FIRST_NUMBER)
        valid &= ~there | (known & (number >= 0))
        results = [value + number, value - number, value * number]
        chosen = jnp.stack(results)[jnp.clip((operator - FIRST_OPERATOR) // SPELLINGS, 0, OPERATORS - 1)]
        value = jnp.where(there, chosen % MODULUS, value)
    ended = words[jnp.maximum(length - 1, 0)] == FIRST_END
    return jnp.where(valid & ended & (value == task["target"]), 1.0, 0.0)
