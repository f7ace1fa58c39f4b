"""`decode_attention` in Pallas for TPUs: a step of the grid is a slot, and the kernel copies that slot's pages itself.

Pages are gathered into blocks, so that a copy in flight is large however small a page is: while one block is computed
the next one comes into the other half of a double buffer, and behind a slot's last block that is the first block of the
next slot that holds anything. Only pages that some query of the slot sees are copied; what else lies in a block is left
over from before and is masked. All key heads come in one block, so it is whole tiles for any number of them.

| per slot | [where] | |
| --- | --- | --- |
| page ids, ranges | scalar memory | before the kernel starts |
| queries, output | VMEM [KV, R, D] | by the grid's own pipeline |
| keys, values | VMEM [2, KV, D, block] and [2, KV, block, D] | copied page by page |

The slots are dealt to two halves of the grid that know nothing of each other: chips with two cores (v4, v5p) take one
each.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxrl_kernels.attention_mask import HIDDEN, Options, logits_of
from jaxrl_kernels.decode_attention_layout import LOWEST, Sight, join_heads, split_heads, split_sinks
from jaxrl_kernels.tiles import VMEM_LIMIT, estimate

LANES = 128
BLOCK_BYTES = 2 * 2**20  # at most, of a block's keys and values (1 to 3 microseconds to copy) and of its logits
MOST_KEYS = 2048
MOST_SCALARS = 2**18 - 2**13  # numbers that the 1 MiB of scalar memory holds, without what the compiler takes


def refusal(
    q: Float[Array, "S T H D"], k_pages: Float[Array, "P KV D page"], page_table: Int[Array, "S M"] | None
) -> str | None:
    """Why the kernel cannot serve a call, None where it can."""
    if k_pages.shape[3] % LANES:
        return f"needs pages of a multiple of {LANES} places, got {k_pages.shape[3]}"
    (slots, length), columns = q.shape[:2], 1 if page_table is None else page_table.shape[1]
    if slots * (columns + 2 * length + 4) > MOST_SCALARS:
        return f"needs a page_table that fits the scalar memory of 1 MiB, got [{slots}, {columns}]: take larger pages"
    return None


def _block_sizes(num_rows: int, k_pages: Any, capacity: int) -> tuple[int, int]:
    """Places that are copied at once, a page or a part of a large one, and how many such pieces form a block."""
    num_kv, width, page = k_pages.shape[1:]
    copied = 2 * num_kv * width * LANES * k_pages.dtype.itemsize
    logits = 4 * num_kv * pl.cdiv(num_rows, 8) * 8 * LANES
    most = max(1, min(BLOCK_BYTES // max(copied, logits), MOST_KEYS // LANES, capacity // LANES))
    whole = page // LANES
    piece = max(size for size in range(1, min(most, whole) + 1) if whole % size == 0)
    return piece * LANES, most // piece


def attend(
    options: Options,
    q: Float[Array, "S T H D"],
    k_pages: Float[Array, "P KV D page"],
    v_pages: Float[Array, "P KV page D"],
    page_table: Int[Array, "S M"] | None,
    sight: Sight,
    sinks: Float[Array, "H"] | None,
    *,
    interpret: Any = False,
) -> Float[Array, "S T H D"]:
    """Attention over the pages that each slot's queries see."""
    slots, length = q.shape[:2]
    num_kv, width, page = k_pages.shape[1:]
    rows = split_heads(q, num_kv)
    table = jnp.arange(slots, dtype=jnp.int32)[:, None] if page_table is None else page_table
    piece, pieces = _block_sizes(rows.shape[2], k_pages, page * table.shape[1])
    halves = 2 if slots % 2 == 0 else 1
    low = sight.low // piece
    count = jnp.where(sight.high > sight.low, -(-sight.high // piece) - low, 0)
    scalars = [table.reshape(-1), low, count, _following(count, halves), sight.first.reshape(-1), sight.end.reshape(-1)]
    inputs = [rows, k_pages, v_pages]
    row_block = pl.BlockSpec((None, *rows.shape[1:]), lambda half, step, *_: (half * (slots // halves) + step, 0, 0, 0))
    in_specs = [row_block, pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)]
    if sinks is not None:
        inputs.append(split_sinks(sinks, num_kv, length)[..., None])
        in_specs.append(pl.BlockSpec((*rows.shape[1:3], 1), lambda *_: (0, 0, 0)))
    # Narrow heads would be padded to whole lanes. XLA lays such values out with places along the lanes, and turned that
    # way they are read without a copy; wide ones lie as they are.
    turned = width % LANES != 0
    if turned:
        inputs[2] = v_pages.swapaxes(2, 3)
    block = piece * pieces
    values_shape = (2, num_kv, width, block) if turned else (2, num_kv, block, width)
    # of slots that are full, as nobody knows yet how full they will be
    places = slots * table.shape[1] * page
    cached = jax.ShapeDtypeStruct((places, num_kv, width), k_pages.dtype)
    cost = estimate(2 * places * length * q.shape[2] * width, cached, cached, rows, rows)
    out = pl.pallas_call(
        functools.partial(
            _kernel, options, length, page // piece, table.shape[1], piece, pieces, turned, sinks is not None
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(halves, slots // halves),
            in_specs=in_specs,
            out_specs=row_block,
            scratch_shapes=[
                pltpu.VMEM((2, num_kv, width, block), k_pages.dtype),
                pltpu.VMEM(values_shape, v_pages.dtype),
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM(rows.shape[1:], jnp.float32),
                *[pltpu.VMEM((*rows.shape[1:3], LANES), jnp.float32)] * 2,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(rows.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=cost,
        interpret=interpret,
        name="decode_attention",
    )(*scalars, *inputs)
    return join_heads(out, length)


def _following(count: Int[Array, "S"], halves: int) -> Int[Array, "n"]:
    """For each step of each half, and for the one behind its last, the next slot that holds anything, or S."""
    slots = len(count)
    holding = jnp.where(count > 0, jnp.arange(slots, dtype=jnp.int32), slots).reshape(halves, -1)
    return jnp.pad(jax.lax.cummin(holding, axis=1, reverse=True), ((0, 0), (0, 1)), constant_values=slots).reshape(-1)


def _kernel(options, length, parts, columns, piece, pieces, turned, with_sinks, *refs):
    table, low, count, following, first, end, rows, k_pages, v_pages, *rest = refs
    sinks = rest.pop(0) if with_sinks else None
    out, k_buffer, v_buffer, semaphores, turn, total, peak, sums = rest
    half, step, steps = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    slots, slot = pl.num_programs(0) * steps, half * steps + step

    def each_copy(slot, block, buffer, act):
        """Starts or awaits the copies of one block of a slot."""
        for j in range(pieces):
            index = block * pieces + j

            @pl.when(index < count[slot])
            def _(j=j, index=index):
                place = low[slot] + index
                # lax.div and not //, whose lowering asks which TPU is here, and there may be none
                number = table[slot * columns + jax.lax.div(place, parts)]
                inside = pl.ds(pl.multiple_of(jax.lax.rem(place, parts) * piece, piece), piece)
                there = pl.ds(j * piece, piece)
                for i, (pages, target, lanes) in enumerate(((k_pages, k_buffer, True), (v_pages, v_buffer, turned))):
                    source = pages.at[number, :, :, inside] if lanes else pages.at[number, :, inside]
                    target = target.at[buffer, :, :, there] if lanes else target.at[buffer, :, there]
                    act(pltpu.make_async_copy(source, target, semaphores.at[buffer, i]))

    def start(slot, block, buffer):
        each_copy(slot, block, buffer, lambda copy: copy.start())

    @pl.when(step == 0)
    def _():
        # Weights of places that were not copied are 0, but 0 times what an unwritten buffer holds may be no number.
        v_buffer[...] = jnp.zeros_like(v_buffer)
        turn[0] = 0
        slot_to_come = following[half * (steps + 1)]

        @pl.when(slot_to_come < slots)
        def _():
            start(slot_to_come, 0, 0)

    total[...] = jnp.zeros_like(total)
    if sinks is None:
        peak[...] = jnp.full_like(peak, LOWEST)
        sums[...] = jnp.zeros_like(sums)
    else:
        peak[...] = jnp.broadcast_to(jnp.maximum(sinks[...], LOWEST), peak.shape)
        sums[...] = jnp.exp(sinks[...] - peak[...])

    query = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, (rows.shape[1], 1), 0), length)

    def column(numbers):
        """The number of each row's query."""
        result = jnp.full(query.shape, numbers[slot * length])
        for t in range(1, length):
            result = jnp.where(query == t, numbers[slot * length + t], result)
        return result

    number_of_blocks = jax.lax.div(count[slot] + pieces - 1, pieces)
    windowed = options.window is not None
    lower, upper = column(first) if windowed else query, column(end)

    @pl.loop(0, number_of_blocks)
    def _(block):
        buffer = turn[0]
        turn[0] = 1 - buffer
        last = block + 1 == number_of_blocks
        slot_to_come = jnp.where(last, following[half * (steps + 1) + step + 1], slot)

        @pl.when(slot_to_come < slots)
        def _():
            start(slot_to_come, jnp.where(last, 0, block + 1), 1 - buffer)

        each_copy(slot, block, buffer, lambda copy: copy.wait())
        logits = logits_of(_product(rows[...], k_buffer[buffer], 1), options)[0]
        places = (low[slot] + block * pieces) * piece + jax.lax.broadcasted_iota(jnp.int32, (1, piece * pieces), 1)
        seen = places < upper
        if windowed:
            seen = seen & (places >= lower)
        logits = jnp.where(seen[None], logits, HIDDEN)
        old = peak[:, :, :1]
        new = jnp.maximum(old, jnp.max(logits, axis=2, keepdims=True))
        weights, shrink = jnp.exp(logits - new), jnp.exp(old - new)
        peak[...] = jnp.broadcast_to(new, peak.shape)
        sums[...] = jnp.broadcast_to(sums[:, :, :1] * shrink + jnp.sum(weights, axis=2, keepdims=True), sums.shape)
        total[...] = total[...] * shrink + _product(
            weights.astype(v_buffer.dtype), v_buffer[buffer], 2 if turned else 1
        )

    safe = jnp.where(sums[...] > 0, sums[...], 1)
    out[...] = (total[...] / safe[:, :, :1]).astype(out.dtype)


def _product(x, y, axis):
    """[KV, M, N] by [KV, N, L], or by [KV, L, N] with axis 2, in float32; float32 is not rounded on the way."""
    precision = jax.lax.Precision.HIGHEST if y.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        x, y, (((2,), (axis,)), ((0,), (0,))), precision=precision, preferred_element_type=jnp.float32
    )
