"""Multi-agent rollouts: several roles with their own parameters and prompts in one episode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxrl_llm.sampling.calls import CallLimits
from jaxrl_llm.sampling.episodes import Stage
from jaxrl_llm.sampling.host import CALL_LIMITS, RENDER_ERROR, RenderError
from jaxrl_llm.sampling.moves import Answer, Episode, Move, Role, Rules
from jaxrl_llm.sampling.rows import Row
from jaxrl_llm.types import Decoding, Rollout


def agents_rollout(
    roles: Mapping[str, Role],
    env: Any,
    tasks: Sequence[Any],
    key: jax.Array,
    *,
    max_length: int,
    max_turns: int,
    decoding: Decoding = Decoding(),
    group_size: int = 1,
    num_slots: int = 64,
    in_flight: int | None = None,
    steps: int = 8,
    call_limits: CallLimits = CALL_LIMITS,
    max_observation: int = 512,
    max_calls: int | None = None,
    max_seconds: float | None = None,
    render_error: RenderError = RENDER_ERROR,
    session_options: Mapping[str, Any] | None = None,
) -> tuple[Rollout, list[Episode]]:
    """Plays `group_size` episodes of every task between several roles, one of which speaks at a time.

    Each role reads and writes contexts of its own, and each context becomes a row. Roles of one policy (the same model,
    parameters and limits) are decoded side by side.

    Args:
      roles: by name, in the order that `agent_ids` count them.
      env: an `envs.AgentsEnv`: `reset(task) -> (state, Move)` and `step(state, role, turn_text) -> (state, Move,
        rewards, done)`, plain or async. Rewards are a mapping from roles to what they are paid for their last turn.
      max_turns: of all roles of an episode together. The other arguments are those of `host_rollout`.

    Returns:
      The rollout, with the rows of an episode one after another in the order in which they began: `rollout_ids` is the
      episode, `row_of_episode` the row's number in it, `agent_ids` its role; and an `Episode` for each episode. Train a
      role on its rows with the policy that wrote them.

    Raises:
      ValueError: no roles, as `host_rollout`, or a role that is named or paid and not there.
      RuntimeError: `env.reset` failed for a task.
    """
    if not roles:
        raise ValueError("agents_rollout needs at least one role, got none")

    def read_start(value: Any) -> tuple[Any, Move]:
        if not isinstance(value, tuple) or len(value) != 2 or not isinstance(value[1], Move):
            raise ValueError(f"env.reset must return (state, Move), got {value!r:.200}")
        return value

    def read_answer(value: Any, task: Any, role: str, row: Row) -> Answer:
        fits = isinstance(value, tuple) and len(value) == 4
        if not fits or not isinstance(value[1], Move) or not isinstance(value[2], Mapping):
            raise ValueError(f"env.step must return (state, Move, rewards by role, done), got {value!r:.200}")
        return Answer(*value)

    rules = Rules(max_length, max_turns, max_observation, max_calls, max_seconds, call_limits, render_error)
    stage = Stage(
        roles, env.reset, env.step, read_start, read_answer, key, rules=rules, decoding=decoding, num_slots=num_slots,
        in_flight=in_flight, steps=steps, session_options=session_options or {},
    )  # fmt: skip
    return stage.play(tasks, group_size)
