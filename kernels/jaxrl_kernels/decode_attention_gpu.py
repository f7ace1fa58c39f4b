"""`decode_attention` in Pallas through Triton for GPUs: the keys of a slot are split over programs (Dao et al. 2023,
https://pytorch.org/blog/flash-decoding).

A program has one slot, one key head (up to 64 rows of it) and a share of the blocks of keys that the slot's queries
see, whose pages it looks up as it goes. It leaves an output, a peak and a sum for each row, and plain XLA joins those
of all shares. There are as many shares as it takes to fill the device, and one slot that is much longer than the others
is no longer the work of one program.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from jaxrl_kernels.attention_mask import HIDDEN, Options, logits_of
from jaxrl_kernels.decode_attention_layout import LOWEST, Sight, join_shares, share_bounds, split_heads
from jaxrl_kernels.tiles import dot

PROGRAMS = 1024  # about eight for each of the 108 to 144 multiprocessors of an A100, H100 or H200
MOST_ROWS, MOST_KEYS = 64, 64  # of a program's tiles
TILE_BYTES = 16 * 2**10  # of keys, and as much of values, twice as two steps overlap: fits any GPU since Ampere
FEWEST_KEYS = 256  # of a share: less is not worth a program and its part in the joining


def attend(
    options: Options,
    q: Float[Array, "S T H D"],
    k_pages: Float[Array, "P KV D page"],
    v_pages: Float[Array, "P KV page D"],
    page_table: Int[Array, "S M"] | None,
    sight: Sight,
    sinks: Float[Array, "H"] | None,
    *,
    interpret: bool = False,
) -> Float[Array, "S T H D"]:
    """Attention over the pages that each slot's queries see."""
    (slots, length), (num_pages, num_kv, width, page) = q.shape[:2], k_pages.shape
    rows = split_heads(q, num_kv)
    table = jnp.arange(slots, dtype=jnp.int32)[:, None] if page_table is None else page_table
    # Triton's tiles are powers of two, and the sides of a product at least 16.
    num_rows = max(16, min(pl.next_power_of_2(rows.shape[2]), MOST_ROWS))
    row_blocks, columns = pl.cdiv(rows.shape[2], num_rows), max(16, pl.next_power_of_2(width))
    fitting = max(16, TILE_BYTES // (columns * k_pages.dtype.itemsize))
    block = max(16, min(pl.next_power_of_2(page), fitting, MOST_KEYS))
    shares = max(1, min(pl.cdiv(PROGRAMS, slots * num_kv * row_blocks), pl.cdiv(table.shape[1] * page, FEWEST_KEYS)))

    def spec(shape, index):
        return pl.BlockSpec(shape, lambda x, i, s: index(s, jax.lax.div(x, row_blocks), i, jax.lax.rem(x, row_blocks)))

    results = pl.pallas_call(
        functools.partial(_kernel, options, length, block, row_blocks),
        grid=(num_kv * row_blocks, shares, slots),
        in_specs=[
            spec((None, table.shape[1]), lambda s, h, i, r: (s, 0)),
            spec((None, None, 2), lambda s, h, i, r: (s, i, 0)),
            *[spec((None, length), lambda s, h, i, r: (s, 0))] * 2,
            spec((None, None, *rows.shape[2:]), lambda s, h, i, r: (s, h, 0, 0)),
            *[spec((num_pages, None, *x.shape[2:]), lambda s, h, i, r: (0, h, 0, 0)) for x in (k_pages, v_pages)],
        ],
        out_specs=[
            spec((None, None, None, num_rows, columns), lambda s, h, i, r: (s, h, i, r, 0)),
            *[spec((None, None, None, num_rows), lambda s, h, i, r: (s, h, i, r))] * 2,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((slots, num_kv, shares, row_blocks * num_rows, columns), jnp.float32),
            *[jax.ShapeDtypeStruct((slots, num_kv, shares, row_blocks * num_rows), jnp.float32)] * 2,
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )(table, share_bounds(sight, page, block, shares), sight.first, sight.end, rows, k_pages, v_pages)
    totals, peaks, sums = (x[:, :, :, : rows.shape[2]] for x in results)
    return join_shares(totals[..., :width], peaks, sums, sinks, length).astype(q.dtype)


def _kernel(options, length, block, row_blocks, table, bounds, first, end, rows, k_pages, v_pages, total, peak, sums):
    num_rows, columns = total.shape
    width, page = k_pages.shape[1:]
    parts = pl.cdiv(page, block)
    row = jax.lax.rem(pl.program_id(0), row_blocks) * num_rows + jnp.arange(num_rows)
    dim = jnp.arange(columns)
    queries = plgpu.load(
        rows.at[row[:, None], dim[None]], mask=(row[:, None] < rows.shape[0]) & (dim[None] < width), other=0
    )
    query = jax.lax.rem(row, length)
    lower, upper = plgpu.load(first.at[query])[:, None], plgpu.load(end.at[query])[:, None]

    def step(index, carry):
        old, sum_before, total_before = carry
        number, inside = table[jax.lax.div(index, parts)], jax.lax.rem(index, parts) * block + jnp.arange(block)
        exists = inside < page
        keys = plgpu.load(
            k_pages.at[number, dim[:, None], inside[None]], mask=(dim[:, None] < width) & exists[None], other=0
        )
        values = plgpu.load(
            v_pages.at[number, inside[:, None], dim[None]], mask=exists[:, None] & (dim[None] < width), other=0
        )
        logits, _ = logits_of(dot(queries, keys, 1, 0), options)
        places = (jax.lax.div(index, parts) * page + inside)[None]
        seen = (places < upper) & exists[None]
        if options.window is not None:
            seen = seen & (places >= lower)
        logits = jnp.where(seen, logits, HIDDEN)
        new = jnp.maximum(old, jnp.max(logits, axis=1))
        weights, shrink = jnp.exp(logits - new[:, None]), jnp.exp(old - new)
        product = dot(weights.astype(values.dtype), values, 1, 0)
        return new, sum_before * shrink + jnp.sum(weights, axis=1), total_before * shrink[:, None] + product

    none = jnp.full(num_rows, LOWEST, jnp.float32), jnp.zeros(num_rows, jnp.float32)
    carry = jax.lax.fori_loop(bounds[0], bounds[1], step, (*none, jnp.zeros((num_rows, columns), jnp.float32)))
    peak[...], sums[...], total[...] = carry
