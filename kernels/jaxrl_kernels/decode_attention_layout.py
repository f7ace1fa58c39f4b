"""What the versions of `decode_attention` share: the keys that a query sees, and the rows of a key head."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

LOWEST = -1e29  # the peak of a row before its first logit: far above a masked one, whose weight is then exactly 0


class Sight(NamedTuple):
    """Places of the cache: query t of slot s sees those from first to before end, no query any outside low to high."""

    first: Int[Array, "S T"]
    end: Int[Array, "S T"]
    low: Int[Array, "S"]
    high: Int[Array, "S"]


def split_heads(q: Float[Array, "S T H D"], num_kv: int) -> Float[Array, "S KV R D"]:
    """All queries of a key head as rows of one matrix: row `g * T + t` is query t of the g-th head of the group."""
    slots, length, heads, width = q.shape
    q = q.reshape(slots, length, num_kv, heads // num_kv, width).transpose(0, 2, 3, 1, 4)
    return q.reshape(slots, num_kv, -1, width)


def join_heads(rows: Float[Array, "S KV R D"], length: int) -> Float[Array, "S T H D"]:
    """The inverse of `split_heads`."""
    slots, num_kv, num_rows, width = rows.shape
    rows = rows.reshape(slots, num_kv, num_rows // length, length, width).transpose(0, 3, 1, 2, 4)
    return rows.reshape(slots, length, -1, width)


def split_sinks(sinks: Float[Array, "H"], num_kv: int, length: int) -> Float[Array, "KV R"]:
    """The sink of each row of `split_heads`."""
    return sinks.astype("float32").reshape(num_kv, -1).repeat(length, axis=1)


def share_bounds(sight: Sight, page: int, block: int, shares: int) -> Int[Array, "S shares 2"]:
    """First block of each share and the one behind its last; a page that is no multiple of a block ends with a part."""

    def block_of(place):
        return place // page * pl.cdiv(page, block) + place % page // block

    start = block_of(sight.low)
    stop = jnp.where(sight.high > sight.low, block_of(jnp.maximum(sight.high - 1, 0)) + 1, start)
    size = -(-(stop - start) // shares)
    starts = jnp.minimum(start[:, None] + size[:, None] * jnp.arange(shares), stop[:, None])
    return jnp.stack([starts, jnp.minimum(starts + size[:, None], stop[:, None])], axis=2).astype(jnp.int32)


def join_shares(
    totals: Float[Array, "S KV shares R D"],
    peaks: Float[Array, "S KV shares R"],
    sums: Float[Array, "S KV shares R"],
    sinks: Float[Array, "H"] | None,
    length: int,
) -> Float[Array, "S T H D"]:
    """The output, from what each share of the keys left: weighted values, and the peak and the sum of the weights."""
    peak = jnp.max(peaks, axis=2)
    if sinks is not None:
        sink = split_sinks(sinks, peaks.shape[1], length)
        peak = jnp.maximum(peak, sink)
    shrink = jnp.exp(peaks - peak[:, :, None])
    sum_of_all = jnp.sum(sums * shrink, axis=2)
    if sinks is not None:
        sum_of_all = sum_of_all + jnp.exp(sink - peak)
    total = jnp.sum(totals * shrink[..., None], axis=2)
    return join_heads(total / jnp.where(sum_of_all > 0, sum_of_all, 1)[..., None], length)
