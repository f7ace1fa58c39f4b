"""What the samplers share: sequences are rows, slots work on them side by side, and this is what one step does.

A slot feeds the known tokens of its row (the last one of the prompt, then observations) and where none are left samples
one. Once its turn is over it waits for the environment, whose answer is appended to the row; when the episode is over,
the slot takes the next row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxrl_llm.models.decoder import Cache, Model, replace_prefix
from jaxrl_llm.sampling.constraints import Constraint
from jaxrl_llm.sampling.draw import draw_tokens
from jaxrl_llm.types import Decoding, Params, Rollout

Stops = tuple[tuple[int, ...], ...]


class Limits(NamedTuple):
    """Where a rollout ends at the latest: tokens of a row, turns of a row, tokens of a turn."""

    max_length: int
    max_turns: int
    max_turn_tokens: int


class Written(NamedTuple):
    """What has been written down so far, a row per sequence."""

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    logprobs: Float[Array, "B T"]
    turn_ids: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    turn_rewards: Float[Array, "B K"]
    turn_mask: Bool[Array, "B K"]
    truncated: Bool[Array, "B"]
    free_logprobs: Float[Array, "B T"] | None  # with a constraint


class Slots(NamedTuple):
    """Where each slot stands. `fed <= known`: tokens below `fed` are in the cache, those below `known` are decided."""

    row: Int[Array, "S"]  # the sequence it works on; B if empty
    known: Int[Array, "S"]
    fed: Int[Array, "S"]
    turn: Int[Array, "S"]
    turn_start: Int[Array, "S"]
    waiting: Bool[Array, "S"]  # for the environment
    env_state: PyTree
    cache: Cache
    states: Int[Array, "S"] | None  # of the constraint


class Prompts(NamedTuple):
    """The prompts of all groups, padded, and their keys and values, which all rows of a group start from."""

    tokens: Int[Array, "P L"]
    lengths: Int[Array, "P"]
    states: PyTree  # of the environment, with a leading axis P
    cache: Cache


def start(
    model: Model, prompts: Prompts, limits: Limits, group_size: int, num_slots: int, constrained: bool = False
) -> tuple[Written, Slots]:
    """Rows that hold their prompt, and empty slots."""
    (num_tasks, width), (length, turns, _) = prompts.tokens.shape, limits
    num_rows = num_tasks * group_size
    groups = jnp.arange(num_rows) // group_size
    written = Written(
        tokens=jnp.zeros((num_rows, length), jnp.int32).at[:, :width].set(prompts.tokens[groups]),
        mask=jnp.zeros((num_rows, length), bool),
        logprobs=jnp.zeros((num_rows, length), jnp.float32),
        turn_ids=jnp.full((num_rows, length), -1, jnp.int32),
        lengths=prompts.lengths[groups],
        turn_rewards=jnp.zeros((num_rows, turns), jnp.float32),
        turn_mask=jnp.zeros((num_rows, turns), bool),
        truncated=jnp.zeros(num_rows, bool),
        free_logprobs=jnp.zeros((num_rows, length), jnp.float32) if constrained else None,
    )
    zeros = jnp.zeros(num_slots, jnp.int32)
    slots = Slots(
        row=jnp.full(num_slots, num_rows, jnp.int32),
        known=zeros,
        fed=zeros,
        turn=zeros,
        turn_start=zeros,
        waiting=jnp.zeros(num_slots, bool),
        env_state=jax.tree.map(lambda x: jnp.zeros((num_slots, *x.shape[1:]), x.dtype), prompts.states),
        cache=model.init_cache(num_slots, length, prompts.cache[0]["keys"].dtype),
        states=zeros if constrained else None,
    )
    return written, slots


def refill(prompts: Prompts, group_size: int, slots: Slots, next_row: Int[Array, ""]) -> tuple[Slots, Int[Array, ""]]:
    """Gives empty slots the next rows, prompt and its keys and values included."""
    num_tasks = prompts.tokens.shape[0]
    num_rows = num_tasks * group_size
    empty = slots.row == num_rows
    candidate = next_row + jnp.cumsum(empty) - 1
    fresh = empty & (candidate < num_rows)
    row = jnp.where(fresh, candidate, slots.row)
    group = jnp.minimum(row // group_size, num_tasks - 1)  # any group for a slot that stays empty
    length = prompts.lengths[group]
    slots = Slots(
        row=row,
        known=jnp.where(fresh, length, slots.known),
        fed=jnp.where(fresh, length - 1, slots.fed),  # the last prompt token is fed again, for its logits
        turn=jnp.where(fresh, 0, slots.turn),
        turn_start=jnp.where(fresh, length, slots.turn_start),
        waiting=slots.waiting & ~fresh,
        env_state=select(fresh, jax.tree.map(lambda x: x[group], prompts.states), slots.env_state),
        cache=replace_prefix(slots.cache, jax.tree.map(lambda x: x[group], prompts.cache), fresh),
        states=slots.states,
    )
    return slots, next_row + jnp.sum(fresh)


def turn_of(written: Written, slots: Slots, limits: Limits) -> tuple[Int[Array, "S L"], Int[Array, "S"]]:
    """Tokens of the turn that each waiting slot has just ended, and their number; nothing for other slots."""
    offsets = jnp.arange(limits.max_turn_tokens)
    columns = slots.turn_start[:, None] + offsets
    tokens = written.tokens.at[slots.row[:, None], columns].get(mode="fill", fill_value=0)
    lengths = jnp.where(slots.waiting, slots.known - slots.turn_start, 0)
    return jnp.where(offsets < lengths[:, None], tokens, 0), lengths


def answer(
    written: Written,
    slots: Slots,
    limits: Limits,
    answered: Bool[Array, "S"],
    observation: Int[Array, "S O"],
    length: Int[Array, "S"],
    reward: Float[Array, "S"],
    done: Bool[Array, "S"],
) -> tuple[Written, Slots]:
    """Appends what the environment answered to the turns of some waiting slots.

    A row is over when the environment says so, after its last turn, or when the observation leaves no room for a token
    behind it; in the last two cases it is marked truncated, and the observation is left out.
    """
    num_rows = written.tokens.shape[0]
    over = answered & (done | (slots.turn + 1 == limits.max_turns) | (length >= limits.max_length - slots.known))
    length = jnp.where(answered & ~over, length, 0)
    offsets = jnp.arange(observation.shape[1])
    columns = jnp.where(offsets < length[:, None], slots.known[:, None] + offsets, limits.max_length)
    rows = jnp.where(answered, slots.row, num_rows)  # out of range: dropped
    known = slots.known + length
    written = written._replace(
        tokens=written.tokens.at[rows[:, None], columns].set(observation.astype(jnp.int32), mode="drop"),
        lengths=written.lengths.at[rows].set(known, mode="drop"),
        turn_rewards=written.turn_rewards.at[rows, slots.turn].set(reward, mode="drop"),
        turn_mask=written.turn_mask.at[rows, slots.turn].set(True, mode="drop"),
        truncated=written.truncated.at[rows].set(over & ~done, mode="drop"),
    )
    return written, slots._replace(
        row=jnp.where(over, num_rows, slots.row),
        known=known,
        turn=slots.turn + answered,
        turn_start=jnp.where(answered, known, slots.turn_start),
        waiting=slots.waiting & ~answered,
    )


def decode(
    model: Model,
    params: Params,
    row_keys: Key[Array, "B"],
    decoding: Decoding,
    stops: Stops,
    limits: Limits,
    width: int,
    written: Written,
    slots: Slots,
    constraint: Constraint | None = None,
    row_states: Int[Array, "B"] | None = None,
) -> tuple[Written, Slots]:
    """Feeds each active slot up to `width` known tokens, and samples one where none are left.

    The key of a token is that of its row folded with its position, so that a sample depends neither on the slot nor on
    how many there are. `row_states` are those of a constraint in which a row's turns begin.
    """
    num_rows = written.tokens.shape[0]
    active = (slots.row < num_rows) & ~slots.waiting
    columns = slots.fed[:, None] + jnp.arange(width)
    taken = active[:, None] & (columns < slots.known[:, None])
    tokens = written.tokens.at[slots.row[:, None], columns].get(mode="fill", fill_value=0)
    hidden, cache = model.apply(params, tokens, positions=jnp.where(taken, columns, -1), cache=slots.cache)
    num_taken = jnp.sum(taken, axis=1)
    fed = slots.fed + num_taken
    sampling = active & (fed == slots.known)

    last = jnp.take_along_axis(hidden, jnp.maximum(num_taken - 1, 0)[:, None, None], axis=1)[:, 0]
    row = jnp.minimum(slots.row, num_rows - 1)  # any row for a slot without one
    keys = jax.vmap(jax.random.fold_in)(row_keys[row], slots.known)
    states = slots.states
    if row_states is not None:
        states = select(slots.known == slots.turn_start, row_states[row], states)
    drawn = draw_tokens(model, params, last, keys, decoding, constraint, states)

    rows = jnp.where(sampling, slots.row, num_rows)  # out of range: dropped

    def write(field, value):
        return field.at[rows, slots.known].set(value, mode="drop")

    written = written._replace(
        tokens=write(written.tokens, drawn.tokens),
        mask=write(written.mask, True),
        logprobs=write(written.logprobs, drawn.logprobs),
        turn_ids=write(written.turn_ids, slots.turn),
        free_logprobs=jax.tree.map(write, written.free_logprobs, drawn.free_logprobs),  # None without a constraint
    )
    known = slots.known + sampling
    turn_length = known - slots.turn_start
    stopped = _ends_with(written.tokens, slots.row, known, turn_length, stops)
    ended = sampling & (stopped | (turn_length == limits.max_turn_tokens) | (known == limits.max_length))
    return written, slots._replace(
        known=known, fed=fed, waiting=slots.waiting | ended, cache=cache, states=select(sampling, drawn.states, states)
    )


def finish(written: Written, prompts: Prompts, group_size: int, decoding: Decoding) -> Rollout:
    """The rollout of all rows once they are over."""
    groups = jnp.arange(written.tokens.shape[0]) // group_size
    # the prompt buffer may reach beyond a short prompt: what lies behind a sequence is padding
    inside = jnp.arange(written.tokens.shape[1]) < written.lengths[:, None]
    scorable = ~jnp.any(jnp.isnan(written.turn_rewards) & written.turn_mask, axis=1)
    turn_rewards = jnp.where(written.turn_mask & scorable[:, None], written.turn_rewards, 0)
    return Rollout(
        tokens=jnp.where(inside, written.tokens, 0),
        lengths=written.lengths,
        prompt_lengths=prompts.lengths[groups],
        mask=written.mask,
        logprobs=written.logprobs,
        turn_ids=written.turn_ids,
        group_ids=groups,
        rewards=jnp.sum(turn_rewards, axis=1),
        scorable=scorable,
        turn_rewards=turn_rewards,
        turn_mask=written.turn_mask,
        truncated=written.truncated,
        decoding=decoding,
        free_logprobs=written.free_logprobs,
    )


def prefill(
    model: Model, params: Params, prompts: Int[Array, "P L"], lengths: Int[Array, "P"], batch_size: int
) -> Cache:
    """Keys and values of all prompts, in the type of the weights, `batch_size` prompts at a time."""
    steps = jnp.arange(prompts.shape[1])

    def one_batch(batch):
        tokens, lengths = batch
        positions = jnp.where(steps < lengths[:, None], steps, -1)
        cache = model.init_cache(tokens.shape[0], tokens.shape[1], model.head(params).dtype)
        return model.apply(params, tokens, positions=positions, cache=cache)[1]

    if prompts.shape[0] <= batch_size:
        return one_batch((prompts, lengths))
    pad = -prompts.shape[0] % batch_size
    batches = jax.tree.map(
        lambda x: jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, batch_size, *x.shape[1:]),
        (prompts, lengths),
    )
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(one_batch, batches))


def select(where: Bool[Array, "S"], new: PyTree, old: PyTree) -> PyTree:
    """The leaves of `new` for some slots, those of `old` for the others."""
    return jax.tree.map(lambda n, o: jnp.where(where.reshape(-1, *[1] * (n.ndim - 1)), n, o), new, old)


def check_stops(stop_sequences: Sequence[Sequence[int]]) -> Stops:
    """Raises ValueError for an empty stop sequence."""
    stops = tuple(tuple(int(token) for token in stop) for stop in stop_sequences)
    if any(not stop for stop in stops):
        raise ValueError("a stop sequence must have at least one token; pass stop_sequences=() to stop by length alone")
    return stops


def check_prompts(width: int, max_length: int) -> None:
    """Raises ValueError for prompts that leave no room."""
    if width >= max_length:
        raise ValueError(
            f"prompts of up to {width} tokens leave no room in max_length={max_length}; "
            "raise max_length or shorten the prompts"
        )


def check_sizes(**sizes: int) -> None:
    """Raises ValueError for a size that is not positive."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _ends_with(tokens: Any, row: Any, known: Any, turn_length: Any, stops: Stops) -> Bool[Array, "S"]:
    """Whether the tokens before `known` end with a stop sequence that lies inside the turn."""
    found = jnp.zeros(row.shape, bool)
    if not stops:
        return found
    longest = max(map(len, stops))
    tail = [tokens.at[row, jnp.maximum(known - 1 - back, 0)].get(mode="fill", fill_value=-1) for back in range(longest)]
    for stop in stops:
        matches = [tail[back] == token for back, token in enumerate(reversed(stop))]
        found = found | (jnp.all(jnp.stack(matches), axis=0) & (turn_length >= len(stop)))
    return found
