"""Masks and pieces of token sequences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def span_mask(tokens: Int[Array, "... T"], open_id: int, close_id: int) -> Bool[Array, "... T"]:
    """True from every opening token to the closing one that belongs to it, both included.

    Spans may nest. One that is never closed goes on to the end of the row; a closing token that closes nothing is
    outside. `mask & ~span_mask(...)` leaves what a policy wrote as information, or as thoughts, out of a loss.

    Raises:
      ValueError: the two ids are equal.
    """
    if open_id == close_id:
        raise ValueError(f"open_id and close_id must differ, got {open_id} for both")
    opens, closes = tokens == open_id, tokens == close_id
    steps = opens.astype(jnp.int32) - closes.astype(jnp.int32)
    total = jnp.cumsum(steps, axis=-1)
    # A closing token too many does not count: the depth is measured from the lowest point so far.
    depth = total - jnp.minimum(jax.lax.cummin(total, axis=total.ndim - 1), 0)
    before = jnp.pad(depth[..., :-1], [(0, 0)] * (depth.ndim - 1) + [(1, 0)])
    return (depth > 0) | (closes & (before > 0))
