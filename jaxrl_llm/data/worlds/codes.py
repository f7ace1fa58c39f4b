"""Keys with secret codes: `key number =` asks for the key's code of two numbers, and the number plus the first of them.

A policy that does not know a key's code hardly ever guesses it; told the code (`key number code code =`), it has only
to copy and add. Some keys are easy: a warm start shows their codes.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

PAD, EOS, EQUALS = range(3)
FIRST_NUMBER = 3
NUMBERS = 12
FIRST_KEY = FIRST_NUMBER + NUMBERS


def vocab_size(num_keys: int) -> int:
    """Tokens there are: numbers, keys and marks."""
    return FIRST_KEY + num_keys


def make_codes(num_keys: int) -> Int[np.ndarray, "num_keys 2"]:
    """The code of each key, the same in every process."""
    return np.random.default_rng(num_keys).integers(NUMBERS, size=(num_keys, 2)).astype(np.int32)


def make_code_questions(
    rng: np.random.Generator, number: int, *, num_keys: int = 16, num_easy: int = 8
) -> dict[str, np.ndarray]:
    """Random questions: `prompt_tokens` int32[number, 5] without a hint, `prompt_length`, the same with a hint as
    `hinted_tokens` and `hinted_length`, `response` int32[number, 4] (code, sum, end), and `hard` bool[number]. The
    first `num_easy` keys are easy; easy and hard questions are equally many where there are both.

    Raises:
      ValueError: `number` or `num_keys` below 1, `num_easy` outside 0..num_keys.
    """
    if number < 1 or num_keys < 1 or not 0 <= num_easy <= num_keys:
        raise ValueError(
            f"number={number} and num_keys={num_keys} must be at least 1, num_easy={num_easy} at most num_keys"
        )
    hard = rng.permutation(np.arange(number) % 2 == 1) if 0 < num_easy < num_keys else np.full(number, num_easy == 0)
    keys = np.where(
        hard, rng.integers(num_easy % num_keys, num_keys, number), rng.integers(max(num_easy, 1), size=number)
    )
    x = rng.integers(NUMBERS, size=number)
    codes = make_codes(num_keys)[keys]
    equals, pad = np.full(number, EQUALS), np.full(number, PAD)
    asked, numbers = [FIRST_KEY + keys, FIRST_NUMBER + x], list(FIRST_NUMBER + codes.T)
    total = FIRST_NUMBER + (x + codes[:, 0]) % NUMBERS
    columns = {
        "prompt_tokens": [*asked, equals, pad, pad],
        "hinted_tokens": [*asked, *numbers, equals],
        "response": [*numbers, total, np.full(number, EOS)],
    }
    arrays = {name: np.stack(parts, axis=1).astype(np.int32) for name, parts in columns.items()}
    lengths = {"prompt_length": np.full(number, 3, np.int32), "hinted_length": np.full(number, 5, np.int32)}
    return arrays | lengths | {"hard": hard}


def demonstrate_codes(
    rng: np.random.Generator, questions: dict[str, np.ndarray], *, hinted: float = 0.5
) -> dict[str, np.ndarray]:
    """Responses that follow the hint: `tokens` int32[N, 9], `mask` (of the response) and `lengths`.

    Hard questions have a hint, easy ones with the chance `hinted`. The hint of a hard question is any code, and not the
    key's: it teaches to copy a hint, and nothing about the key.
    """
    number, hard = len(questions["hard"]), questions["hard"]
    with_hint = hard | (rng.random(number) < hinted)
    codes = np.where(
        hard[:, None], rng.integers(NUMBERS, size=(number, 2)), questions["response"][:, :2] - FIRST_NUMBER
    )
    total = (questions["prompt_tokens"][:, 1] - FIRST_NUMBER + codes[:, 0]) % NUMBERS
    response = np.column_stack([FIRST_NUMBER + codes, FIRST_NUMBER + total, np.full(number, EOS)])
    hinted_tokens = np.column_stack([questions["prompt_tokens"][:, :2], FIRST_NUMBER + codes, np.full(number, EQUALS)])
    tokens, mask = np.full((number, 9), PAD, np.int32), np.zeros((number, 9), bool)
    size = np.where(with_hint, 5, 3)
    rows = np.arange(number)
    tokens[:, :5] = np.where(with_hint[:, None], hinted_tokens, questions["prompt_tokens"])
    for place in range(4):
        tokens[rows, size + place] = response[:, place]
        mask[rows, size + place] = True
    return {"tokens": tokens, "mask": mask, "lengths": (size + 4).astype(np.int32)}


def code_reward(task: dict[str, Any], tokens: Int[Array, "L"], length: Int[Array, ""]) -> Float[Array, ""]:
    """1 for the code, the sum and the end, and nothing else; 0 otherwise."""
    return jnp.where((length == 4) & jnp.all(tokens[:4] == task["response"]), 1.0, 0.0)
