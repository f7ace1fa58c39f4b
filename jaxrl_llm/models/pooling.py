"""From the states of a row's tokens to one vector."""

from __future__ import annotations

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Pooling = Literal["mean", "cls", "last", "max"]


def pool_hidden(hidden: Float[Array, "B T D"], mask: Bool[Array, "B T"], how: Pooling = "mean") -> Float[Array, "B D"]:
    """One vector a row, in float32: the mean or the maximum of the states of its real tokens, or the state of the first
    (`cls`) or the last of them. Padding may lie on either side; a row without real tokens gives zeros.

    Args:
      mask: true at real tokens.

    Raises:
      ValueError: `how` is something else.
    """
    if how not in get_args(Pooling):
        raise ValueError(f"how must be one of {list(get_args(Pooling))}, got {how!r}")
    hidden, mask = hidden.astype(jnp.float32), mask.astype(bool)
    some = mask.any(axis=1)[:, None]
    if how == "mean":
        # where, not a product: what a masked state holds, NaN included, must not count
        total = jnp.where(mask[..., None], hidden, 0.0).sum(axis=1)
        return total / jnp.maximum(mask.sum(axis=1), 1)[:, None]
    if how == "max":
        return jnp.where(some, jnp.where(mask[..., None], hidden, -jnp.inf).max(axis=1), 0.0)
    place = jnp.argmax(mask, axis=1) if how == "cls" else mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    chosen = jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]
    return jnp.where(some, chosen, 0.0)
