"""What an episode is made of: roles, moves, answers, limits, and what is said of it in the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxrl_llm.models.decoder import Model
from jaxrl_llm.models.tokenizer import Tokenizer
from jaxrl_llm.sampling.calls import CallLimits
from jaxrl_llm.sampling.constraints import Constraint
from jaxrl_llm.sampling.rows import Row
from jaxrl_llm.sampling.slots import check_sizes
from jaxrl_llm.types import Params

Stopped = Literal["turns", "tokens", "calls", "seconds"]


def newest(params: Params | Callable[[], tuple[Params, int]]) -> tuple[Params, int]:
    """Parameters and their version: what a function gives now, or the parameters themselves as version 0."""
    return params() if callable(params) else (params, 0)


class Role(NamedTuple):
    """A policy that takes part in episodes.

    Attributes:
      model, params: of the policy. `params` may be a function `() -> (params, version)`, which is asked before each few
        decode steps, so that weights may change while episodes are played.
      tokenizer: of what it reads and writes.
      max_turn_tokens, stop_sequences: where its turns end.
      constraint: what it may write, None for everything.
    """

    model: Model
    params: Params | Callable[[], tuple[Params, int]]
    tokenizer: Tokenizer
    max_turn_tokens: int
    stop_sequences: Sequence[Sequence[int]] = ()
    constraint: Constraint | None = None


class Move(NamedTuple):
    """What an environment asks for next.

    Attributes:
      role: who speaks.
      text: what it reads: an observation behind its context, or the prompt of a context if it has none yet.
      fresh: begin a new context with `text`, whatever the role has read so far. The old one becomes a row of its own.
    """

    role: str
    text: str
    fresh: bool = False


class Answer(NamedTuple):
    """An environment's answer to a turn: its next state, the next move, what roles are paid, whether it is over."""

    state: Any
    move: Move
    rewards: Mapping[str, float]
    done: bool


@dataclasses.dataclass
class Episode:
    """What the environment's side of an episode was like.

    Attributes:
      calls: attempts, retries included.
      errors: the errors that a policy was shown, one for each call that failed for good.
      cut_tokens: tokens of observations that were left out because they were too long.
      stopped: the limit that ended the episode before the environment did: "turns", "tokens" (what was to be read left
        no room), "calls" or "seconds"; None otherwise. Rows that were open then are `truncated` in the rollout.
    """

    calls: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)
    cut_tokens: int = 0
    stopped: Stopped | None = None


@dataclasses.dataclass(frozen=True)
class Rules:
    """Where an episode ends at the latest, and how its calls are made; as in `host_rollout`."""

    max_length: int
    max_turns: int
    max_observation: int
    max_calls: int | None
    max_seconds: float | None
    call_limits: CallLimits
    render_error: Callable[[str], str]

    def __post_init__(self) -> None:
        check_sizes(max_turns=self.max_turns, max_observation=self.max_observation)
        if self.max_calls is not None and self.max_calls < 1:
            raise ValueError(f"max_calls must be at least 1 or None, got {self.max_calls}")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds must be positive or None, got {self.max_seconds}")


class Fork(NamedTuple):
    """`children` new rows that begin with the first `position` tokens of `row`."""

    row: Row
    position: int
    children: int = 1


Grow = Callable[[list[list[Row]]], Sequence[Fork]]
