"""Sums with a calculator: a turn `3 + 5 =` is answered with `8`; a turn with `answer 7` and an end is the last.

Problems and tokens are those of `arithmetic`. The calculator adds two numbers at a time, so a sum of n terms takes
n - 1 calls; in one's head it takes none, and is hard where there are many terms.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.data.worlds.arithmetic import ANSWER, EOS, EQUALS, FIRST_NUMBER, PAD, PLUS, WAIT, sum_reward

STOP_SEQUENCES = [[EQUALS], [EOS]]
CALL_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class CalculatorEnv:
    """A `DeviceEnv` whose tasks are those of `arithmetic.as_tasks`; `wait` is the answer to a turn that is no call."""

    modulus: int

    def reset(self, key: jax.Array, task: dict[str, Any]) -> tuple[dict[str, Any], Int[Array, "L0"], Int[Array, ""]]:
        """The problem; `key` is not used."""
        return task, task["prompt_tokens"], task["prompt_length"]

    def step(
        self, state: dict[str, Any], turn_tokens: Int[Array, "L"], length: Int[Array, ""]
    ) -> tuple[dict[str, Any], Int[Array, "1"], Int[Array, ""], Float[Array, ""], Bool[Array, ""]]:
        """The calculator's answer, or the end: reward 1 for the right answer, else 0."""
        places = jnp.maximum(length - CALL_TOKENS, 0) + jnp.arange(CALL_TOKENS)
        x, plus, y, equals = turn_tokens.at[places].get(mode="fill", fill_value=PAD)
        call = (length >= CALL_TOKENS) & (plus == PLUS) & (equals == EQUALS) & (x >= FIRST_NUMBER) & (y >= FIRST_NUMBER)
        result = FIRST_NUMBER + (x + y - 2 * FIRST_NUMBER) % self.modulus
        over = (length > 0) & (turn_tokens[jnp.maximum(length - 1, 0)] == EOS)
        observation = jnp.where(call, result, WAIT)[None]
        return state, observation, jnp.int32(1), sum_reward(state, turn_tokens, length), over


def demonstrate_calls(
    rng: np.random.Generator,
    sums: dict[str, np.ndarray],
    *,
    modulus: int,
    use_tool: float = 0.5,
    wrong: float = 0.0,
    max_calls: int = 4,
) -> dict[str, np.ndarray]:
    """Episodes of a demonstrator who errs: `tokens` int32[N, L], `mask` bool[N, L] (of the turns) and `lengths`.

    Args:
      use_tool: how many of the sums are worked out with the calculator; the others are answered from the head.
      wrong: chance that a number that is written (in a call, or as the answer) is a random one.
      max_calls: sums that need more are answered from the head.
    """
    number, width = sums["prompt_tokens"].shape
    longest = width + (CALL_TOKENS + 1) * max_calls + 3
    tokens, mask = np.full((number, longest), PAD, np.int32), np.zeros((number, longest), bool)
    lengths = np.zeros(number, np.int32)

    def slip(value: int) -> int:
        return FIRST_NUMBER + int(rng.integers(modulus) if rng.random() < wrong else value % modulus)

    for row in range(number):
        size, terms = int(sums["prompt_length"][row]), int(sums["terms"][row])
        values = (sums["prompt_tokens"][row, 0 : 2 * terms : 2] - FIRST_NUMBER).tolist()
        total, written, by_policy = values[0], [], []
        if terms - 1 <= max_calls and rng.random() < use_tool:
            for value in values[1:]:
                x, y = slip(total), slip(value)
                total = (x + y - 2 * FIRST_NUMBER) % modulus
                written += [x, PLUS, y, EQUALS, FIRST_NUMBER + total]
                by_policy += [True] * CALL_TOKENS + [False]
        else:
            total = sum(values)
        written += [ANSWER, slip(total), EOS]
        by_policy += [True] * 3
        lengths[row] = size + len(written)
        tokens[row, : lengths[row]] = [*sums["prompt_tokens"][row, :size], *written]
        mask[row, size : lengths[row]] = by_policy
    return {"tokens": tokens, "mask": mask, "lengths": lengths}
