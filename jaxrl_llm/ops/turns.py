"""Between turns and tokens: values of turns (or tree nodes) spread over tokens, rewards put on a turn's last token."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.ops._checks import check_choice, check_ids_below, check_shapes
from jaxrl_llm.ops.masked import select

OutcomeMode = Literal["add", "replace"]


def broadcast_values(
    values: Float[Array, "B K"] | Float[Array, "S"] | Float[Array, "B"], ids: Int[Array, "B T"] | Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Hands each token the value it belongs to, and 0 to a token that belongs to none.

    Three forms: values [B, K] by turn with `turn_ids`; values [S] by tree node with node ids; values [B] by sequence
    with a boolean mask. An id of -1 gives 0.

    Raises:
      ValueError: shapes that fit none of the forms; outside jit also an id beyond the values.
    """
    if ids.dtype == bool:
        check_shapes(values=(values, "B"), ids_mask=(ids, "B T"))
        return select(values[:, None], ids)
    by_row = values.ndim == 2
    check_shapes(values=(values, "B K" if by_row else "S"), ids=(ids, "B T"))
    num = values.shape[-1]
    check_ids_below("ids", ids, num)
    inside = (ids >= 0) & (ids < num)
    slots = jnp.where(inside, ids, 0)
    return select(jnp.take_along_axis(values, slots, axis=1) if by_row else values[slots], inside)


def place_turn_rewards(turn_rewards: Float[Array, "B K"], turn_ids: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Puts the reward of each turn on its last policy token; 0 elsewhere.

    A turn without a policy token has no place for its reward, which is left out: the result then sums to less.

    Raises:
      ValueError: shapes; outside jit also a turn id of K or more.
    """
    check_shapes(turn_rewards=(turn_rewards, "B K"), turn_ids=(turn_ids, "B T"))
    num_turns = turn_rewards.shape[1]
    check_ids_below("turn_ids", turn_ids, num_turns)
    positions = jnp.arange(turn_ids.shape[1])
    # Ids outside 0..K-1 go to a slot of their own, which broadcast_values never reads.
    slots = jnp.where((turn_ids >= 0) & (turn_ids < num_turns), turn_ids, num_turns)
    last = jax.vmap(lambda ids: jax.ops.segment_max(positions, ids, num_segments=num_turns + 1))(slots)
    is_last = jnp.take_along_axis(last, slots, axis=1) == positions
    return broadcast_values(turn_rewards, jnp.where(is_last & (slots < num_turns), turn_ids, -1))


def last_turn_mask(turn_mask: Bool[Array, "... K"]) -> Bool[Array, "... K"]:
    """True at the last true entry of each row (the last real turn, the last policy token); nowhere in an empty row."""
    check_shapes(turn_mask=(turn_mask, "... K"))
    remaining = jnp.flip(jnp.cumsum(jnp.flip(turn_mask, -1), axis=-1), -1)
    return turn_mask & (remaining == 1)


def add_outcome(
    turn_rewards: Float[Array, "B K"],
    outcome: Float[Array, "B"],
    turn_mask: Bool[Array, "B K"],
    *,
    mode: OutcomeMode = "add",
) -> Float[Array, "B K"]:
    """Adds the outcome reward to the last real turn of a row, or replaces that turn's reward; 0 off the mask."""
    check_shapes(turn_rewards=(turn_rewards, "B K"), outcome=(outcome, "B"), turn_mask=(turn_mask, "B K"))
    check_choice("mode", mode, OutcomeMode)
    last = last_turn_mask(turn_mask)
    kept = turn_mask if mode == "add" else turn_mask & ~last
    return select(turn_rewards, kept) + select(outcome[:, None], last)
