"""Episodes against environments in Python: the device decodes on while their calls run.

An episode is played by one role or several, each a policy with a context of its own. Between decode steps the host

    takes new episodes in; a group's prompt is computed once
    hands the turns that have ended to the environment, each call in the background
    gives the answers that have come back to whoever speaks next
    and only waits where every row waits
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple

import jax

from jaxrl_llm.models.decoder import Model
from jaxrl_llm.models.tokenizer import Tokenizer
from jaxrl_llm.sampling.calls import CallLimits, Outcome, Start, caller
from jaxrl_llm.sampling.constraints import Constraint
from jaxrl_llm.sampling.rows import Row, rows_to_rollout
from jaxrl_llm.sampling.session import Session
from jaxrl_llm.sampling.slots import check_prompts, check_sizes, check_stops
from jaxrl_llm.types import Decoding, Params, Rollout

Stopped = Literal["turns", "tokens", "calls", "seconds"]


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


@dataclasses.dataclass(eq=False)
class _Play:
    """An episode under way."""

    number: int
    group: int
    task: Any
    state: Any
    speaker: str
    report: Episode = dataclasses.field(default_factory=Episode)
    contexts: dict[str, Row] = dataclasses.field(default_factory=dict)  # the open one of each role
    owed: dict[str, float] = dataclasses.field(default_factory=dict)  # for turns that were not answered yet
    pieces: list[tuple[str, Row]] = dataclasses.field(default_factory=list)
    turns: int = 0
    started: float | None = None  # when its first token was drawn


class Stage:
    """Where episodes are played: a session for each policy, and the calls under way.

    Args:
      roles: by name.
      reset, step: `reset(task)` and `step(state, role, text)` of the environment, plain or async.
      read_start, read_answer: `(what reset returned) -> (state, first move)` and `(what step returned, task, role, its
        row) -> Answer`. They raise ValueError for what is no answer.
      key, rules, decoding, num_slots, in_flight, steps: as in `host_rollout`.
      session_options: further arguments of `Session`.
    """

    def __init__(
        self,
        roles: Mapping[str, Role],
        reset: Callable[..., Any],
        step: Callable[..., Any],
        read_start: Callable[[Any], tuple[Any, Move]],
        read_answer: Callable[[Any, Any, str, Row], Answer],
        key: jax.Array,
        *,
        rules: Rules,
        decoding: Decoding,
        num_slots: int,
        in_flight: int | None,
        steps: int,
        session_options: Mapping[str, Any],
    ) -> None:
        in_flight = 2 * num_slots if in_flight is None else in_flight
        check_sizes(num_slots=num_slots, in_flight=in_flight, steps=steps)
        self.roles, self.reset, self.step = roles, reset, step
        self.read_start, self.read_answer = read_start, read_answer
        self.rules, self.decoding, self.in_flight, self.steps = rules, decoding, in_flight, steps
        _, key = jax.random.split(key)  # as in `rollout`, where the first half is the environment's
        self.sessions: dict[str, Session] = {}
        shared: dict[Any, Session] = {}
        for name, role in roles.items():
            stops = check_stops(role.stop_sequences)
            like = (id(role.model), id(role.params), id(role.constraint), role.max_turn_tokens, stops)
            if like not in shared:  # roles of one policy are decoded side by side
                shared[like] = Session(
                    role.model, key, max_length=rules.max_length, max_turn_tokens=role.max_turn_tokens,
                    stop_sequences=stops, decoding=decoding, constraint=role.constraint, num_slots=num_slots,
                    **{"num_rows": in_flight, **session_options},
                )  # fmt: skip
            self.sessions[name] = shared[like]
        self.plays: list[_Play] = []
        self.owners: dict[Row, _Play] = {}
        self.calls: dict[_Play, Future[Outcome]] = {}
        self.prompts: dict[int, Row] = {}  # a row of each group, whose prompt the others share

    def play(self, tasks: Sequence[Any], group_size: int) -> tuple[Rollout, list[Episode]]:
        """Plays `group_size` episodes of every task, to the end of all of them."""
        check_sizes(num_tasks=len(tasks), group_size=group_size)
        with caller(self.rules.call_limits) as begin_call:
            waiting = self._reset(tasks, group_size, begin_call)
            self.plays, under_way = [play for play, _ in waiting], 0
            while True:
                under_way += self._take_in(waiting, self.in_flight - under_way, group_size)
                self._decode(begin_call)
                idle = all(session.idle for session in self.sessions.values())
                if idle and not self.calls and not waiting:
                    return self._rollout(), [play.report for play in self.plays]
                for play, outcome in self._collect(wait=idle):
                    under_way -= self._respond(play, outcome)

    def _reset(
        self, tasks: Sequence[Any], group_size: int, begin_call: Start
    ) -> collections.deque[tuple[_Play, list[int]]]:
        """All episodes, none of them begun, with the prompts of their first moves."""
        waiting: collections.deque[tuple[_Play, list[int]]] = collections.deque()
        outcomes = [future.result() for future in [begin_call(self.reset, task) for task in tasks]]
        for index, outcome in enumerate(outcomes):
            if outcome.error is not None:
                raise RuntimeError(
                    f"env.reset failed for task {index} after {outcome.attempts} attempts: {outcome.error}"
                )
            state, move = self.read_start(outcome.value)
            prompt = self._encode(move)
            check_prompts(len(prompt), self.rules.max_length)
            for number in range(index * group_size, (index + 1) * group_size):
                waiting.append((_Play(number, index, tasks[index], state, move.role), prompt))
        return waiting

    def _encode(self, move: Move) -> list[int]:
        if move.role not in self.roles:
            raise ValueError(f"the environment named role {move.role!r}; there are {', '.join(self.roles)}")
        return self.roles[move.role].tokenizer.encode(move.text)

    def _take_in(self, waiting: collections.deque[tuple[_Play, list[int]]], room: int, group_size: int) -> int:
        """Begins up to `room` more episodes, and says how many."""
        chosen = [waiting.popleft() for _ in range(min(room, len(waiting)))]
        first: dict[str, list[Row]] = {}
        others = []
        for play, prompt in chosen:
            if play.group in self.prompts:
                others.append((play, prompt))
            else:
                self.prompts[play.group] = self._begin(play, play.speaker, prompt)
                first.setdefault(play.speaker, []).append(self.prompts[play.group])
        for name, rows in first.items():
            if group_size > 1:
                self.sessions[name].prefill(self._policy(name)[0], rows)
        for play, prompt in others:
            self._begin(play, play.speaker, prompt, share=self.prompts[play.group])
        return len(chosen)

    def _begin(self, play: _Play, role: str, prompt: list[int], share: Row | None = None) -> Row:
        """A new context for a role."""
        if not prompt:
            raise ValueError(
                f"role {role!r} was given a prompt without tokens: the first has nothing to be sampled from"
            )
        # no number twice: one for each piece of each episode
        number = play.number + len(play.pieces) * len(self.plays)
        row = self.sessions[role].add(prompt, number=number, share=share, group=play.group)
        play.contexts[role], play.speaker, self.owners[row] = row, role, play
        play.pieces.append((role, row))
        return row

    def _policy(self, role: str) -> tuple[Params, int]:
        params = self.roles[role].params
        return params() if callable(params) else (params, 0)

    def _decode(self, begin_call: Start) -> None:
        """Some decode steps for every policy, and a call for every turn that has ended."""
        began = time.monotonic()
        ended: list[Row] = []
        for session, role in {session: role for role, session in self.sessions.items()}.items():
            if not session.idle:
                params, version = self._policy(role)
                ended += session.advance(params, version=version, steps=self.steps)
        for row in ended:
            play = self.owners[row]
            text = self.roles[play.speaker].tokenizer.decode(row.turn_tokens)
            self.calls[play] = begin_call(self.step, play.state, play.speaker, text)
        if self.rules.max_seconds is not None:
            for row, play in self.owners.items():
                if play.started is None and row.known > row.prompt_length:
                    play.started = began

    def _collect(self, *, wait: bool) -> list[tuple[_Play, Outcome | None]]:
        """Takes out the calls that have come back; None for those whose episode has run out of time. With `wait`, not
        before there is one."""
        deadlines = {play: (play.started or 0) + (self.rules.max_seconds or math.inf) for play in self.calls}
        if wait and self.calls:
            remaining = min(deadlines.values()) - time.monotonic()
            concurrent.futures.wait(
                self.calls.values(),
                timeout=None if math.isinf(remaining) else max(remaining, 0),
                return_when=concurrent.futures.FIRST_COMPLETED,
            )
        now = time.monotonic()
        found: list[tuple[_Play, Outcome | None]] = []
        for play, future in list(self.calls.items()):
            if future.done():
                found.append((play, future.result()))
            elif now >= deadlines[play]:
                future.cancel()
                found.append((play, None))
            else:
                continue
            del self.calls[play]
        return found

    def _respond(self, play: _Play, outcome: Outcome | None) -> bool:
        """Gives an episode the answer to its turn, and says whether that was its end."""
        play.turns += 1
        if outcome is None:
            return self._end(play, "seconds")
        report = play.report
        report.calls += outcome.attempts
        if outcome.error is not None:
            report.errors.append(outcome.error)
            answer = Answer(play.state, Move(play.speaker, self.rules.render_error(outcome.error)), {}, False)
        else:
            answer = self.read_answer(outcome.value, play.task, play.speaker, play.contexts[play.speaker])
        play.state = answer.state
        for role, reward in answer.rewards.items():
            if role not in play.contexts:
                raise ValueError(f"the environment paid role {role!r}, which has not spoken; have: {[*play.contexts]}")
            play.owed[role] = play.owed.get(role, 0.0) + float(reward)
        if answer.done:
            return self._end(play, None)
        if self.rules.max_calls is not None and report.calls >= self.rules.max_calls:
            return self._end(play, "calls")
        if play.turns >= self.rules.max_turns:
            return self._end(play, "turns")
        return self._move(play, answer.move)

    def _move(self, play: _Play, move: Move) -> bool:
        """Lets the next role read what it is given; whether that ended the episode, as there is no room for it."""
        tokens, row = self._encode(move), play.contexts.get(move.role)
        session = self.sessions[move.role]
        if row is not None and not move.fresh:
            tokens, cut = _without_middle(tokens, self.rules.max_observation)
            play.report.cut_tokens += cut
            if len(tokens) >= session.room(row):
                return self._end(play, "tokens")
            session.observe(row, tokens, play.owed.pop(move.role, 0.0))
            play.speaker = move.role
            return False
        if len(tokens) >= self.rules.max_length:
            return self._end(play, "tokens")
        if row is not None:
            session.finish(row, play.owed.pop(move.role, 0.0))
        self._begin(play, move.role, tokens, share=row)
        return False

    def _end(self, play: _Play, stopped: Stopped | None) -> bool:
        play.report.stopped = stopped
        for role, row in play.contexts.items():
            self.sessions[role].finish(row, play.owed.get(role, 0.0), truncated=stopped is not None)
        return True

    def _rollout(self) -> Rollout:
        """All rows, those of an episode one after another in the order in which they began."""
        pieces = [(play, piece, *entry) for play in self.plays for piece, entry in enumerate(play.pieces)]
        plays, places, roles, rows = zip(*pieces, strict=True)
        return rows_to_rollout(
            rows,
            decoding=self.decoding,
            group_ids=[play.group for play in plays],
            num_turns=self.rules.max_turns,
            constrained=any(role.constraint is not None for role in self.roles.values()),
            rollout_ids=[play.number for play in plays],
            row_of_episode=places,
            agent_ids=[list(self.roles).index(role) for role in roles],
        )


def _without_middle(tokens: list[int], most: int) -> tuple[list[int], int]:
    """At most so many tokens, and how many are left out. The middle goes: a closing tag at the end means more than what
    stands before it."""
    excess = len(tokens) - most
    if excess <= 0:
        return tokens, 0
    head = most - most // 4
    return tokens[:head] + tokens[head + excess :], excess
