"""What the versions of `flash_attention` share: who sees whom, which blocks meet, and how products become logits.

Every query and every key carries two integers, its marks: the segment it belongs to and its position. Causality,
windows, packed segments and the padding up to a whole block are all read off them, so a version that handles the marks
handles every mask there is and can drop none by accident.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

HIDDEN = -1e30  # a logit that is masked: finite, as the difference of two infinities is no number
PADDED_QUERY, PADDED_KEY = 2**31 - 1, -(2**31)  # segments of padding, which differ: padding sees nothing
PADDED_PLACE = 2**30  # its position, behind all others: where all is one segment, it hides padded keys by itself


class Options(NamedTuple):
    """What a kernel is specialized on."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    segmented: bool = True  # false: all is one segment, and causal, so that positions alone tell who sees whom


def visible(
    query: tuple[Int[Array, "*Q"], Int[Array, "*Q"]], key: tuple[Int[Array, "*K"], Int[Array, "*K"]], options: Options
) -> Bool[Array, "*QK"]:
    """Whether a query sees a key, from (segment, position) of each; the shapes broadcast."""
    seen: Array | bool = True
    if options.segmented:
        seen = query[0] == key[0]
    if options.causal:
        seen = seen & (key[1] <= query[1])
    if options.window is not None:
        distance = query[1] - key[1]
        seen = seen & ((distance if options.causal else jnp.abs(distance)) < options.window)
    return seen  # type: ignore[return-value]  # causal where it is not segmented


def logits_of(
    products: Float[Array, "*QK"], options: Options
) -> tuple[Float[Array, "*QK"], Float[Array, "*QK"] | float]:
    """Scaled and capped logits of the products `q . k`, and the derivative of the cap there."""
    logits = products * options.scale
    if options.softcap is None:
        return logits, 1.0
    capped = jnp.tanh(logits / options.softcap)
    return options.softcap * capped, 1 - capped * capped


def pad_rows(x: Array, multiple: int, axis: int, value: int = 0) -> Array:
    """Appends `value` along an axis up to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value)


def pad_marks(marks: Int[Array, "B 2 T"], multiple: int, segment: int) -> Int[Array, "B 2 padded"]:
    """Marks up to a multiple; the padding has a segment of its own and a position behind all others."""
    tail = jnp.broadcast_to(
        jnp.array([[segment], [PADDED_PLACE]], jnp.int32), (*marks.shape[:2], -marks.shape[2] % multiple)
    )
    return jnp.concatenate([marks, tail], axis=2)


def block_bounds(
    query_marks: Int[Array, "B 2 T"], key_marks: Int[Array, "B 2 S"], block_q: int, block_k: int, options: Options
) -> tuple[Int[Array, "B 2 nq"], Int[Array, "B 2 nk"]]:
    """First and last block of keys that a block of queries may see, and the same of queries for a block of keys.

    Read off the smallest and the largest mark of a block, so a block between the two bounds may still be empty, but
    none outside them holds anything visible. Where a block sees none, the first is 0 and the last -1.
    """

    query_low, query_high, key_low, key_high = _mark_ranges(query_marks, key_marks, block_q, block_k)
    meet = (query_low[:, 0] <= key_high[:, 0]) & (key_low[:, 0] <= query_high[:, 0])
    if options.causal:
        meet = meet & (key_low[:, 1] <= query_high[:, 1])
    if options.window is not None:
        meet = meet & (query_low[:, 1] - key_high[:, 1] < options.window)
        if not options.causal:
            meet = meet & (key_low[:, 1] - query_high[:, 1] < options.window)
    return _first_and_last(meet), _first_and_last(meet.swapaxes(1, 2))


def whole_bounds(
    query_marks: Int[Array, "B 2 T"], key_marks: Int[Array, "B 2 S"], block_q: int, block_k: int, options: Options
) -> tuple[Int[Array, "B 2 nq"], Int[Array, "B 2 nk"]]:
    """First and last of a run of blocks of keys all of which a block of queries sees whole, and the other way round.

    There, no mask needs to be computed. It is the first run of such blocks; 0 and -1 where there is none.
    """
    query_low, query_high, key_low, key_high = _mark_ranges(query_marks, key_marks, block_q, block_k)
    whole = jnp.ones(jnp.broadcast_shapes(query_low[:, 0].shape, key_low[:, 0].shape), bool)
    if options.segmented:
        whole = (query_low[:, 0] == key_high[:, 0]) & (query_high[:, 0] == key_low[:, 0])
    if options.causal:
        whole = whole & (key_high[:, 1] <= query_low[:, 1])
    if options.window is not None:
        whole = whole & (query_high[:, 1] - key_low[:, 1] < options.window)
        if not options.causal:
            whole = whole & (key_high[:, 1] - query_low[:, 1] < options.window)

    def run(whole):
        begun = jnp.cumsum(whole, axis=-1) > 0
        return _first_and_last(whole & (jnp.cumsum(begun & ~whole, axis=-1) == 0))

    return run(whole), run(whole.swapaxes(1, 2))


def _mark_ranges(query_marks, key_marks, block_q: int, block_k: int) -> tuple[Array, Array, Array, Array]:
    """Smallest and largest marks of blocks of queries [B, 2, nq, 1] and of keys [B, 2, 1, nk]."""

    def ranges(marks, block):
        blocks = marks.reshape(marks.shape[0], 2, -1, block)
        return blocks.min(-1), blocks.max(-1)

    query_low, query_high = (x[..., None] for x in ranges(query_marks, block_q))
    key_low, key_high = (x[:, :, None] for x in ranges(key_marks, block_k))
    return query_low, query_high, key_low, key_high


def _first_and_last(meet: Bool[Array, "B n m"]) -> Int[Array, "B 2 n"]:
    some = jnp.any(meet, axis=-1)
    first = jnp.where(some, jnp.argmax(meet, axis=-1), 0)
    last = jnp.where(some, meet.shape[-1] - 1 - jnp.argmax(meet[..., ::-1], axis=-1), -1)
    return jnp.stack([first, last], axis=1).astype(jnp.int32)
