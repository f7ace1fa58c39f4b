"""The simplest device environment: one prompt, one response, one reward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree


@dataclasses.dataclass(frozen=True)
class SingleTurnEnv:
    """Ends after the first turn with `reward(task, tokens[L], length) -> f32[]`, NaN for "not scorable".

    A task is a dict with `prompt_tokens` int32[L0], padded on the right, `prompt_length` int32[] and whatever the
    reward needs.
    """

    reward: Callable[[PyTree, Int[Array, "L"], Int[Array, ""]], Float[Array, ""]]

    def reset(self, key: jax.Array, task: dict[str, Any]) -> tuple[PyTree, Int[Array, "L0"], Int[Array, ""]]:
        return task, task["prompt_tokens"], task["prompt_length"]

    def step(
        self, state: PyTree, turn_tokens: Int[Array, "L"], length: Int[Array, ""]
    ) -> tuple[PyTree, Int[Array, "1"], Int[Array, ""], Float[Array, ""], Bool[Array, ""]]:
        nothing = jnp.zeros(1, jnp.int32)
        return state, nothing, jnp.int32(0), self.reward(state, turn_tokens, length), jnp.bool_(True)
