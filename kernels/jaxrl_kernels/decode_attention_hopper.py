"""`decode_attention` for Hopper GPUs (H100, H200) in Pallas through Mosaic GPU: the keys of a slot are split over
blocks of the grid (Dao et al. 2023, https://pytorch.org/blog/flash-decoding).

A block has one slot, one key head (up to 64 rows of it, as wgmma has no fewer) and a share of the keys that the slot's
queries see. One warpgroup looks up pages and copies 64 keys and values at a time (TMA), up to four such steps ahead of
the other one, which computes. Outputs of the shares are joined in plain XLA.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jaxrl_kernels.attention_hopper import LOG2E, scaled_logits
from jaxrl_kernels.attention_mask import HIDDEN, Options, pad_rows
from jaxrl_kernels.decode_attention_layout import Sight, join_shares, share_bounds, split_heads
from jaxrl_kernels.tiles_hopper import (
    COLUMN,
    ROWS,
    TILE,
    add_products,
    full,
    launch,
    load,
    places,
    produce,
    products,
    shared,
    spread,
)

PROGRAMS = 4 * 132  # blocks of the grid at least, if there are keys for them: an H100 has 132 multiprocessors
KEYS = 64  # of a step
FEWEST_KEYS = 256  # of a share: less is not worth a block and its part in the joining


def refusal(k_pages: Float[Array, "P KV D page"]) -> str | None:
    """Why the kernel cannot serve a call, None where it can."""
    width, page = k_pages.shape[2:]
    if k_pages.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs a cache in bfloat16 or float16, as wgmma does, got {k_pages.dtype}"
    if width not in (64, 128, 192):  # 256 would not fit the shared memory
        return f"needs heads of 64, 128 or 192, got {width}"
    if page % KEYS:
        return f"needs pages of a multiple of {KEYS} places, got {page}"
    return None


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
    (slots, length), (_, num_kv, width, page) = q.shape[:2], k_pages.shape
    table = jnp.arange(slots, dtype=jnp.int32)[:, None] if page_table is None else page_table
    rows = split_heads(q, num_kv)
    num_rows, group = rows.shape[2], rows.shape[2] // length
    rows = pad_rows(rows, ROWS, 2)
    row_blocks = rows.shape[2] // ROWS
    limits = pad_rows(jnp.tile(jnp.stack([sight.first, sight.end], axis=1), (1, 1, group)), ROWS, 2)
    shares = max(1, min(pl.cdiv(PROGRAMS, slots * num_kv * row_blocks), pl.cdiv(table.shape[1] * page, FEWEST_KEYS)))
    stages, parts = 4 if width <= 128 else 2, (slots, num_kv, shares)
    rows_out = min(ROWS, pl.cdiv(num_rows, 8) * 8)  # of a block: the padding stays where it is
    totals, numbers = launch(
        functools.partial(_kernel, options, rows_out, interpret),
        out_type=[
            jax.ShapeDtypeStruct((*parts, (row_blocks - 1) * ROWS + rows_out, width), jnp.float32),
            jax.ShapeDtypeStruct((*parts, 2, rows.shape[2]), jnp.float32),
        ],
        scratch_types=[
            shared(ROWS, width, dtype=rows.dtype),
            plgpu.SMEM((2, ROWS), jnp.int32),
            plgpu.Barrier(num_barriers=1, num_arrivals=2),
            shared(stages, width, KEYS, dtype=rows.dtype),
            shared(stages, KEYS, width, dtype=rows.dtype),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            plgpu.Barrier(num_barriers=stages, num_arrivals=1),
            shared(ROWS, width, dtype=jnp.float32),
            plgpu.SMEM((2, ROWS), jnp.float32),
        ],
        grid=(slots, shares, num_kv * row_blocks),
        grid_names=("slot", "share", "head"),
        num_threads=2,
        interpret=interpret,
    )(table, share_bounds(sight, page, KEYS, shares), limits, rows, k_pages, v_pages)
    totals, numbers = totals[:, :, :, :num_rows], numbers[..., :num_rows]
    return join_shares(totals, numbers[:, :, :, 0], numbers[:, :, :, 1], sinks, length).astype(q.dtype)


def _kernel(
    options, rows_out, interpret, table, bounds, limits, queries, k_pages, v_pages, totals, numbers,
    rows, row_limits, rows_there, keys, values, there, free, total_out, numbers_out,
):  # fmt: skip
    slot, share, head, warpgroup = (jax.lax.axis_index(name) for name in ("slot", "share", "head", "warpgroup"))
    row_blocks, shape = queries.shape[2] // ROWS, (ROWS, KEYS)
    stages, parts = keys.shape[0], k_pages.shape[3] // KEYS
    kv_head, here = jax.lax.div(head, row_blocks), jax.lax.rem(head, row_blocks) * ROWS
    first, stop = bounds[slot, share, 0], bounds[slot, share, 1]

    @pl.when(warpgroup == 0)
    def compute():
        plgpu.copy_gmem_to_smem(queries.at[slot, kv_head, pl.ds(here, ROWS)], rows, rows_there.at[0])
        plgpu.copy_gmem_to_smem(limits.at[slot, :, pl.ds(here, ROWS)], row_limits, rows_there.at[0])
        plgpu.barrier_wait(rows_there.at[0])

        def step(number, carry):
            total, peak, sums = carry
            stage = jax.lax.rem(number, stages)
            plgpu.barrier_wait(there.at[stage])
            (logits,) = products((rows, keys.at[stage]), transposed=False, interpret=interpret)
            logits, factor, _ = scaled_logits(logits, options)
            place = places(shape, interpret) + (first + number) * KEYS
            seen = place < spread(load(row_limits.at[1], COLUMN, interpret), shape, 0)
            if options.window is not None:
                seen = seen & (place >= spread(load(row_limits.at[0], COLUMN, interpret), shape, 0))
            logits = jnp.where(seen, logits, HIDDEN)
            new = jnp.maximum(peak, jnp.max(logits, axis=1) * factor)
            weights, shrink = jnp.exp2(logits * factor - spread(new, shape, 0)), jnp.exp2(peak - new)
            sums = sums * shrink + jnp.sum(weights, axis=1)
            total = total * spread(shrink, total.shape, 0)
            term = total, weights.astype(values.dtype), values.at[stage]
            (total,) = add_products(term, interpret=interpret)
            plgpu.barrier_arrive(free.at[stage])
            return total, new, sums

        # The first peak lies far above that of hidden logits, so that their weight is 0 beside it.
        lowest = HIDDEN / 2 * scaled_logits(jnp.zeros(()), options)[1]
        start = full((ROWS,), lowest, COLUMN, interpret), full((ROWS,), 0, COLUMN, interpret)
        zeros = full((ROWS, keys.shape[1]), 0, TILE, interpret)
        total, peak, sums = jax.lax.fori_loop(0, stop - first, step, (zeros, *start))
        total_out[...] = total
        numbers_out.at[0][...] = peak * (1 / LOG2E)
        numbers_out.at[1][...] = sums
        plgpu.commit_smem()
        mine = pl.ds(here, rows_out)
        plgpu.copy_smem_to_gmem(total_out.at[pl.ds(0, rows_out)], totals.at[slot, kv_head, share, mine])
        plgpu.copy_smem_to_gmem(numbers_out, numbers.at[slot, kv_head, share, :, pl.ds(here, ROWS)])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 1)
    def copy():
        def copy_step(number, stage):
            index = first + number
            page, inside = table[slot, jax.lax.div(index, parts)], pl.ds(jax.lax.rem(index, parts) * KEYS, KEYS)
            plgpu.copy_gmem_to_smem(k_pages.at[page, kv_head, :, inside], keys.at[stage], there.at[stage])
            plgpu.copy_gmem_to_smem(v_pages.at[page, kv_head, inside], values.at[stage], there.at[stage])

        produce(stop - first, stages, (copy_step, free))
