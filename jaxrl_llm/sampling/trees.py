"""Rollouts that branch: which places are gone on from again, under a budget, and how a tree is trained on.

    rollout, episodes = tree_rollout(
        model, params, env, tasks, key, expand=surprising_positions, budget=48, rounds=2, group_size=4, ...
    )
    weights = path_weights(rollout)   # each shared token counts once

A policy of expansion is a function `(groups, budget, rng) -> forks`: the rows of each task so far, the rows that may be
added, a source of chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxrl_llm.models.decoder import Model
from jaxrl_llm.ops.trees import prefix_holders
from jaxrl_llm.sampling.host import host_rollout
from jaxrl_llm.sampling.moves import Episode, Fork
from jaxrl_llm.sampling.rows import Row
from jaxrl_llm.sampling.slots import check_sizes
from jaxrl_llm.types import Params, Rollout

Groups = Sequence[Sequence[Row]]
Expand = Callable[[Groups, int, np.random.Generator], list[Fork]]


def tree_rollout(
    model: Model,
    params: Params | Callable[[], tuple[Params, int]],
    env: Any,
    tasks: Sequence[Any],
    key: jax.Array,
    *,
    expand: Expand,
    budget: int,
    rounds: int = 1,
    group_size: int = 1,
    **options: Any,
) -> tuple[Rollout, list[Episode]]:
    """Plays `group_size` episodes of every task, then lets them branch, round after round.

    A fork goes on from its place in a turn, in the state of the environment in which that turn was made, and shares the
    cache pages of what lies before. Right behind a turn the environment is asked again.

    Args:
      expand: says where, see `random_positions`, `surprising_positions`, `turn_starts`, `split_evenly`.
      budget: rows that forks add in all. Each round is offered an equal part of what is left.
      rounds: in each, `expand` sees the rows of those before. One that names no fork is the last.
      options: as `host_rollout`. `max_turns` counts the turns of a path, `max_calls` and `max_seconds` what a fork
        does itself.

    Returns:
      The rollout, the rows of a task side by side (not as many for each) and parents before their children, linked by
      `parent` and `fork_position`; and an `Episode` for each of `rollout_ids`: what was done since the fork.

    Raises:
      ValueError: `expand` exceeds the budget or names a place outside of a turn; and as `host_rollout`.
    """
    check_sizes(budget=budget, rounds=rounds)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    left = {"rows": budget, "rounds": rounds}

    def grow(groups: Groups) -> list[Fork]:
        if not left["rows"] or not left["rounds"]:
            return []
        offered = -(-left["rows"] // left["rounds"])
        forks = expand(groups, offered, rng)
        added = sum(fork.children for fork in forks)
        if added > offered:
            raise ValueError(f"expand asked for {added} rows, expected at most the {offered} that it was offered")
        left["rows"], left["rounds"] = left["rows"] - added, left["rounds"] - 1
        return forks

    return host_rollout(model, params, env, tasks, key, group_size=group_size, grow=grow, **options)


def random_positions(groups: Groups, budget: int, rng: np.random.Generator) -> list[Fork]:
    """Forks at tokens of the policy, drawn evenly from all in the trees, with replacement."""
    places = [(row, position) for rows in groups for row in rows for position in _own_tokens(row)]
    return _draw(places, budget, rng)


def turn_starts(groups: Groups, budget: int, rng: np.random.Generator) -> list[Fork]:
    """Forks that make a whole turn again, drawn evenly from all turns in the trees, with replacement. A node of the
    tree is then a turn, as in Tree-GRPO (Ji et al. 2025, https://arxiv.org/abs/2509.21240)."""
    places = [
        (row, start) for rows in groups for row in rows for start in row.turn_starts if start >= row.fork_position
    ]
    return _draw(places, budget, rng)


def surprising_positions(groups: Groups, budget: int, rng: np.random.Generator, *, count: int = 1) -> list[Fork]:
    """`count` forks at each of the tokens that the policy found least likely: where it might as well have said
    something else (TreeRL, Hou et al. 2025, https://arxiv.org/abs/2506.11902). `rng` is not needed."""
    places = [(row, position) for rows in groups for row in rows for position in _own_tokens(row)]
    places.sort(key=lambda place: place[0].logprobs[place[1]])
    return [Fork(row, position, count) for row, position in places[: budget // count]]


def split_evenly(
    groups: Groups,
    budget: int,
    rng: np.random.Generator,
    *,
    expand: Expand,
    keep: Callable[[Sequence[Row]], bool] = lambda rows: True,
) -> list[Fork]:
    """The budget in equal parts for the groups that `keep` takes, such as `uncertain` ones; `expand` spends a part.
    Which groups get what does not divide evenly is drawn.

        expand = functools.partial(split_evenly, expand=random_positions, keep=uncertain)
    """
    kept = [rows for rows in groups if keep(rows)]
    forks = []
    for place, index in enumerate(rng.permutation(len(kept))):
        part = (budget + len(kept) - 1 - place) // len(kept)
        forks += expand([kept[index]], part, rng) if part else []
    return forks


def uncertain(rows: Sequence[Row]) -> bool:
    """Whether rows of a group differ in reward: only such groups have advantages. Rows without a score do not count."""
    rewards = _rewards(rows)
    return bool(len(rewards)) and bool(np.min(rewards) < np.max(rewards))


def unsolved(rows: Sequence[Row], *, threshold: float = 0.0) -> bool:
    """Whether no row of a group has a reward above the threshold."""
    return not np.any(_rewards(rows) > threshold)


def path_weights(rollout: Rollout) -> Float[Array, "B T"]:
    """Weights under which every token of a tree counts once, however many rows hold it; 0 on padding.

    A token that n rows have in common, through their ancestors, weighs 1/n in each. As `weights` of a loss they make
    of a sum over rows a sum over the distinct tokens, in which the advantage of a shared one is the mean of those of
    all paths through it. Without weights rows are trained path by path; with `own_mask` a shared token is trained in
    the row that drew it alone, with the advantage of that path.

    From `parent` and `fork_position` alone, which must name rows of this batch: flatten before rows are selected.
    """
    num_rows, length = rollout.tokens.shape
    columns = jnp.arange(length)
    inside = columns < rollout.lengths[:, None]
    if rollout.parent is None or rollout.fork_position is None:
        return inside.astype(jnp.float32)
    holder = prefix_holders(rollout.parent, rollout.fork_position, length)[:, 1:]  # the row that drew a token
    shares = jnp.zeros((num_rows, length)).at[holder, columns].add(inside.astype(jnp.float32))
    return jnp.where(inside, 1 / jnp.maximum(shares[holder, columns], 1), 0)


def own_mask(rollout: Rollout) -> Bool[Array, "B T"]:
    """The rollout's mask without the tokens that a row took over from its parent: each is left in the one row that
    drew it."""
    if rollout.fork_position is None:
        return rollout.mask
    return rollout.mask & (jnp.arange(rollout.mask.shape[1]) >= rollout.fork_position[:, None])


def _own_tokens(row: Row) -> list[int]:
    """Places of the policy's tokens that the row did not take over from its parent."""
    return (row.fork_position + np.flatnonzero(row.mask[row.fork_position : row.known])).tolist()


def _draw(places: list[tuple[Row, int]], budget: int, rng: np.random.Generator) -> list[Fork]:
    if not places:
        return []
    counts = np.bincount(rng.integers(len(places), size=budget), minlength=len(places))
    return [Fork(*places[index], int(counts[index])) for index in np.flatnonzero(counts)]


def _rewards(rows: Sequence[Row]) -> np.ndarray:
    rewards = np.array([sum(row.turn_rewards) for row in rows])
    return rewards[np.isfinite(rewards)]
