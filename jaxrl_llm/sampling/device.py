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

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxrl_kernels.mesh import mesh_axes
from jaxrl_llm.models.decoder import Model
from jaxrl_llm.sampling.constraints import Constraint, start_states
from jaxrl_llm.sampling.slots import (
    Limits,
    Prompts,
    Slots,
    Written,
    answer,
    check_prompts,
    check_sizes,
    check_stops,
    decode,
    finish,
    prefill,
    refill,
    select,
    start,
    turn_of,
)
from jaxrl_llm.types import Decoding, Params, Rollout


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
    constraint: Constraint | None = None,
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
      constraint: what a turn may say (`sampling.constraints`). The rollout then has `free_logprobs` too, and is scored
        under the same constraint.
      group_size: G, episodes per task.
      num_slots: sequences decoded side by side.
      window: how many known tokens a slot takes per step while observations are pending. 1 is best on a CPU, where a
      step
        costs by the token; where it costs by the launch, 8 or 16 shorten the loop.
      wait_fraction: share of the busy slots that gathers before the environment is stepped.

    Raises:
      ValueError: a prompt leaves no room in `max_length`, a size is not positive, or the slots (of fewer rows, the
        rows) do not divide among the devices of the mesh.
    """
    num_tasks = jax.tree.leaves(tasks)[0].shape[0]
    check_sizes(
        num_tasks=num_tasks,
        max_turns=max_turns,
        max_turn_tokens=max_turn_tokens,
        group_size=group_size,
        num_slots=num_slots,
        window=window,
    )
    num_rows, num_slots = num_tasks * group_size, min(num_slots, num_tasks * group_size)
    mesh_axes("slots", num_slots)  # refused where they do not divide
    limits = Limits(max_length, max_turns, max_turn_tokens)
    env_key, token_key = jax.random.split(key)
    # the environment's randomness belongs to the task: all episodes of a group start alike
    states, tokens, lengths = jax.vmap(env.reset)(jax.random.split(env_key, num_tasks), tasks)
    check_prompts(tokens.shape[1], max_length)
    prompts = Prompts(tokens, lengths, states, prefill(model, params, tokens, lengths, num_slots))
    rows = jnp.arange(num_rows)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(token_key, rows)
    row_states = None if constraint is None else start_states(constraint, rows // group_size)
    fixed = (model, params, row_keys, decoding, check_stops(stop_sequences), limits)

    def step(width: int, carry: tuple[Written, Slots]) -> tuple[Written, Slots]:
        return decode(*fixed, width, *carry, constraint, row_states)

    def step_environment(written: Written, slots: Slots) -> tuple[Written, Slots]:
        turn_tokens, turn_lengths = turn_of(written, slots, limits)
        env_state, *answers = jax.vmap(env.step)(slots.env_state, turn_tokens, turn_lengths)
        slots = slots._replace(env_state=select(slots.waiting, env_state, slots.env_state))
        return answer(written, slots, limits, slots.waiting, *answers)

    def advance(carry):
        written, slots, next_row = carry
        written, slots = step_environment(written, slots)
        slots, next_row = refill(prompts, group_size, slots, next_row)
        threshold = jnp.maximum(1, jnp.sum(slots.row < num_rows) * wait_fraction)

        def enough_decide(carry):
            _, slots = carry
            return (jnp.sum(slots.waiting) < threshold) & jnp.any((slots.row < num_rows) & ~slots.waiting)

        def enough_decide_and_pending(carry):
            _, slots = carry
            return enough_decide(carry) & jnp.any((slots.row < num_rows) & (slots.known - slots.fed > 1))

        carry = (written, slots)
        if window > 1:
            carry = jax.lax.while_loop(enough_decide_and_pending, functools.partial(step, window), carry)
        carry = jax.lax.while_loop(enough_decide, functools.partial(step, 1), carry)
        return *carry, next_row

    def unfinished(carry):
        _, slots, next_row = carry
        return (next_row < num_rows) | jnp.any(slots.row < num_rows)

    carry = (*start(model, prompts, limits, group_size, num_slots, constraint is not None), jnp.int32(0))
    written, _, _ = jax.lax.while_loop(unfinished, advance, carry)
    return finish(written, prompts, group_size, decoding)
