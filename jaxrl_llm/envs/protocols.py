"""The kinds of environment that a sampler knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxrl_llm.sampling.moves import Move


class DeviceEnv(Protocol):
    """An environment in JAX, written for ONE episode; the sampler maps it over its slots with `vmap`, inside `jit`.

    It is a pytree, so that its arrays are arguments of a compiled function and no constants of it. Token arrays have a
    fixed size and a length; what lies behind the length means nothing. Keep `step` cheap and free of branches.
    """

    def reset(self, key: Key[Array, ""], task: PyTree[Array]) -> tuple[PyTree[Array], Int[Array, "M"], Int[Array, ""]]:
        """Starts an episode of `task`: its state, the prompt's tokens and their number."""
        ...

    def step(
        self, state: PyTree[Array], turn_tokens: Int[Array, "L"], length: Int[Array, ""]
    ) -> tuple[PyTree[Array], Int[Array, "O"], Int[Array, ""], Float[Array, ""], Bool[Array, ""]]:
        """Answers a turn of the policy.

        Returns:
          The next state, the observation's tokens and their number, the turn's reward (NaN: cannot be scored), and
          whether the episode is over.
        """
        ...


class HostEnv(Protocol):
    """An environment on strings. Its calls may be slow; they run in threads, and so must not share what they change."""

    def reset(self, task: Any) -> tuple[Any, str]:
        """Starts an episode of `task`: its state and the prompt."""
        ...

    def step(self, state: Any, turn_text: str) -> tuple[Any, str, float, bool]:
        """Answers a turn of the policy: the next state (a new one, the old one stays as it is), the observation, the
        turn's reward (NaN: cannot be scored), and whether the episode is over."""
        ...


class AgentsEnv(Protocol):
    """A `HostEnv` of several roles, one of which speaks at a time."""

    def reset(self, task: Any) -> tuple[Any, Move]:
        """Starts an episode of `task`: its state, and who speaks first with which prompt."""
        ...

    def step(self, state: Any, role: str, turn_text: str) -> tuple[Any, Move, Mapping[str, float], bool]:
        """Answers the turn of a role: the next state (a new one, the old one stays as it is), who speaks next and what
        it reads, what roles are paid for their last turn (NaN: cannot be scored), and whether the episode is over, when
        the move means nothing."""
        ...
