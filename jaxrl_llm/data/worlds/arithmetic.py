"""Sums modulo a number, in a vocabulary of a few tokens: `3 + 5 + 9 =`, and somewhere in the response `answer 7`.

What comes before the answer is up to the policy: nothing, the partial sums (which make a long sum easy), or waiting
tokens (which make it long and nothing else). The answer may also come first and the waiting after it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

PAD, EOS, PLUS, EQUALS, ANSWER, WAIT = range(6)
FIRST_NUMBER = 6


def vocabulary(modulus: int) -> list[str]:
    """The token of each id, to read what a policy wrote."""
    return ["<pad>", "<eos>", "+", "=", "answer", "wait", *map(str, range(modulus))]


def make_sums(
    rng: np.random.Generator, number: int, *, terms: tuple[int, ...] = (2,), modulus: int = 10
) -> dict[str, np.ndarray]:
    """Random problems: `prompt_tokens` int32[number, 2 * max(terms)], `prompt_length`, `answer` and `terms`
    int32[number]. Each problem has one of the given numbers of terms, equally often.

    Raises:
      ValueError: `number` below 1, a number of terms below 2, or a modulus below 2.
    """
    if number < 1 or modulus < 2 or not terms or min(terms) < 2:
        raise ValueError(
            f"number={number} must be at least 1, modulus={modulus} at least 2, and every one of terms={terms} at "
            "least 2: a sum has two terms"
        )
    count = rng.permutation(np.resize(np.asarray(terms, np.int32), number))
    terms_of = rng.integers(modulus, size=(number, max(terms)))
    used = np.arange(max(terms)) < count[:, None]
    prompt = np.full((number, 2 * max(terms)), PAD, np.int32)
    prompt[:, 0::2] = np.where(used, FIRST_NUMBER + terms_of, PAD)
    prompt[:, 1::2] = np.where(used, PLUS, PAD)
    prompt[np.arange(number), 2 * count - 1] = EQUALS
    return {
        "prompt_tokens": prompt,
        "prompt_length": np.multiply(count, 2, dtype=np.int32),
        "answer": np.sum(terms_of * used, axis=1, dtype=np.int32) % modulus,
        "terms": count,
    }


def demonstrate_sums(
    rng: np.random.Generator,
    sums: dict[str, np.ndarray],
    *,
    modulus: int = 10,
    write_steps: float = 0.0,
    wrong: float = 0.0,
    waits: float = 0.0,
    wait_first: bool = True,
    endless: float = 0.0,
) -> dict[str, np.ndarray]:
    """Responses of a demonstrator who errs: `tokens` int32[N, L], `mask` bool[N, L] (of the response) and `lengths`.

    Args:
      write_steps: how many of the demonstrations write the partial sums; the others answer at once.
      wrong: chance that a number that is written (a partial sum, or the answer) is a random one. An error in a partial
        sum is carried on.
      waits: mean of the geometric number of waiting tokens, before the answer (`wait_first`) or behind it.
      endless: how many of the demonstrations wait behind the answer and never end.
    """
    number, width = sums["prompt_tokens"].shape
    length = width + max(sums["terms"]) + 3 + (int(8 * waits) + 1 if waits else 12 * (endless > 0))
    tokens, lengths = np.full((number, length), PAD, np.int32), np.zeros(number, np.int32)
    mask = np.zeros((number, length), bool)
    for row in range(number):
        size, terms = sums["prompt_length"][row], sums["terms"][row]
        values = sums["prompt_tokens"][row, 0 : 2 * terms : 2] - FIRST_NUMBER
        shown = range(2, terms) if rng.random() < write_steps else ()
        total, steps = values[0], []
        for term in range(1, terms):
            total = (total + values[term]) % modulus
            if (term + 1 in shown or term + 1 == terms) and rng.random() < wrong:
                total = rng.integers(modulus)
            if term + 1 in shown:
                steps.append(FIRST_NUMBER + total)
        waiting = [WAIT] * min(int(rng.geometric(1 / (1 + waits))) - 1, length - width - max(sums["terms"]) - 3)
        answer = [ANSWER, FIRST_NUMBER + total]
        response = [*waiting, *steps, *answer, EOS] if wait_first else [*steps, *answer, *waiting, EOS]
        if rng.random() < endless:
            response = [*steps, *answer, *[WAIT] * (length - size - len(steps) - 2)]
        lengths[row] = size + len(response)
        tokens[row, : lengths[row]] = [*sums["prompt_tokens"][row, :size], *response]
        mask[row, size : lengths[row]] = True
    return {"tokens": tokens, "mask": mask, "lengths": lengths}


def read_answer(tokens: Int[Array, "L"], length: Int[Array, ""]) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """The token behind the last `answer`, and whether there is one and the response came to its end."""
    place = jnp.arange(tokens.shape[0])
    marks = (tokens == ANSWER) & (place + 1 < length)
    last = jnp.max(jnp.where(marks, place, -1))
    ended = (length > 0) & (tokens[jnp.maximum(length - 1, 0)] == EOS)
    return tokens[jnp.minimum(last + 1, tokens.shape[0] - 1)], (last >= 0) & ended


def sum_reward(task: dict[str, Any], tokens: Int[Array, "L"], length: Int[Array, ""]) -> Float[Array, ""]:
    """1 if the response ends, and its last answer is the sum; else 0."""
    answer, given = read_answer(tokens, length)
    return jnp.where(given & (answer == FIRST_NUMBER + task["answer"]), 1.0, 0.0)


def as_tasks(sums: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The problems as tasks of a `SingleTurnEnv`."""
    return jax.tree.map(jnp.asarray, sums)
