"""`flash_attention` for Hopper GPUs (H100, H200) in Pallas through Mosaic GPU: the forward pass, after FlashAttention-3
(Shah et al. 2024, arXiv 2407.08608).

A block of the grid has 128 queries of one head. Two of its warpgroups hold 64 queries each and compute, a third one
copies blocks of keys and values into shared memory ahead of them. The two take turns: while one is at its softmax, the
other has the tensor cores.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from jaxrl_kernels.attention_mask import (
    HIDDEN,
    PADDED_KEY,
    PADDED_QUERY,
    Options,
    block_bounds,
    pad_marks,
    pad_rows,
    visible,
    whole_bounds,
)
from jaxrl_kernels.tiles_hopper import (
    COLUMN,
    ROW,
    ROWS,
    TILE,
    add_products,
    full,
    launch,
    load,
    produce,
    products,
    shared,
    spread,
)

WARPGROUPS = 2  # that compute, besides the one that copies
STAGES = 2  # blocks of keys and values in shared memory at a time
WIDEST = 128  # of a head: 256 would leave the gradient of keys and values no registers
LOG2E = math.log2(math.e)


def refusal(q: Float[Array, "B T H D"]) -> str | None:
    """Why these kernels cannot serve a call; None where they can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, as wgmma does, got {q.dtype}"
    if q.shape[3] > WIDEST:
        return f"takes heads of up to {WIDEST}, got {q.shape[3]}"
    return None


