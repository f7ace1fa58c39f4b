"""A sequence that grows on the host's side, and many of them as a `Rollout`."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.types import Decoding, Rollout


@dataclasses.dataclass(eq=False)
class Row:
    """One sequence of a `Session`. What is known of a token is decided when the token is made.

    Attributes:
      key: raw random key, from which a token's number is folded by its position.
      tokens, mask, logprobs, free_logprobs, versions: of length `max_length`; those below `known` count. The mask is
        true where the policy wrote the token, versions are -1 elsewhere.
      known: tokens that are decided. computed: places whose keys and values lie in `pages`.
      prompt_length: tokens before the first turn.
      turn_starts, turn_ends: places of the policy's turns; the last turn may lack its end.
      turn_rewards: one for each ended turn that was answered.
      status: "ready" to decode, "waiting" for an observation, or "finished".
      truncated: ended by a limit.
      parent, fork_position: the row it was forked from, and how many tokens it took over.
      start_state, state: of the automaton of a constraint, at the start of a turn and now.
      forks: children so far.
    """

    key: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    free_logprobs: np.ndarray
    versions: np.ndarray
    known: int
    prompt_length: int
    parent: Row | None = None
    fork_position: int = 0
    start_state: int = -1
    state: int = -1
    computed: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    turn_starts: list[int] = dataclasses.field(default_factory=list)
    turn_ends: list[int] = dataclasses.field(default_factory=list)
    turn_rewards: list[float] = dataclasses.field(default_factory=list)
    status: Literal["ready", "waiting", "finished"] = "ready"
    truncated: bool = False
    forks: int = 0

    @property
    def turn_tokens(self) -> np.ndarray:
        """What the policy has written in its last turn."""
        return self.tokens[self.turn_starts[-1] : self.known]

    @property
    def turn_ids(self) -> np.ndarray:
        """Turn of a policy token, -1 elsewhere, of length `max_length`."""
        ids = np.full(len(self.tokens), -1, np.int32)
        for turn, start in enumerate(self.turn_starts):
            ids[start : self.turn_ends[turn] if turn < len(self.turn_ends) else self.known] = turn
        return ids


def new_row(tokens: Sequence[int], key: np.ndarray, max_length: int, start_state: int) -> Row:
    """A row that holds a prompt, its first turn about to begin."""
    length = len(tokens)
    row = Row(
        key=key,
        tokens=np.zeros(max_length, np.int32),
        mask=np.zeros(max_length, bool),
        logprobs=np.zeros(max_length, np.float32),
        free_logprobs=np.zeros(max_length, np.float32),
        versions=np.full(max_length, -1, np.int32),
        known=length,
        prompt_length=length,
        start_state=start_state,
        state=start_state,
        turn_starts=[length],
    )
    row.tokens[:length] = tokens
    return row


def forked_row(parent: Row, position: int, key: np.ndarray) -> Row:
    """A row with the first `position` tokens of another.

    Inside a turn, or right behind it, it goes on with that turn; elsewhere a turn begins at `position`. The state of a
    constraint is left for the caller to set.
    """
    copies = {}
    for name, empty in (("tokens", 0), ("mask", False), ("logprobs", 0), ("free_logprobs", 0), ("versions", -1)):
        copies[name] = getattr(parent, name).copy()
        copies[name][position:] = empty
    turn = bisect.bisect_left(parent.turn_starts, position) - 1  # the last one that begins before the position
    inside = turn >= 0 and (turn == len(parent.turn_ends) or position <= parent.turn_ends[turn])
    whole = max(turn, 0) if inside else turn + 1  # turns that the child has behind it
    return Row(
        **copies,
        key=key,
        known=position,
        prompt_length=min(parent.prompt_length, position),
        parent=parent,
        fork_position=position,
        start_state=parent.start_state,
        state=parent.start_state,
        turn_starts=parent.turn_starts[:whole] + [parent.turn_starts[turn] if inside else position],
        turn_ends=parent.turn_ends[:whole],
        turn_rewards=parent.turn_rewards[:whole],
    )


def rows_to_rollout(
    rows: Sequence[Row],
    *,
    decoding: Decoding,
    group_ids: Sequence[int],
    num_turns: int | None = None,
    constrained: bool = False,
    **columns: Sequence[int],
) -> Rollout:
    """The rows side by side, `num_turns` turns wide (default: as many as the longest has).

    Args:
      rows: B of them; a parent that is not among them counts as none.
      group_ids: which prompt each row answers.
      constrained: whether the rows were sampled under a constraint, so that `free_logprobs` have something to say.
      columns: further int32[B] fields of the rollout: `rollout_ids`, `row_of_episode`, `agent_ids`.
    """
    place = {id(row): index for index, row in enumerate(rows)}
    turns = max([len(row.turn_rewards) for row in rows] + [1]) if num_turns is None else num_turns
    turn_rewards, turn_mask = np.zeros((len(rows), turns), np.float32), np.zeros((len(rows), turns), bool)
    for index, row in enumerate(rows):
        turn_rewards[index, : len(row.turn_rewards)] = row.turn_rewards
        turn_mask[index, : len(row.turn_rewards)] = True
    names = ("tokens", "mask", "logprobs", "turn_ids", "versions") + ("free_logprobs",) * constrained
    scorable = ~np.any(np.isnan(turn_rewards), axis=1)
    turn_rewards[~scorable] = 0
    fields = dict(
        **{name: np.stack([getattr(row, name) for row in rows]) for name in names},
        lengths=np.array([row.known for row in rows], np.int32),
        prompt_lengths=np.array([row.prompt_length for row in rows], np.int32),
        group_ids=np.asarray(group_ids, np.int32),
        rewards=np.sum(turn_rewards, axis=1),
        scorable=scorable,
        turn_rewards=turn_rewards,
        turn_mask=turn_mask,
        truncated=np.array([row.truncated for row in rows]),
        parent=np.array([place.get(id(row.parent), -1) for row in rows], np.int32),
        fork_position=np.array([row.fork_position if id(row.parent) in place else 0 for row in rows], np.int32),
        **{name: np.asarray(column, np.int32) for name, column in columns.items()},
    )
    return Rollout(**{name: jnp.asarray(array) for name, array in fields.items()}, decoding=decoding)


def join_rollouts(rollouts: Sequence[Rollout]) -> Rollout:
    """Rollouts of the same widths as one, whose groups, episodes and parents stay apart.

    Raises:
      ValueError: they were decoded in different ways, or only some have a field such as `versions`.
    """
    first = rollouts[0]
    if others := {rollout.decoding for rollout in rollouts} - {first.decoding}:
        raise ValueError(f"rollouts of {first.decoding} and {others.pop()} cannot be one: they are scored differently")
    columns: dict[str, list[Any]] = {}
    for field in dataclasses.fields(Rollout):
        values = [getattr(rollout, field.name) for rollout in rollouts]
        if field.name == "decoding" or all(value is None for value in values):
            continue
        if any(value is None for value in values):
            raise ValueError(f"some of the rollouts have {field.name}, others have none; sample all of them alike")
        columns[field.name] = values
    for name in {"group_ids", "rollout_ids"} & set(columns):
        columns[name] = _apart(columns[name], [jnp.max(ids) + 1 for ids in columns[name]])
    if "parent" in columns:
        columns["parent"] = _apart(columns["parent"], [len(parents) for parents in columns["parent"]])
    joined: dict[str, Any] = {
        name: jnp.concatenate([jnp.asarray(value) for value in values]) for name, values in columns.items()
    }
    return dataclasses.replace(first, **joined)


def _apart(columns: list[Any], sizes: list[Any]) -> list[Any]:
    """Numbers of several rollouts, each behind those of the one before; -1 stays."""
    return [jnp.where(ids < 0, ids, ids + sum(sizes[:index])) for index, ids in enumerate(map(jnp.asarray, columns))]
