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
from typing import Any

import jax

from jaxrl_llm.sampling.calls import Outcome, Start, caller
from jaxrl_llm.sampling.moves import Answer, Episode, Fork, Grow, Move, Role, Rules, Stopped, newest
from jaxrl_llm.sampling.rows import Row, rows_to_rollout
from jaxrl_llm.sampling.session import Session
from jaxrl_llm.sampling.slots import check_prompts, check_sizes, check_stops
from jaxrl_llm.types import Decoding, Rollout


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
        # before each turn of a row: the environment's state, and how many turns its episode had behind it
        self.moments: dict[Row, list[tuple[Any, int]]] = {}
        self.prompts: dict[int, Row] = {}  # a row of each group, whose prompt the others share

    def play(self, tasks: Sequence[Any], group_size: int, grow: Grow | None = None) -> tuple[Rollout, list[Episode]]:
        """Plays `group_size` episodes of every task, to the end of all of them; then those that `grow` asks for, again
        and again, until it asks for none."""
        check_sizes(num_tasks=len(tasks), group_size=group_size)
        with caller(self.rules.call_limits) as begin_call:
            waiting = self._reset(tasks, group_size, begin_call)
            self.plays = [play for play, _ in waiting]
            self._run(waiting, group_size, begin_call)
            while grow is not None and (forks := grow(self._rows_by_group(len(tasks)))):
                for fork in forks:
                    self._fork(fork, begin_call)
                self._run(waiting, group_size, begin_call)
        self.plays.sort(key=lambda play: play.group)  # a group side by side, parents before their children
        return self._rollout(), [play.report for play in self.plays]

    def _run(self, waiting: collections.deque[tuple[_Play, list[int]]], group_size: int, begin_call: Start) -> None:
        """Plays what waits and what has begun to its end."""
        under_way = 0
        while True:
            under_way += self._take_in(waiting, self.in_flight - under_way, group_size)
            self._decode(begin_call)
            idle = all(session.idle for session in self.sessions.values())
            if idle and not self.calls and not waiting:
                return
            for play, outcome in self._collect(wait=idle):
                under_way -= self._respond(play, outcome)

    def _rows_by_group(self, num_groups: int) -> list[list[Row]]:
        groups: list[list[Row]] = [[] for _ in range(num_groups)]
        for play in self.plays:
            groups[play.group] += [row for _, row in play.pieces]
        return groups

    def _fork(self, fork: Fork, begin_call: Start) -> None:
        """Episodes that go on from a place in a turn of an earlier one, in the state in which that turn was made."""
        row, position, children = fork
        if row not in self.owners:
            raise ValueError("a fork names a row that is not of this rollout; take rows from those that are given")
        turns = list(zip(row.turn_starts, row.turn_ends, strict=True))
        if not any(start <= position <= end for start, end in turns):
            raise ValueError(f"a fork at position={position}: expected a place in one of the row's turns, {turns}")
        parent, role = self.owners[row], self.owners[row].speaker
        for child in self.sessions[role].fork(row, position, children):
            moments = self.moments[row][: len(child.turn_rewards) + 1]
            state, turn = moments[-1]
            play = _Play(len(self.plays), parent.group, parent.task, state, role, turns=turn)
            self.plays.append(play)
            self._open(play, role, child, moments)
            if child.status == "waiting":
                self._ask(play, child, begin_call)

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
                self.sessions[name].prefill(newest(self.roles[name].params)[0], rows)
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
        number = play.number + (len(play.pieces) << 20)
        row = self.sessions[role].add(prompt, number=number, share=share, group=play.group)
        self._open(play, role, row, [(play.state, play.turns)])
        return row

    def _open(self, play: _Play, role: str, row: Row, moments: list[tuple[Any, int]]) -> None:
        play.contexts[role], play.speaker, self.owners[row] = row, role, play
        play.pieces.append((role, row))
        self.moments[row] = moments

    def _decode(self, begin_call: Start) -> None:
        """Some decode steps for every policy, and a call for every turn that has ended."""
        began = time.monotonic()
        ended: list[Row] = []
        for session, role in {session: role for role, session in self.sessions.items()}.items():
            if not session.idle:
                params, version = newest(self.roles[role].params)
                ended += session.advance(params, version=version, steps=self.steps)
        for row in ended:
            self._ask(self.owners[row], row, begin_call)
        if self.rules.max_seconds is not None:
            for row, play in self.owners.items():
                if play.started is None and row.known > max(row.prompt_length, row.fork_position):
                    play.started = began

    def _ask(self, play: _Play, row: Row, begin_call: Start) -> None:
        text = self.roles[play.speaker].tokenizer.decode(row.turn_tokens)
        self.calls[play] = begin_call(self.step, play.state, play.speaker, text)

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
            self.moments[row].append((play.state, play.turns))
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
        episode = {play: index for index, play in enumerate(self.plays)}
        return rows_to_rollout(
            rows,
            decoding=self.decoding,
            group_ids=[play.group for play in plays],
            num_turns=self.rules.max_turns,
            constrained=any(role.constraint is not None for role in self.roles.values()),
            rollout_ids=[episode[play] for play in plays],
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
