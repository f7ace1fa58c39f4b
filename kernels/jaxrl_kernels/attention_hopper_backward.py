"""`flash_attention` for Hopper GPUs in Pallas through Mosaic GPU: the backward pass.

Two kernels of the same shape. In each, two warpgroups hold 64 rows each of one side, queries (and head) or keys, and
add up their gradient in registers, while a third one copies blocks of 64 rows of the other side ahead of them. The
kernel for keys and values walks through all query heads of its key head, so its sums leave the registers once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jaxrl_kernels.attention_hopper import LOG2E, WARPGROUPS, limits, pad, scaled_logits, seen_in_tile
from jaxrl_kernels.attention_mask import PADDED_KEY, PADDED_QUERY, Options, pad_marks, pad_rows
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

STAGES = 3  # blocks of the other side in shared memory at a time


def backward(
    options: Options,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S KV D"],
    v: Float[Array, "B S KV D"],
    query_marks: Int[Array, "B 2 T"],
    key_marks: Int[Array, "B 2 S"],
    normalizer: Float[Array, "B H T"],
    inner_products: Float[Array, "B H T"],
    cotangent: Float[Array, "B T H D"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S KV D"], Float[Array, "B S KV D"]]:
    """Gradients of q, k and v; `inner_products` is the sum over D of output times cotangent."""
    block = WARPGROUPS * ROWS
    rows, keys, values, out_grads = (pad(x, block) for x in (q, k, v, cotangent.astype(q.dtype)))
    query_marks, key_marks = pad_marks(query_marks, block, PADDED_QUERY), pad_marks(key_marks, block, PADDED_KEY)
    lines = pad_rows(normalizer, block, 2), pad_rows(inner_products, block, 2)
    queries, others = (rows, out_grads, query_marks, *lines), (keys, values, key_marks)
    bounds = limits(query_marks, key_marks, block, ROWS, options)[0]
    (q_grad,) = _call(_query_grad_kernel, options, interpret, bounds, queries, others, [rows])
    bounds = limits(query_marks, key_marks, ROWS, block, options)[1]
    k_grad, v_grad = _call(_key_grad_kernel, options, interpret, bounds, others, queries, [keys, values])
    k_grad, v_grad = (x[:, : k.shape[1], :, : k.shape[3]] for x in (k_grad, v_grad))
    return q_grad[:, : q.shape[1], :, : q.shape[3]], k_grad, v_grad


def _call(kernel, options, interpret, bounds, held, streamed, results):
    """Runs a kernel whose programs hold rows of one side and walk along the other; results are shaped like arrays."""
    batch, _, heads, width = held[0].shape

    def buffers(side, number):
        lines = [plgpu.SMEM((number, ROWS), jnp.float32)] * len(side[3:])
        return [
            *[shared(number, ROWS, width, dtype=side[0].dtype)] * 2,
            plgpu.SMEM((number, 2, ROWS), jnp.int32),
            *lines,
        ]

    return launch(
        functools.partial(kernel, options, interpret),
        out_type=[[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results]],
        scratch_types=[
            *(buffers(held, WARPGROUPS), buffers(streamed, STAGES)),
            plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=len(held)),
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=len(streamed)),
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=WARPGROUPS),
        ],
        grid=(batch, bounds.shape[2], heads),
        grid_names=("batch", "block", "head"),
        num_threads=WARPGROUPS + 1,
        interpret=interpret,
    )(bounds, held, streamed)[0]


def _query_grad_kernel(options, interpret, limits, queries, keys, results, held, streamed, held_there, there, free):
    batch, head, warpgroup = (jax.lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    i = limits.shape[2] - 1 - jax.lax.axis_index("block")  # the last ones see most: they begin first
    first, last, whole_first, whole_last = (limits[batch, bound, i] for bound in range(4))
    kv_head = jax.lax.div(head, queries[0].shape[2] // keys[0].shape[2])

    @pl.when(warpgroup < WARPGROUPS)
    def compute():
        here = _hold(queries, batch, i, head, held, held_there, warpgroup)
        ours = [buffer.at[warpgroup] for buffer in held]

        def step(number, total):
            slot, j = jax.lax.rem(number, STAGES), first + number
            theirs = [buffer.at[slot] for buffer in streamed]
            plgpu.barrier_wait(there.at[slot])
            whole = (whole_first <= j) & (j <= whole_last)
            _, product_grad = _weights_and_gradient(options, interpret, ours, theirs, "queries", whole)
            (total,) = add_products((total, product_grad.astype(ours[0].dtype), theirs[0]), interpret=interpret)
            plgpu.barrier_arrive(free.at[slot])
            return total

        zeros = full((ROWS, held[0].shape[2]), 0, TILE, interpret)
        total = jax.lax.fori_loop(0, last - first + 1, step, zeros)
        _give(results, [total * options.scale], held, warpgroup, (batch, here, head))

    @pl.when(warpgroup == WARPGROUPS)
    def copy():
        plgpu.set_max_registers(24, action="decrease")
        _stream(last - first + 1, lambda number: (first + number, kv_head), keys, batch, streamed, there, free)


def _key_grad_kernel(options, interpret, limits, keys, queries, results, held, streamed, held_there, there, free):
    batch, kv_head, warpgroup = (jax.lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    j = jax.lax.axis_index("block")
    first, last, whole_first, whole_last = (limits[batch, bound, j] for bound in range(4))
    group, blocks = queries[0].shape[2] // keys[0].shape[2], last - first + 1

    def block_and_head(number):
        return first + jax.lax.rem(number, blocks), kv_head * group + jax.lax.div(number, blocks)

    @pl.when(warpgroup < WARPGROUPS)
    def compute():
        here = _hold(keys, batch, j, kv_head, held, held_there, warpgroup)
        ours = [buffer.at[warpgroup] for buffer in held]

        def step(number, totals):
            slot, (i, _) = jax.lax.rem(number, STAGES), block_and_head(number)
            theirs = [buffer.at[slot] for buffer in streamed]
            plgpu.barrier_wait(there.at[slot])
            whole = (whole_first <= i) & (i <= whole_last)
            both = _weights_and_gradient(options, interpret, theirs, ours, "keys", whole)
            weights, product_grad = (x.astype(ours[0].dtype) for x in both)
            terms = (totals[0], product_grad, theirs[0]), (totals[1], weights, theirs[1])
            totals = add_products(*terms, interpret=interpret)
            plgpu.barrier_arrive(free.at[slot])
            return totals

        zeros = full((ROWS, held[0].shape[2]), 0, TILE, interpret)
        k_total, v_total = jax.lax.fori_loop(0, group * blocks, step, (zeros, zeros))
        _give(results, [k_total * options.scale, v_total], held, warpgroup, (batch, here, kv_head))

    @pl.when(warpgroup == WARPGROUPS)
    def copy():
        plgpu.set_max_registers(24, action="decrease")
        _stream(group * blocks, block_and_head, queries, batch, streamed, there, free)


def _copy(side, batch, here, head, buffers, slot, barrier) -> None:
    """Rows `here` of a side: two arrays [B, T, H, D], marks [B, 2, T] and lines [B, H, T]."""
    places = [(batch, here, head)] * 2 + [(batch, slice(None), here)] + [(batch, head, here)] * 2
    for array, place, buffer in zip(side, places, buffers, strict=False):
        plgpu.copy_gmem_to_smem(array.at[place], buffer.at[slot], barrier.at[slot])


def _hold(side, batch, block, head, held, there, warpgroup):
    """What a warpgroup that computes begins with: its rows."""
    plgpu.set_max_registers(240, action="increase")
    here = pl.ds((block * WARPGROUPS + warpgroup) * ROWS, ROWS)
    _copy(side, batch, here, head, held, warpgroup, there)
    plgpu.barrier_wait(there.at[warpgroup])
    return here


def _stream(steps, block_and_head, side, batch, streamed, there, free) -> None:
    """What the warpgroup that copies does: the other side's rows, block by block."""

    def copy(number, slot):
        block, head = block_and_head(number)
        _copy(side, batch, pl.ds(block * ROWS, ROWS), head, streamed, slot, there)

    produce(steps, STAGES, (copy, free))


