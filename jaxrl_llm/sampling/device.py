"""Multi-turn rollouts on the device: prompt, decode, tool call, observation, next turn, reward, in one `jit`.

A fixed number of slots decode side by side. The two nested loops are:

    until every sequence is finished:
        step the environment for the slots whose turn is over, append observations, write down rewards
        refill the slots whose sequence is finished from the queue
        until enough slots wait for the environment:
            feed each slot its next known tokens; where none are left, sample one

The environment runs only in the outer loop, so waiting slots gather and its cost is shared. What is already known (the
last prompt token, an observation) goes through the same step as a sampled token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxrl_kernels import sample_tokens
from jaxrl_llm.models.decoder import Cache, Model, output_logits, replace_prefix
from jaxrl_llm.types import Decoding, Params, Rollout


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


def rollout(
    model: Model,
    params: Params,
    env: Any,
    tasks: PyTree,
    key: jax.Array,
    *,
    max_length: int,
    max_turns: int,
    max_turn_tokens: int,
    stop_sequences: Sequence[Sequence[int]] = (),
    decoding: Decoding = Decoding(),
    group_size: int = 1,
    num_slots: int = 64,
    window: int = 1,
    wait_fraction: float = 0.125,
) -> Rollout:
    """Plays `group_size` episodes of every task and returns them with a group's episodes side by side.

    The prompt of a task is prefilled once and shared by its group. Each sampled token uses one uniform number folded
    from (key, sequence, position), so that a sample depends neither on the slot it ran in nor on the number of slots.

    Args:
      model, params: the policy.
      env: a device environment (`envs.DeviceEnv`) for one episode; it is vmapped here.
      tasks: pytree with leading axis P, a task per prompt, for `env.reset(key, task)`.
      key: consumed; split between the environment's resets and the tokens.
      max_length: T, prompt and observations included. A sequence that fills it is returned marked `truncated`.
      max_turns: K, turns per episode. max_turn_tokens: a turn ends there even without a stop sequence.
      stop_sequences: token sequences of which the last token ends a turn. None: turns end by `max_turn_tokens` alone.
      decoding: how tokens are drawn; recorded in the rollout.
      group_size: G, episodes per task.
      num_slots: sequences decoded side by side.
      window: how many known tokens a slot takes per step while observations are pending. 1 is best on a CPU, where a
      step
        costs by the token; where it costs by the launch, 8 or 16 shorten the loop.
      wait_fraction: share of the busy slots that gathers before the environment is stepped.

    Raises:
      ValueError: a prompt leaves no room in `max_length`, or a size is not positive.
    """
    num_tasks = jax.tree.leaves(tasks)[0].shape[0]
    _check_sizes(
        num_tasks=num_tasks,
        max_turns=max_turns,
        max_turn_tokens=max_turn_tokens,
        group_size=group_size,
        num_slots=num_slots,
        window=window,
    )
    num_rows, num_slots = num_tasks * group_size, min(num_slots, num_tasks * group_size)
    env_key, token_key = jax.random.split(key)
    # the environment's randomness belongs to the task: all episodes of a group start alike
    states, prompts, prompt_lengths = jax.vmap(env.reset)(jax.random.split(env_key, num_tasks), tasks)
    if prompts.shape[1] >= max_length:
        raise ValueError(
            f"prompts of up to {prompts.shape[1]} tokens leave no room in max_length={max_length}; "
            "raise max_length or shorten the prompts"
        )
    prompt_cache = _prefill(model, params, prompts, prompt_lengths, num_slots)
    stops = _pad_stops(stop_sequences)
    group_of = jnp.arange(num_rows + 1) // group_size  # one row more: the empty slot's

    def refill(slots: Slots, next_row: Int[Array, ""]) -> tuple[Slots, Int[Array, ""]]:
        empty = slots.row == num_rows
        candidate = next_row + jnp.cumsum(empty) - 1
        fresh = empty & (candidate < num_rows)
        row = jnp.where(fresh, candidate, slots.row)
        group = group_of[jnp.minimum(row, num_rows - 1)]
        length = prompt_lengths[group]

        slots = Slots(
            row=row,
            known=jnp.where(fresh, length, slots.known),
            fed=jnp.where(fresh, length - 1, slots.fed),  # the last prompt token is fed again, for its logits
            turn=jnp.where(fresh, 0, slots.turn),
            turn_start=jnp.where(fresh, length, slots.turn_start),
            waiting=slots.waiting & ~fresh,
            env_state=_select(fresh, jax.tree.map(lambda x: x[group], states), slots.env_state),
            cache=replace_prefix(slots.cache, jax.tree.map(lambda x: x[group], prompt_cache), fresh),
        )
        return slots, next_row + jnp.sum(fresh)

    def step_environment(written: Written, slots: Slots) -> tuple[Written, Slots]:
        offsets = jnp.arange(max_turn_tokens)
        turn_tokens = written.tokens.at[slots.row[:, None], slots.turn_start[:, None] + offsets].get(
            mode="fill", fill_value=0
        )
        turn_lengths = jnp.where(slots.waiting, slots.known - slots.turn_start, 0)
        turn_tokens = jnp.where(offsets < turn_lengths[:, None], turn_tokens, 0)
        env_state, observation, length, reward, done = jax.vmap(env.step)(slots.env_state, turn_tokens, turn_lengths)

        room = max_length - slots.known
        over = slots.waiting & (done | (slots.turn + 1 == max_turns) | (length >= room))
        length = jnp.where(slots.waiting & ~over, length, 0)
        offsets = jnp.arange(observation.shape[1])
        columns = jnp.where(offsets < length[:, None], slots.known[:, None] + offsets, max_length)
        rows = jnp.where(slots.waiting, slots.row, num_rows)
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
            turn=slots.turn + slots.waiting,
            turn_start=jnp.where(slots.waiting, known, slots.turn_start),
            waiting=jnp.zeros_like(slots.waiting),
            env_state=_select(slots.waiting, env_state, slots.env_state),
        )

    def decode(width: int, written: Written, slots: Slots) -> tuple[Written, Slots]:
        active = (slots.row < num_rows) & ~slots.waiting
        columns = slots.fed[:, None] + jnp.arange(width)
        taken = active[:, None] & (columns < slots.known[:, None])
        tokens = written.tokens.at[slots.row[:, None], columns].get(mode="fill", fill_value=0)
        hidden, cache = model.apply(params, tokens, positions=jnp.where(taken, columns, -1), cache=slots.cache)
        num_taken = jnp.sum(taken, axis=1)
        fed = slots.fed + num_taken
        sampling = active & (fed == slots.known)

        last = jnp.take_along_axis(hidden, jnp.maximum(num_taken - 1, 0)[:, None, None], axis=1)[:, 0]
        token, logprob = _draw(output_logits(model, params, last), token_key, slots.row, slots.known, decoding)

        rows = jnp.where(sampling, slots.row, num_rows)  # out of range: dropped
        written = written._replace(
            tokens=written.tokens.at[rows, slots.known].set(token, mode="drop"),
            mask=written.mask.at[rows, slots.known].set(True, mode="drop"),
            logprobs=written.logprobs.at[rows, slots.known].set(logprob, mode="drop"),
            turn_ids=written.turn_ids.at[rows, slots.known].set(slots.turn, mode="drop"),
        )
        known = slots.known + sampling
        turn_length = known - slots.turn_start
        stopped = _ends_with(written.tokens, slots.row, known, turn_length, stops)
        ended = sampling & (stopped | (turn_length == max_turn_tokens) | (known == max_length))
        return written, slots._replace(known=known, fed=fed, waiting=slots.waiting | ended, cache=cache)

    def advance(carry):
        written, slots, next_row = carry
        written, slots = step_environment(written, slots)
        slots, next_row = refill(slots, next_row)
        threshold = jnp.maximum(1, jnp.sum(slots.row < num_rows) * wait_fraction)

        def enough_decide(carry):
            _, slots = carry
            return (jnp.sum(slots.waiting) < threshold) & jnp.any((slots.row < num_rows) & ~slots.waiting)

        def enough_decide_and_pending(carry):
            _, slots = carry
            return enough_decide(carry) & jnp.any((slots.row < num_rows) & (slots.known - slots.fed > 1))

        carry = (written, slots)
        if window > 1:
            carry = jax.lax.while_loop(enough_decide_and_pending, lambda carry: decode(window, *carry), carry)
        carry = jax.lax.while_loop(enough_decide, lambda carry: decode(1, *carry), carry)
        return *carry, next_row

    rows = jnp.arange(num_rows)
    written = Written(
        tokens=jnp.zeros((num_rows, max_length), jnp.int32).at[:, : prompts.shape[1]].set(prompts[rows // group_size]),
        mask=jnp.zeros((num_rows, max_length), bool),
        logprobs=jnp.zeros((num_rows, max_length), jnp.float32),
        turn_ids=jnp.full((num_rows, max_length), -1, jnp.int32),
        lengths=prompt_lengths[rows // group_size],
        turn_rewards=jnp.zeros((num_rows, max_turns), jnp.float32),
        turn_mask=jnp.zeros((num_rows, max_turns), bool),
        truncated=jnp.zeros(num_rows, bool),
    )
    zeros = jnp.zeros(num_slots, jnp.int32)
    slots = Slots(
        row=jnp.full(num_slots, num_rows, jnp.int32),
        known=zeros,
        fed=zeros,
        turn=zeros,
        turn_start=zeros,
        waiting=jnp.zeros(num_slots, bool),
        env_state=jax.tree.map(lambda x: jnp.zeros((num_slots, *x.shape[1:]), x.dtype), states),
        cache=model.init_cache(num_slots, max_length, prompt_cache[0]["keys"].dtype),
    )

    def unfinished(carry):
        _, slots, next_row = carry
        return (next_row < num_rows) | jnp.any(slots.row < num_rows)

    written, _, _ = jax.lax.while_loop(unfinished, advance, (written, slots, jnp.int32(0)))
    return _finish(written, prompt_lengths[rows // group_size], rows // group_size, decoding)


def _finish(written: Written, prompt_lengths, group_ids, decoding: Decoding) -> Rollout:
    # the prompt buffer may reach beyond a short prompt: what lies behind a sequence is padding
    inside = jnp.arange(written.tokens.shape[1]) < written.lengths[:, None]
    scorable = ~jnp.any(jnp.isnan(written.turn_rewards) & written.turn_mask, axis=1)
    turn_rewards = jnp.where(written.turn_mask & scorable[:, None], written.turn_rewards, 0)
    return Rollout(
        tokens=jnp.where(inside, written.tokens, 0),
        lengths=written.lengths,
        prompt_lengths=prompt_lengths,
        mask=written.mask,
        logprobs=written.logprobs,
        turn_ids=written.turn_ids,
        group_ids=group_ids,
        rewards=jnp.sum(turn_rewards, axis=1),
        scorable=scorable,
        turn_rewards=turn_rewards,
        turn_mask=written.turn_mask,
        truncated=written.truncated,
        decoding=decoding,
    )


def _prefill(model: Model, params: Params, prompts, prompt_lengths, batch_size: int) -> Cache:
    """Keys and values of all prompts, `batch_size` prompts at a time."""
    steps = jnp.arange(prompts.shape[1])

    def one_batch(batch):
        tokens, lengths = batch
        positions = jnp.where(steps < lengths[:, None], steps, -1)
        cache = model.init_cache(tokens.shape[0], tokens.shape[1])
        return model.apply(params, tokens, positions=positions, cache=cache)[1]

    if prompts.shape[0] <= batch_size:
        return one_batch((prompts, prompt_lengths))
    pad = -prompts.shape[0] % batch_size
    batches = jax.tree.map(
        lambda x: jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, batch_size, *x.shape[1:]),
        (prompts, prompt_lengths),
    )
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(one_batch, batches))


def _draw(logits, key, row, position, decoding: Decoding) -> tuple[Int[Array, "S"], Float[Array, "S"]]:
    keys = jax.vmap(lambda r, p: jax.random.fold_in(jax.random.fold_in(key, r), p))(row, position)
    return sample_tokens(logits, keys, **dataclasses.asdict(decoding))


def _pad_stops(stop_sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    stops = [list(stop) for stop in stop_sequences]
    if any(not stop for stop in stops):
        raise ValueError("a stop sequence must have at least one token; pass stop_sequences=() to stop by length alone")
    return stops


def _ends_with(tokens, row, known, turn_length, stops: list[list[int]]) -> Bool[Array, "S"]:
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


def _select(where: Bool[Array, "S"], new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda n, o: jnp.where(where.reshape(-1, *[1] * (n.ndim - 1)), n, o), new, old)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
