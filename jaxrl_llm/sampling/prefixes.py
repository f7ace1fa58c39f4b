"""Partial rollouts: responses that an iteration's budget of tokens cut short go on in the next one, under newer weights
(Kimi k1.5, 2025, section 2.6.2).

    prefixes = buffer.take(rows) + [Prefix(n, prompt, len(prompt)) for n, prompt in fresh]      # new problems fill up
    tasks = resume_tasks(prefixes, problems, width=max_length - 1)
    sampled = rollout(model, params, ResumedEnv(env), tasks, key, max_turn_tokens=budget, ...)
    sampled = dataclasses.replace(sampled, prompt_lengths=tasks["prompt_length"])
    unfinished = buffer.put_unfinished(sampled, [prefix.prompt_id for prefix in prefixes], end_tokens=[eos])
    mask = sampled.mask & ~unfinished[:, None]

What earlier iterations wrote is not in the rollout's mask, so no loss touches it; the reward sees the whole response.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxrl_llm.types import Rollout


class Prefix(NamedTuple):
    """A prompt and the beginning of its response: the sampler goes on behind the last token, and only what it adds is
    of the present policy."""

    prompt_id: int
    tokens: Sequence[int] | Int[np.ndarray, "L"]
    prompt_length: int


class PartialRolloutBuffer:
    """Responses that wait to go on, the oldest first. A `train.HostState`: it is saved with a run's checkpoints."""

    def __init__(self) -> None:
        self._waiting: deque[Prefix] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, prompt_id: int, tokens: Sequence[int] | Int[np.ndarray, "L"], prompt_length: int) -> None:
        """Keeps a response that has begun behind the first `prompt_length` tokens.

        Raises:
          ValueError: the prompt is empty, or longer than the tokens.
        """
        if not 0 < prompt_length <= len(tokens):
            raise ValueError(f"prompt_length={prompt_length} must be 1 to {len(tokens)}, the number of tokens")
        self._waiting.append(Prefix(int(prompt_id), np.asarray(tokens, np.int32), int(prompt_length)))

    def put_unfinished(
        self, rollout: Rollout, prompt_ids: Sequence[int], *, end_tokens: Sequence[int]
    ) -> Bool[np.ndarray, "B"]:
        """Keeps the rows that do not end with one of `end_tokens` and have room left; says which these are."""
        tokens, lengths, prompt_lengths = jax.device_get((rollout.tokens, rollout.lengths, rollout.prompt_lengths))
        last = tokens[np.arange(len(tokens)), lengths - 1]
        unfinished = ~np.isin(last, end_tokens) & (lengths < tokens.shape[1])
        for row in np.flatnonzero(unfinished).tolist():
            self.put(prompt_ids[row], tokens[row, : lengths[row]], prompt_lengths[row])
        return unfinished

    def take(self, number: int) -> list[Prefix]:
        """Removes the `number` oldest, or as many as there are."""
        return [self._waiting.popleft() for _ in range(min(number, len(self._waiting)))]

    def get_state(self) -> list[Any]:
        """For a checkpoint."""
        return [list(prefix) for prefix in self._waiting]

    def set_state(self, state: Sequence[Sequence[Any]]) -> None:
        """From a checkpoint."""
        self._waiting = deque(Prefix(*fields) for fields in state)


def resume_tasks(prefixes: Sequence[Prefix], tasks: PyTree, *, width: int) -> dict[str, Any]:
    """Tasks of a `ResumedEnv`: for each prefix the task of its `prompt_id`, and its tokens, padded to `width`.

    Raises:
      ValueError: there is no prefix, or one is longer than `width`.
    """
    lengths = [len(prefix.tokens) for prefix in prefixes]
    if not lengths or max(lengths) > width:
        raise ValueError(f"prefixes of {lengths} tokens: there must be at least one, and none above width={width}")
    tokens = np.zeros((len(prefixes), width), np.int32)
    for row, prefix in enumerate(prefixes):
        tokens[row, : lengths[row]] = prefix.tokens
    chosen = np.array([prefix.prompt_id for prefix in prefixes])
    return {
        "task": jax.tree.map(lambda leaf: jnp.asarray(leaf)[chosen], tasks),
        "tokens": jnp.asarray(tokens),
        "length": jnp.array(lengths, jnp.int32),
        "prompt_length": jnp.array([prefix.prompt_length for prefix in prefixes], jnp.int32),
    }


@dataclasses.dataclass(frozen=True)
class ResumedEnv:
    """A device environment whose episodes begin inside their first turn, with tasks from `resume_tasks`. The
    environment inside gets the first turn as a whole, what stood in the prefix included."""

    env: Any

    def reset(self, key: Key[Array, ""], task: dict[str, Any]) -> tuple[PyTree, Int[Array, "M"], Int[Array, ""]]:
        """The inner environment's state, with the prefix, which is the prompt here."""
        state, _, _ = self.env.reset(key, task["task"])
        earlier = task["length"] - task["prompt_length"]
        begun = jnp.roll(task["tokens"], -task["prompt_length"])
        return (state, begun, earlier), task["tokens"], task["length"]

    def step(
        self, state: PyTree, turn_tokens: Int[Array, "L"], length: Int[Array, ""]
    ) -> tuple[PyTree, Int[Array, "O"], Int[Array, ""], Float[Array, ""], Bool[Array, ""]]:
        """What the inner environment answers to the turn."""
        inner, begun, earlier = state
        places = jnp.arange(begun.shape[0] + turn_tokens.shape[0])
        new = turn_tokens.at[places - earlier].get(mode="fill", fill_value=0)
        turn = jnp.where(places < earlier, begun[jnp.minimum(places, begun.shape[0] - 1)], new)
        inner, *answer = self.env.step(inner, turn, earlier + length)
        return (inner, begun, jnp.zeros_like(earlier)), *answer
