"""Sums of values that only a sub-agent can look up: it sees the table, the planner sees the question.

    planner      ask a c =                    ->  a c <eos>                  what to look up, up to four keys
    sub-agent    a 3 b 7 c 5 ... look c       ->  result 5 <eos>             each by itself
    planner      ask a c = given a 3 c 5      ->  answer 8 <eos>             modulo 10
    alone        a 3 b 7 c 5 ... ask a c =    ->  3 5 answer 8 <eos>         one policy that sees everything

What comes before `result` or `answer` is free. A result that cannot be read is given to the planner as `unknown`.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

PAD, EOS, ASK, EQUALS, LOOK, RESULT, GIVEN, ANSWER, UNKNOWN = range(9)
KEYS, VALUES, MAX_CALLS, MAX_TERMS = 6, 10, 4, 3
FIRST_KEY = 9
FIRST_VALUE = FIRST_KEY + KEYS
VOCAB_SIZE = FIRST_VALUE + VALUES
TABLE_TOKENS = 2 * KEYS


def make_lookups(rng: np.random.Generator, number: int) -> dict[str, np.ndarray]:
    """Random problems: `table` int32[number, 12], `prompt_tokens` int32[number, 5] (the question) with `prompt_length`,
    and `answer` (a token). One to three different keys are asked for, equally often.

    Raises:
      ValueError: `number` below 1.
    """
    if number < 1:
        raise ValueError(f"number must be at least 1, got {number}")
    values = rng.integers(VALUES, size=(number, KEYS))
    keys = np.broadcast_to(FIRST_KEY + np.arange(KEYS), values.shape)
    asked = np.argsort(rng.random((number, KEYS)), axis=1)[:, :MAX_TERMS]
    terms = rng.integers(1, MAX_TERMS + 1, size=number)
    used = np.arange(MAX_TERMS) < terms[:, None]
    question = np.full((number, MAX_TERMS + 2), PAD, np.int32)
    question[:, 0], question[:, 1:-1] = ASK, np.where(used, FIRST_KEY + asked, PAD)
    question[np.arange(number), terms + 1] = EQUALS
    total = np.sum(np.take_along_axis(values, asked, axis=1) * used, axis=1)
    return {
        "table": np.stack([keys, FIRST_VALUE + values], axis=2).reshape(number, -1).astype(np.int32),
        "prompt_tokens": question,
        "prompt_length": (terms + 2).astype(np.int32),
        "answer": (FIRST_VALUE + total % VALUES).astype(np.int32),
    }


def read_plan(
    tokens: Int[Array, "B L"], lengths: Int[Array, "B"]
) -> tuple[Int[Array, "B C"], Int[Array, "B"], Bool[Array, "B"]]:
    """The keys to look up, their number, and whether that is a plan: one to four keys and the end, nothing else. What
    is no plan has no calls."""
    place = jnp.arange(MAX_CALLS)
    calls = tokens[:, :MAX_CALLS]
    is_key = (calls >= FIRST_KEY) & (calls < FIRST_VALUE)
    number = lengths - 1
    end = jnp.take_along_axis(tokens, jnp.maximum(number, 0)[:, None], axis=1)[:, 0]
    ok = (number >= 1) & (number <= MAX_CALLS) & (end == EOS) & jnp.all(is_key | (place >= number[:, None]), axis=1)
    return calls, jnp.where(ok, number, 0), ok


def read_value(
    tokens: Int[Array, "B L"], lengths: Int[Array, "B"], mark: int
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """The value that a response ends with, behind `mark` and before the end, and whether it does."""
    places = lengths[:, None] + jnp.arange(-3, 0)
    before, value, end = jnp.take_along_axis(tokens, jnp.maximum(places, 0), axis=1).T
    ok = (lengths >= 3) & (before == mark) & (end == EOS) & (value >= FIRST_VALUE) & (value < FIRST_VALUE + VALUES)
    return value, ok


def look_up_prompts(table: Int[Array, "B 12"], keys: Int[Array, "B"]) -> Int[Array, "B 14"]:
    """What the sub-agent is asked."""
    return jnp.concatenate([table, jnp.full((len(keys), 1), LOOK, table.dtype), keys[:, None]], axis=1)


def given_tokens(calls: Int[Array, "B C"], values: Int[Array, "B C"]) -> Int[Array, "B 2*C+1"]:
    """What the planner is told, behind its question: `given`, and each key with its value. Of d calls the first
    1 + 2 d tokens count."""
    pairs = jnp.stack([calls, values], axis=2).reshape(len(calls), -1)
    return jnp.concatenate([jnp.full((len(calls), 1), GIVEN, calls.dtype), pairs], axis=1)


def demonstrate_lookups(
    rng: np.random.Generator, problems: dict[str, np.ndarray], *, wrong: float = 0.0
) -> dict[str, np.ndarray]:
    """What each of the four would say, for each problem one of them, by turns: `tokens` int32[N, 24], `mask` bool[N,
    24] (of the response) and `lengths`. Each key and value that is said is a random one with the chance `wrong`."""
    number = len(problems["answer"])
    tokens, mask = np.full((number, 24), PAD, np.int32), np.zeros((number, 24), bool)
    lengths = np.zeros(number, np.int32)

    def slip(first: int, count: int, said: list[int]) -> list[int]:
        return [first + int(rng.integers(count)) if rng.random() < wrong else token for token in said]

    for row in range(number):
        table = problems["table"][row].tolist()
        question = problems["prompt_tokens"][row, : problems["prompt_length"][row]].tolist()
        keys = question[1:-1]
        values = [table[2 * (key - FIRST_KEY) + 1] for key in keys]

        def total(values: list[int]) -> list[int]:
            added = FIRST_VALUE + sum(value - FIRST_VALUE for value in values) % VALUES
            return [ANSWER, *slip(FIRST_VALUE, VALUES, [added]), EOS]

        said = slip(FIRST_VALUE, VALUES, values)
        pairs = [token for pair in zip(keys, values, strict=True) for token in pair]
        prompt, response = [
            (question, [*slip(FIRST_KEY, KEYS, keys), EOS]),
            ([*table, LOOK, keys[0]], [RESULT, said[0], EOS]),
            ([*question, GIVEN, *pairs], total(values)),
            ([*table, *question], [*said, *total(said)]),
        ][row % 4]
        lengths[row] = len(prompt) + len(response)
        tokens[row, : lengths[row]] = [*prompt, *response]
        mask[row, len(prompt) : lengths[row]] = True
    return {"tokens": tokens, "mask": mask, "lengths": lengths}