def forward(
    options: Options,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S KV D"],
    v: Float[Array, "B S KV D"],
    query_marks: Int[Array, "B 2 T"],
    key_marks: Int[Array, "B 2 S"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
    """Attention and the logarithm of each row's softmax normalizer (minus infinity where a query sees nothing)."""
    block_q, block_k = WARPGROUPS * ROWS, 128
    rows, keys, values = (pad(x, block) for x, block in ((q, block_q), (k, block_k), (v, block_k)))
    query_marks, key_marks = pad_marks(query_marks, block_q, PADDED_QUERY), pad_marks(key_marks, block_k, PADDED_KEY)
    (batch, length, heads, width), dtype = rows.shape, q.dtype
    barrier = functools.partial(plgpu.Barrier, num_barriers=STAGES)
    out, normalizer = launch(
        functools.partial(_forward_kernel, options, interpret),
        out_type=[
            jax.ShapeDtypeStruct(rows.shape, dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        scratch_types=[
            shared(WARPGROUPS, ROWS, width, dtype=dtype),
            plgpu.SMEM((WARPGROUPS, 2, ROWS), jnp.int32),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=2),
            *[shared(STAGES, block_k, width, dtype=dtype)] * 2,
            plgpu.SMEM((STAGES, 2, block_k), jnp.int32),
            *(barrier(num_arrivals=2), barrier(num_arrivals=1)),
            *[barrier(num_arrivals=WARPGROUPS)] * 2,
            plgpu.Barrier(num_barriers=1, num_arrivals=WARPGROUPS),
        ],
        grid=(batch, length // block_q, heads),
        grid_names=("batch", "block", "head"),
        num_threads=WARPGROUPS + 1,
        interpret=interpret,
    )(limits(query_marks, key_marks, block_q, block_k, options)[0], rows, keys, values, query_marks, key_marks)
    return out[:, : q.shape[1], :, : q.shape[3]], normalizer[..., : q.shape[1]]


def pad(x: Float[Array, "B T H D"], block: int) -> Float[Array, "B padded H wide"]:
    """Rows up to a multiple of the block, and heads up to 64 or 128, in pieces of which shared memory is swizzled."""
    return pad_rows(pad_rows(x, block, 1), 64, 3)


def limits(
    query_marks: Int[Array, "B 2 T"], key_marks: Int[Array, "B 2 S"], block_q: int, block_k: int, options: Options
) -> tuple[Int[Array, "B 4 nq"], Int[Array, "B 4 nk"]]:
    """`block_bounds` and then `whole_bounds`, for blocks of queries and for blocks of keys."""
    sizes = query_marks, key_marks, block_q, block_k, options
    pairs = zip(block_bounds(*sizes), whole_bounds(*sizes), strict=True)
    return tuple(jnp.concatenate(pair, axis=1) for pair in pairs)  # type: ignore[return-value]


def scaled_logits(
    products: Float[Array, "M N"], options: Options
) -> tuple[Float[Array, "M N"], float, Float[Array, "M N"] | float]:
    """Logits up to a positive factor, the factor that gives powers of 2, and the derivative of the cap.

    Multiplying by the factor and subtracting the peak is one instruction. tanh goes through exp2, since the GPU's own
    has 11 correct bits.
    """
    if options.softcap is None:
        if options.scale > 0:
            return products, options.scale * LOG2E, 1.0
        return products * options.scale, LOG2E, 1.0
    capped = 1 - 2 / (1 + jnp.exp2(products * (2 * LOG2E * options.scale / options.softcap)))
    return capped, options.softcap * LOG2E, 1 - capped * capped


def seen_in_tile(columns: Any, rows: Any, column_of: str, options: Options, interpret: bool) -> Bool[Array, "M N"]:
    """Whether queries see keys, from marks [2, M] and [2, N] in shared memory; the column is of "queries" or "keys"."""
    shape = columns.shape[1], rows.shape[1]

    def spread_marks(side, layout, axis):
        segments, places = (load(side.at[mark], layout, interpret) for mark in (0, 1))
        return spread(segments, shape, axis), spread(places, shape, axis)

    column, row = spread_marks(columns, COLUMN, 0), spread_marks(rows, ROW, 1)
    return visible(column, row, options) if column_of == "queries" else visible(row, column, options)


def _forward_kernel(
    options, interpret, limits, q, k, v, query_marks, key_marks, out, normalizer,
    rows, row_marks, row_normalizer, rows_there, keys, values, marks, keys_there, values_there, keys_free, values_free,
    turn,
):  # fmt: skip
    batch, head, warpgroup = (jax.lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    i = limits.shape[2] - 1 - jax.lax.axis_index("block")  # the last ones see most: they begin first
    first, last, whole_first, whole_last = (limits[batch, bound, i] for bound in range(4))
    block, shape = keys.shape[1], (ROWS, keys.shape[1])

    def take_turns():
        plgpu.barrier_arrive(turn.at[0])
        plgpu.barrier_wait(turn.at[0])

    @pl.when(warpgroup < WARPGROUPS)
    def compute():
        plgpu.set_max_registers(240, action="increase")
        here = pl.ds((i * WARPGROUPS + warpgroup) * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(q.at[batch, here, head], rows.at[warpgroup], rows_there.at[warpgroup])
        plgpu.copy_gmem_to_smem(query_marks.at[batch, :, here], row_marks.at[warpgroup], rows_there.at[warpgroup])
        plgpu.barrier_wait(rows_there.at[warpgroup])
        pl.when(warpgroup == 1)(take_turns)

        def step(number, carry):
            total, peak, sums = carry
            slot, j = jax.lax.rem(number, STAGES), first + number
            plgpu.barrier_wait(keys_there.at[slot])
            pair = rows.at[warpgroup], keys.at[slot]
            logits, factor, _ = scaled_logits(products(pair, interpret=interpret, meanwhile=take_turns)[0], options)

            def hide(logits):
                seen = seen_in_tile(row_marks.at[warpgroup], marks.at[slot], "queries", options, interpret)
                return jnp.where(seen, logits, HIDDEN)

            whole = (whole_first <= j) & (j <= whole_last)
            logits = jax.lax.cond(whole, lambda logits: logits, hide, logits)
            plgpu.barrier_arrive(keys_free.at[slot])
            new = jnp.maximum(peak, jnp.max(logits, axis=1) * factor)
            weights, shrink = jnp.exp2(logits * factor - spread(new, shape, 0)), jnp.exp2(peak - new)
            sums = sums * shrink + jnp.sum(weights, axis=1)
            total = total * spread(shrink, total.shape, 0)
            plgpu.barrier_wait(values_there.at[slot])
            take_turns()
            (total,) = add_products((total, weights.astype(v.dtype), values.at[slot]), interpret=interpret)
            plgpu.barrier_arrive(values_free.at[slot])
            return total, new, sums

        # The first peak lies far above that of hidden logits, so that their weight is 0 beside it.
        lowest = HIDDEN / 2 * scaled_logits(jnp.zeros(()), options)[1]
        start = full((ROWS,), lowest, COLUMN, interpret), full((ROWS,), 0, COLUMN, interpret)
        zeros = full((ROWS, keys.shape[2]), 0, TILE, interpret)
        total, peak, sums = jax.lax.fori_loop(0, last - first + 1, step, (zeros, *start))
        pl.when(warpgroup == 0)(take_turns)
        safe = jnp.where(sums > 0, sums, 1.0)
        rows.at[warpgroup][...] = (total / spread(safe, total.shape, 0)).astype(out.dtype)
        row_normalizer.at[warpgroup][...] = jnp.where(sums > 0, peak * (1 / LOG2E) + jnp.log(safe), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(rows.at[warpgroup], out.at[batch, here, head])
        plgpu.copy_smem_to_gmem(row_normalizer.at[warpgroup], normalizer.at[batch, head, here])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == WARPGROUPS)
    def copy():
        plgpu.set_max_registers(24, action="decrease")
        kv_head = jax.lax.div(head, q.shape[2] // k.shape[2])

        def copy_keys(number, slot):
            here = pl.ds((first + number) * block, block)
            plgpu.copy_gmem_to_smem(k.at[batch, here, kv_head], keys.at[slot], keys_there.at[slot])
            plgpu.copy_gmem_to_smem(key_marks.at[batch, :, here], marks.at[slot], keys_there.at[slot])

        def copy_values(number, slot):
            here = pl.ds((first + number) * block, block)
            plgpu.copy_gmem_to_smem(v.at[batch, here, kv_head], values.at[slot], values_there.at[slot])

        produce(last - first + 1, STAGES, (copy_keys, keys_free), (copy_values, values_free))
