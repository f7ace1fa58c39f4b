"""Search over turns: what a turn leads to is tried in a device environment before one is chosen.

    position = first_positions(env, tasks, key, max_length=512)
    found = turn_search(model, params, env, position, key, num_candidates=8, num_simulations=64, max_turn_tokens=32)
    position, rewards = play_turn(env, position, found.turn_tokens, found.turn_lengths)

The environment is a simulator here: what it answers in the search is taken back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxrl_llm.models.decoder import Model
from jaxrl_llm.sampling.constraints import Constraint, start_states
from jaxrl_llm.sampling.slots import (
    Limits,
    Prompts,
    check_prompts,
    check_sizes,
    check_stops,
    decode,
    prefill,
    refill,
    start,
    turn_of,
)
from jaxrl_llm.types import Decoding, Params


class Position(NamedTuple):
    """Episodes between two turns."""

    tokens: Int[Array, "P T"]
    lengths: Int[Array, "P"]
    env_state: PyTree  # with a leading axis P
    done: Bool[Array, "P"]  # over, by the environment or because nothing more fits


class Candidates(NamedTuple):
    """Turns that were sampled at each position."""

    tokens: Int[Array, "P A L"]
    lengths: Int[Array, "P A"]
    logprobs: Float[Array, "P A"]  # of a whole turn, in nats


class TurnSearch(NamedTuple):
    """The turn to play at each root, and how it was found.

    `weights` is the improved policy over the candidates, a target for training (Danihelka et al. 2022, eq. 11);
    `q_values` are 0 where a candidate was not tried. `tree` is what mctx gives.
    """

    turn_tokens: Int[Array, "P L"]
    turn_lengths: Int[Array, "P"]
    chosen: Int[Array, "P"]  # which candidate it is
    candidates: Candidates
    visits: Int[Array, "P A"]
    q_values: Float[Array, "P A"]  # discounted return from the root on
    values: Float[Array, "P"]  # of the root: mean over the simulations
    weights: Float[Array, "P A"]
    tree: Any


def first_positions(env: Any, tasks: PyTree, key: jax.Array, *, max_length: int) -> Position:
    """Where the episodes of some tasks begin: as in `rollout`, with `max_length` places for each.

    Raises:
      ValueError: a prompt leaves no room in `max_length`.
    """
    num_tasks = jax.tree.leaves(tasks)[0].shape[0]
    states, tokens, lengths = jax.vmap(env.reset)(jax.random.split(key, num_tasks), tasks)
    check_prompts(tokens.shape[1], max_length)
    tokens = jnp.pad(tokens, ((0, 0), (0, max_length - tokens.shape[1])))
    return Position(tokens, lengths, states, jnp.zeros(num_tasks, bool))


def play_turn(
    env: Any, position: Position, turn_tokens: Int[Array, "P L"], turn_lengths: Int[Array, "P"]
) -> tuple[Position, Float[Array, "P"]]:
    """Plays a turn of each episode: the position behind the observation, and the turn's reward, NaN where it cannot be
    scored. Episodes that were over stay as they are and get 0."""
    tokens, lengths, env_state, done = position
    limit = tokens.shape[1]
    next_state, observation, length, reward, over = jax.vmap(env.step)(env_state, turn_tokens, turn_lengths)
    tokens, lengths = _append(tokens, lengths, turn_tokens, jnp.where(done, 0, turn_lengths))
    over = done | over | (length >= limit - lengths)
    tokens, lengths = _append(tokens, lengths, observation, jnp.where(over, 0, length))

    def kept(new: Array, old: Array) -> Array:
        return jnp.where(done.reshape(-1, *[1] * (new.ndim - 1)), old, new)

    return Position(tokens, lengths, jax.tree.map(kept, next_state, env_state), over), jnp.where(done, 0.0, reward)


def sample_turns(
    model: Model,
    params: Params,
    position: Position,
    key: jax.Array,
    *,
    num_candidates: int,
    max_turn_tokens: int,
    stop_sequences: Sequence[Sequence[int]] = (),
    decoding: Decoding = Decoding(),
    constraint: Constraint | None = None,
) -> Candidates:
    """`num_candidates` turns at each position. Its tokens are computed once and all its candidates are decoded side by
    side. Arguments as in `rollout`."""
    num_rows, limit = position.tokens.shape
    limits = Limits(limit, 1, max_turn_tokens)
    lengths = jnp.minimum(jnp.where(position.done, limit, position.lengths), limit - 1)  # what is over costs one token
    rows = jnp.arange(num_rows * num_candidates)
    prompts = Prompts(position.tokens, lengths, (), prefill(model, params, position.tokens, lengths, num_rows))
    written, slots = start(model, prompts, limits, num_candidates, len(rows), constraint is not None)
    slots, _ = refill(prompts, num_candidates, slots, jnp.int32(0))
    step = functools.partial(
        decode, model, params, jax.vmap(jax.random.fold_in, (None, 0))(key, rows), decoding,
        check_stops(stop_sequences), limits, 1, constraint=constraint,
        row_states=None if constraint is None else start_states(constraint, rows // num_candidates),
    )  # fmt: skip
    written, slots = jax.lax.while_loop(
        lambda carry: jnp.any(~carry[1].waiting), lambda carry: step(*carry), (written, slots)
    )
    tokens, turn_lengths = turn_of(written, slots, limits)
    shape = (num_rows, num_candidates)
    logprobs = jnp.sum(written.logprobs, axis=1)  # 0 where the policy wrote nothing
    return Candidates(tokens.reshape(*shape, -1), turn_lengths.reshape(shape), logprobs.reshape(shape))


def turn_search(
    model: Model,
    params: Params,
    env: Any,
    position: Position,
    key: jax.Array,
    *,
    num_candidates: int,
    num_simulations: int,
    max_turn_tokens: int,
    stop_sequences: Sequence[Sequence[int]] = (),
    decoding: Decoding = Decoding(),
    constraint: Constraint | None = None,
    value: Callable[[Params, Position], Float[Array, "P"]] | None = None,
    prior: Literal["uniform", "logprobs"] = "uniform",
    discount: float = 1.0,
    max_depth: int | None = None,
) -> TurnSearch:
    """Monte-Carlo tree search whose actions are turns that the policy samples, with `mctx` and its Gumbel MuZero.

    A pure function: wrap it in `jit`. A node holds its tokens and the environment's state. Keys and values are not
    stored: each simulation takes one step of the environment, computes the up to T tokens of its node anew, and decodes
    `num_candidates` turns from there. So a search costs `num_simulations + 1` such computations of P rows and as many
    decodings of P * A turns; memory is A slots of T for each root, and T + A * L tokens for each node.

    Source: Danihelka et al. 2022 (Gumbel MuZero), https://openreview.net/forum?id=bERaNdoegnO; sampled actions: Hubert
    et al. 2021, https://arxiv.org/abs/2104.06303, where samples of the policy itself have a uniform prior.

    Args:
      env: a device environment whose `step` says what would happen; its randomness must lie in its state.
      position: the roots, from `first_positions` or `play_turn`. A constraint's `choices` go by their place.
      key: consumed.
      num_candidates: A, turns sampled at each node.
      num_simulations: at least A, so that each candidate of the root is tried.
      value: the return expected at a position that is not over; 0 if None. It enters the mean of a node's value.
      prior: of the candidates: the same for all, or by their log-probs, which prefers likely turns twice.
      discount: per turn.
      max_depth: turns that a simulation looks ahead at most; None: as far as it gets.
      max_turn_tokens, stop_sequences, decoding, constraint: as in `rollout`.

    Raises:
      ValueError: a size is not positive, or fewer simulations than candidates.
    """
    import mctx

    check_sizes(num_candidates=num_candidates, max_turn_tokens=max_turn_tokens)
    if num_simulations < num_candidates:
        raise ValueError(
            f"num_simulations={num_simulations} cannot try each of {num_candidates} candidates; give at least as many"
        )

    def look(params: Params, key: jax.Array, position: Position) -> tuple[Candidates, Array, Array]:
        """What a node needs: candidates, their prior, the node's value."""
        candidates = sample_turns(
            model, params, position, key, num_candidates=num_candidates, max_turn_tokens=max_turn_tokens,
            stop_sequences=stop_sequences, decoding=decoding, constraint=constraint,
        )  # fmt: skip
        logits = candidates.logprobs if prior == "logprobs" else jnp.zeros_like(candidates.logprobs)
        values = jnp.zeros(len(logits)) if value is None else value(params, position)
        return candidates, logits, jnp.where(position.done, 0.0, values)

    def simulate(params: Params, key: jax.Array, action: Array, node: tuple[Position, Candidates]) -> Any:
        position, reward = play_turn(env, node[0], *_chosen(node[1], action))
        candidates, logits, values = look(params, key, position)
        output = mctx.RecurrentFnOutput(
            reward=jnp.nan_to_num(reward),  # what cannot be scored pays nothing
            discount=jnp.where(position.done, 0.0, discount),
            prior_logits=logits,
            value=values,
        )
        return output, (position, candidates)

    root_key, search_key = jax.random.split(key)
    candidates, logits, values = look(params, root_key, position)
    output = mctx.gumbel_muzero_policy(
        params,
        search_key,
        mctx.RootFnOutput(prior_logits=logits, value=values, embedding=(position, candidates)),
        simulate,
        num_simulations,
        max_depth=max_depth,
        max_num_considered_actions=num_candidates,
        gumbel_scale=0.0,  # candidates are samples already: all of them are tried
    )
    summary = output.search_tree.summary()
    return TurnSearch(
        *_chosen(candidates, output.action), output.action, candidates, summary.visit_counts.astype(jnp.int32),
        jnp.where(summary.visit_counts > 0, summary.qvalues, 0.0), summary.value, output.action_weights,
        output.search_tree,
    )  # fmt: skip


def _chosen(candidates: Candidates, action: Int[Array, "P"]) -> tuple[Int[Array, "P L"], Int[Array, "P"]]:
    rows = jnp.arange(len(action))
    return candidates.tokens[rows, action], candidates.lengths[rows, action]


def _append(
    tokens: Int[Array, "P T"], lengths: Int[Array, "P"], new: Int[Array, "P N"], count: Int[Array, "P"]
) -> tuple[Int[Array, "P T"], Int[Array, "P"]]:
    offsets = jnp.arange(new.shape[1])
    columns = jnp.where(offsets < count[:, None], lengths[:, None] + offsets, tokens.shape[1])  # others: dropped
    rows = jnp.arange(len(tokens))[:, None]
    return tokens.at[rows, columns].set(new.astype(tokens.dtype), mode="drop"), lengths + count
