"""Multi-turn rollouts of one policy against an environment in Python, with a hook that may replace its context."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxrl_llm.models.decoder import Model
from jaxrl_llm.models.tokenizer import Tokenizer
from jaxrl_llm.sampling.calls import CallLimits
from jaxrl_llm.sampling.constraints import Constraint
from jaxrl_llm.sampling.episodes import Stage
from jaxrl_llm.sampling.moves import Answer, Episode, Grow, Move, Role, Rules
from jaxrl_llm.sampling.rows import Row
from jaxrl_llm.sampling.transcripts import token_spans
from jaxrl_llm.types import Decoding, Params, Rollout, Span

RenderError = Callable[[str], str]
CALL_LIMITS = CallLimits()
RENDER_ERROR: RenderError = "\nError: {}\n".format
POLICY = "policy"  # the name of the one role


@dataclasses.dataclass(frozen=True)
class Context:
    """What `edit_context` sees, once the environment has answered a turn and the episode goes on.

    Attributes:
      task, state: of the environment, the state behind the turn.
      observation: what the policy is about to read.
      row: its tokens so far; `tokens` is their number, and `spans` says who wrote what.
    """

    task: Any
    state: Any
    observation: str
    row: Row
    tokenizer: Tokenizer

    @property
    def tokens(self) -> int:
        return self.row.known

    @functools.cached_property
    def spans(self) -> list[Span]:
        row = self.row
        known = slice(row.known)
        return token_spans(row.tokens[known], row.mask[known], row.turn_ids[known], row.prompt_length, self.tokenizer)


class NewContext(NamedTuple):
    """From `edit_context`: the policy goes on from this text alone."""

    prompt: str


EditContext = Callable[[Context], str | NewContext | None]


def host_rollout(
    model: Model,
    params: Params | Callable[[], tuple[Params, int]],
    env: Any,
    tasks: Sequence[Any],
    key: jax.Array,
    *,
    tokenizer: Tokenizer,
    max_length: int,
    max_turns: int,
    max_turn_tokens: int,
    stop_sequences: Sequence[Sequence[int]] = (),
    decoding: Decoding = Decoding(),
    constraint: Constraint | None = None,
    group_size: int = 1,
    num_slots: int = 64,
    in_flight: int | None = None,
    steps: int = 8,
    call_limits: CallLimits = CALL_LIMITS,
    max_observation: int = 512,
    max_calls: int | None = None,
    max_seconds: float | None = None,
    render_error: RenderError = RENDER_ERROR,
    edit_context: EditContext | None = None,
    grow: Grow | None = None,
    session_options: Mapping[str, Any] | None = None,
) -> tuple[Rollout, list[Episode]]:
    """Plays `group_size` episodes of every task, as `rollout` does, against an environment on strings.

    The tokens are those that `rollout` samples with the same key against a device environment with the same answers.
    What the policy said is never encoded again, and an observation is encoded once: the loss sees the ids that were
    sampled and the ids that were forced. Every episode is returned; one that a limit ended is marked.

    Args:
      model: the policy.
      params: its parameters, or a function `() -> (params, version)` that is asked before each few decode steps:
        weights may change in flight. Each token has the version it was drawn under in `Rollout.versions`; keys and
        values that are in the cache stay those of the older weights. `ops.importance_weights` corrects for the rest.
      env: `reset(task) -> (state, prompt)` and `step(state, turn_text) -> (state, observation, reward, done)`, plain
        (then called from several threads at a time) or async. See `envs.HostEnv`.
      tasks: one per prompt.
      key: consumed.
      tokenizer: of the policy, for prompts, turns and observations.
      max_length, max_turns, max_turn_tokens, stop_sequences, decoding, constraint, group_size: as in `rollout`.
      num_slots: rows decoded side by side.
      in_flight: episodes under way, by default twice as many as slots: those that wait for a call need no slot, but
        they hold pages of the cache. The slower the calls, the more.
      steps: decode steps between two looks at the calls. Fewer answer sooner, more cost less.
      call_limits: time-outs, retries and how many calls run at a time. A call that fails for good becomes an
        observation of `render_error(message)` with reward 0, and its episode goes on in the state it was in.
      max_observation: tokens of an observation; of a longer one the middle is left out.
      max_calls: attempts per episode, retries included. The episode ends with the call that reaches them.
      max_seconds: wall-clock time per episode, from its first token. It ends an episode that waits, not one that
        decodes.
      render_error: the text that the policy sees.
      edit_context: called between turns. None goes on; a text replaces the observation; a `NewContext` ends the row and
        begins another with that prompt. The rows of an episode share `rollout_ids` and are numbered by
        `row_of_episode`.
      grow: once all episodes are over, called with the rows of each task. It says where further ones branch off, and is
        called again when those are over, until it names none. `tree_rollout` has budgets and policies for this.
      session_options: further arguments of `Session`: `page_size`, `num_rows`, `num_pages`, `cache_dtype`.

    Returns:
      The rollout, a row per episode or, where contexts were replaced, several that follow each other; and an `Episode`
      for each episode, in the order of `rollout_ids`.

    Raises:
      ValueError: no tasks, a size that is not positive, prompts that leave no room in `max_length`, or an answer of the
        environment that is not (state, text, number, bool).
      RuntimeError: `env.reset` failed for a task.
    """

    def read_start(value: Any) -> tuple[Any, Move]:
        if not isinstance(value, tuple) or len(value) != 2 or not isinstance(value[1], str):
            raise ValueError(f"env.reset must return (state, prompt text), got {value!r:.200}")
        return value[0], Move(POLICY, value[1])

    def read_answer(value: Any, task: Any, role: str, row: Row) -> Answer:
        if not isinstance(value, tuple) or len(value) != 4 or not isinstance(value[1], str):
            raise ValueError(f"env.step must return (state, observation text, reward, done), got {value!r:.200}")
        state, observation, reward, done = value
        edited = None
        if edit_context is not None and not done:
            edited = edit_context(Context(task, state, observation, row, tokenizer))
        fresh = isinstance(edited, NewContext)
        text = edited.prompt if isinstance(edited, NewContext) else observation if edited is None else edited
        return Answer(state, Move(role, text, fresh), {role: reward}, bool(done))

    @functools.wraps(env.step)  # async where that is
    def step(state: Any, role: str, text: str) -> Any:
        return env.step(state, text)

    policy = Role(model, params, tokenizer, max_turn_tokens, stop_sequences, constraint)
    rules = Rules(max_length, max_turns, max_observation, max_calls, max_seconds, call_limits, render_error)
    stage = Stage(
        {POLICY: policy}, env.reset, step, read_start, read_answer, key, rules=rules, decoding=decoding,
        num_slots=num_slots, in_flight=in_flight, steps=steps, session_options=session_options or {},
    )  # fmt: skip
    return stage.play(tasks, group_size, grow)