def _give(results, totals, held, warpgroup, place) -> None:
    """Sums of a warpgroup go out through the shared memory of its rows, which it needs no more."""
    for total, buffer in zip(totals, held, strict=False):
        buffer.at[warpgroup][...] = total.astype(buffer.dtype)
    plgpu.commit_smem()
    for result, buffer in zip(results, held, strict=False):
        plgpu.copy_smem_to_gmem(buffer.at[warpgroup], result.at[place])
    plgpu.wait_smem_to_gmem(0)


def _weights_and_gradient(options, interpret, queries, keys, column_of, whole):
    """Softmax weights of a tile and the gradient of its products before `scale`, with rows of queries or of keys."""
    rows, out_grads, query_marks, normalizer, inner = queries
    columns, values, key_marks = keys
    if column_of == "queries":
        pairs, marks, layout, axis = [(rows, columns), (out_grads, values)], (query_marks, key_marks), COLUMN, 0
    else:
        pairs, marks, layout, axis = [(columns, rows), (values, out_grads)], (key_marks, query_marks), ROW, 1
    logits, weight_grad = products(*pairs, interpret=interpret)
    logits, factor, slope = scaled_logits(logits, options)
    shift = load(normalizer, layout, interpret) * LOG2E
    weights = jnp.exp2(logits * factor - spread(shift, logits.shape, axis))

    def hide(weights):
        return jnp.where(seen_in_tile(*marks, column_of, options, interpret), weights, 0.0)

    weights = jax.lax.cond(whole, lambda weights: weights, hide, weights)
    inner = spread(load(inner, layout, interpret), logits.shape, axis)
    return weights, weights * (weight_grad - inner) * slope
