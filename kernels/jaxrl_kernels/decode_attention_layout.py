"""What the versions of `decode_attention` share: the keys that a query sees, and the rows of a key head."""

from __future__ import annotations

from typing import NamedTuple

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
