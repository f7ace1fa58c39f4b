"""Rollouts that branch inside one `jit`: a prompt's rollouts one after another, each a copy of an earlier one up to a
place that is chosen by a score, and from there on its own.

On a host, with tools and budgets, `tree_rollout` does more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxrl_llm.models.decoder import Model
from jaxrl_llm.ops.trees import choose_branch
from jaxrl_llm.sampling.device import rollout
from jaxrl_llm.sampling.slots import check_sizes
from jaxrl_llm.types import Params, Rollout


@dataclasses.dataclass(frozen=True)
class BegunEnv:
    """A device environment whose first turn has been begun by someone else.

    A task is `(task, tokens[W], length)`: the environment's own, and a row of prompt and first tokens of the turn, of
    which `length` are to be kept; with a length up to the prompt's nothing is, and the row is not read.
    """

    env: Any

    def reset(self, key: jax.Array, task: PyTree) -> tuple[PyTree, Int[Array, "W"], Int[Array, ""]]:
        own, row, kept = task
        state, prompt, length = self.env.reset(key, own)
        places = jnp.arange(row.shape[0])
        row = jnp.where(places < length, jnp.pad(prompt, (0, row.shape[0] - prompt.shape[0])), row)
        kept = jnp.maximum(kept, length)
        return (state, row, length, kept), row, kept

    def step(self, state: PyTree, turn_tokens: Int[Array, "L"], length: Int[Array, ""]) -> tuple[Any, ...]:
        own, row, start, kept = state
        begun, places = kept - start, jnp.arange(row.shape[0] + turn_tokens.shape[0])
        before = row[jnp.minimum(places + start, row.shape[0] - 1)]
        behind = turn_tokens[jnp.clip(places - begun, 0, turn_tokens.shape[0] - 1)]
        own, *answer = self.env.step(own, jnp.where(places < begun, before, behind), begun + length)
        return (own, row, jnp.zeros_like(start), jnp.zeros_like(kept)), *answer


def branching_rollout(
    model: Model,
    params: Params,
    env: Any,
    tasks: PyTree,
    key: jax.Array,
    *,
    score: Callable[[Rollout], Float[Array, "P T"]],
    eps: float,
    group_size: int,
    max_length: int,
    **options: Any,
) -> Rollout:
    """`group_size` rollouts of one turn for every task. The first begins at the prompt, and so does each later one with
    probability `eps`; otherwise it keeps what lies before the token of the highest score in all of its group so far, of
    equal ones the first, and draws that token and the rest again (ROSE, 2026).

    Args:
      env: a device environment whose `reset` draws nothing and whose episodes have one turn.
      score: of the tokens of finished rows, one for each task: how much each is worth being drawn again.
      eps: 1 makes the rollouts independent.
      options: as `rollout`. `max_turn_tokens` limits what a row draws itself.

    Returns:
      Rollouts with a group's side by side, in the order in which they were made. `parent` is the row that a row
      branched off, and `fork_position` how many tokens it kept, the prompt's included; -1 and 0 at the root. `mask` and
      `logprobs` are those of the whole response, whoever drew it.
    """
    check_sizes(group_size=group_size)
    num_tasks = jax.tree.leaves(tasks)[0].shape[0]
    places, prompts = jnp.arange(max_length), jnp.arange(num_tasks)
    play_key, choose_key = jax.random.split(key)

    def go_on(row: Int[Array, "P T"], kept: Int[Array, "P"], number: Int[Array, ""]) -> Rollout:
        begun = (tasks, row[:, :-1], kept)  # a row without its last place leaves room for a token
        return rollout(
            model,
            params,
            BegunEnv(env),
            begun,
            jax.random.fold_in(play_key, number),
            max_length=max_length,
            max_turns=1,
            **options,
        )

    def add_row(
        carry: tuple[Rollout, Float[Array, "P G T"]], number: Int[Array, ""]
    ) -> tuple[tuple[Rollout, Float[Array, "P G T"]], None]:
        written, scores = carry
        keys = jax.random.split(jax.random.fold_in(choose_key, number), num_tasks)
        done = jnp.where(jnp.arange(group_size) < number, written.lengths, 0)
        parent, kept = jax.vmap(lambda *of: choose_branch(*of, eps=eps))(scores, done, keys)
        source = jax.tree.map(lambda leaf: leaf[prompts, jnp.maximum(parent, 0)], written)
        own = go_on(source.tokens, kept, number)
        shared = places < kept[:, None]
        mask: Bool[Array, "P T"] = own.mask | (shared & source.mask)
        row = dataclasses.replace(
            own,
            mask=mask,
            logprobs=jnp.where(shared, source.logprobs, own.logprobs),
            turn_ids=jnp.where(mask, 0, -1),
            prompt_lengths=jnp.where(parent < 0, own.prompt_lengths, source.prompt_lengths),
            parent=parent,
            fork_position=kept,
        )
        scores = scores.at[:, number].set(jnp.where(mask, score(row), -jnp.inf))
        return (jax.tree.map(lambda all_rows, new: all_rows.at[:, number].set(new), written, row), scores), None

    none = jnp.zeros(num_tasks, jnp.int32)
    like = dataclasses.replace(
        jax.eval_shape(go_on, jnp.zeros((num_tasks, max_length), jnp.int32), none, jnp.int32(0)),
        parent=none,
        fork_position=none,
    )
    empty = jax.tree.map(lambda leaf: jnp.zeros((num_tasks, group_size, *leaf.shape[1:]), leaf.dtype), like)
    start = (empty, jnp.full((num_tasks, group_size, max_length), -jnp.inf))
    (written, _), _ = jax.lax.scan(add_row, start, jnp.arange(group_size))

    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), written)
    groups = jnp.repeat(prompts, group_size)
    parent = jnp.where(flat.parent < 0, -1, flat.parent + group_size * groups)
    return dataclasses.replace(flat, group_ids=groups, parent=parent)
