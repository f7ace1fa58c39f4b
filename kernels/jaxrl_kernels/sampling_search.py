"""Thresholds and positions by bisection: which tokens the sampling filters keep, without a sort.

Every filter keeps the tokens from some logit upwards. That logit is the smallest float at which a condition holds that
holds from there on: fewer than `top_k` logits are larger, or those that are larger have less than `top_p` of the
probability. Floats are ordered as their bits are (after a map of the negative ones), so 32 halvings find it exactly,
and each costs one pass over data that lies in the cache or on the chip. Ties stay together by construction.

The XLA version and the kernels share what stands here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_kernels.dispatch import choose

CACHED = 2**15  # logits of the rows that are worked on together on a CPU: 128 KiB, and as much again for the weights


class Filters(NamedTuple):
    """Options of `sample_tokens`, checked, without the ones that keep everything."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    greedy: bool = False

    @property
    def search(self) -> bool:
        """Whether a threshold has to be searched for; min-p's is known."""
        return self.top_k is not None or self.top_p < 1


def smallest(
    low: Int[Array, "*B"], high: Int[Array, "*B"], holds: Callable[[Array], Bool[Array, "*B"]], steps: int
) -> Int[Array, "*B"]:
    """The smallest integer between `low` and `high`, both included, at which a monotone condition holds; `high` where
    it holds nowhere below. At most 2 to the power of `steps` integers."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean rounded down, without overflow
        found = holds(middle)
        return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

    return jax.lax.fori_loop(0, steps, halve, (low, high))[1]


def smallest_float(
    low: Float[Array, "*B"], high: Float[Array, "*B"], holds: Callable[[Array], Bool[Array, "*B"]]
) -> Float[Array, "*B"]:
    """As `smallest`, over all float32 numbers between two."""
    place = smallest(_to_place(low), _to_place(high), lambda middle: holds(_to_float(middle)), 32)
    return _to_float(place)


def _to_place(x: Float[Array, "*B"]) -> Int[Array, "*B"]:
    """Integers in the order of the floats: the bits, of negative numbers all but the sign turned around."""
    return _turn(_bitcast(x, jnp.int32))


def _to_float(place: Int[Array, "*B"]) -> Float[Array, "*B"]:
    return _bitcast(_turn(place), jnp.float32)


def _bitcast(x: Array, dtype: jnp.dtype) -> Array:
    """The same bits. A number alone, which a kernel on Hopper holds for its row, goes through a vector: Mosaic casts
    no other."""
    if x.ndim:
        return jax.lax.bitcast_convert_type(x, dtype)
    return jnp.max(jax.lax.bitcast_convert_type(jnp.broadcast_to(x, 128), dtype))


def _turn(bits: Int[Array, "*B"]) -> Int[Array, "*B"]:
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def threshold(
    peak: Float[Array, "N 1"],
    filters: Filters,
    count_above: Callable[[Array], Int[Array, "N 1"]],
    mass_above: Callable[[Array], Float[Array, "N 1"]],
    mass_from: Callable[[Array], Float[Array, "N 1"]],
) -> Float[Array, "N 1"]:
    """The smallest logit over temperature that top-k, then top-p among what is left, then min-p keep.

    The three functions take a logit per row and give how many logits are larger, their weight `exp(logit - peak)`, and
    the weight of all from it upwards. Each must add up in one order, whatever the logit: then rounding leaves them
    monotone.
    """
    floor = jnp.full_like(peak, -jnp.inf)
    if (top_k := filters.top_k) is not None:
        floor = smallest_float(floor, peak, lambda logit: count_above(logit) < top_k)
    if filters.top_p < 1:
        enough = filters.top_p * mass_from(floor)
        floor = smallest_float(floor, peak, lambda logit: mass_above(logit) < enough)
    if filters.min_p > 0:
        floor = jnp.maximum(floor, peak + math.log(filters.min_p))
    return floor


def row_threshold(scaled: Float[Array, "N V"], filters: Filters) -> Float[Array, "N 1"]:
    """`threshold` of whole rows in XLA. One row at least must fit the cache for this to be quick."""
    peak = jnp.max(scaled, axis=-1, keepdims=True)
    # Only logits that may lie above the threshold are looked at in every pass.
    top = scaled if filters.top_k is None else _blocks_of_largest(scaled, filters.top_k)
    weights = jnp.exp(top - peak)

    def add(x):
        return jnp.sum(x, axis=-1, keepdims=True)

    return threshold(
        peak,
        filters,
        count_above=lambda logit: add((top > logit).astype(jnp.int32)),
        mass_above=lambda logit: add(jnp.where(top > logit, weights, 0)),
        mass_from=lambda logit: add(jnp.where(scaled >= logit, jnp.exp(scaled - peak), 0)),
    )


def _blocks_of_largest(scaled: Float[Array, "N V"], num: int) -> Float[Array, "N M"]:
    """The `num` blocks with the largest maxima. They hold every logit that fewer than `num` others exceed, but perhaps
    not all that are equal to the smallest of those."""
    num_rows, vocab = scaled.shape
    width = 2 ** round(math.log2(max(1.0, math.sqrt(vocab / num))))  # as many maxima as logits in the chosen blocks
    if 2 * num * width > vocab:
        return scaled
    blocks = jnp.pad(scaled, ((0, 0), (0, -vocab % width)), constant_values=-jnp.inf).reshape(num_rows, -1, width)
    chosen = jax.lax.top_k(jnp.max(blocks, axis=-1), num)[1]
    return jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(num_rows, -1)


def by_rows(function: Callable, rows: int) -> Callable:
    """`function` of arrays with N rows, called for a few of them at a time, so that what they need stays cached."""

    def grouped(*arrays):
        if arrays[0].shape[0] <= rows:
            return function(*arrays)
        one = lambda row: jax.tree.map(lambda x: x[0], function(*(x[None] for x in row)))  # noqa: E731
        return jax.lax.map(one, arrays, batch_size=rows)

    return grouped


def filtered_logits(scaled: Float[Array, "N V"], filters: Filters) -> Float[Array, "N V"]:
    """Minus infinity where the filters exclude a token; NaN stays. No gradient flows through the choice."""
    if not filters.search and filters.min_p == 0:
        return scaled
    find = lambda rows: row_threshold(rows, filters)  # noqa: E731
    mapped = by_rows(find, max(1, CACHED // scaled.shape[1])) if filters.search else find
    floor = choose(None, cpu=mapped, tpu=find, gpu=find)(jax.lax.stop_gradient(scaled))
    return jnp.where(scaled < floor, -jnp.inf, scaled)
