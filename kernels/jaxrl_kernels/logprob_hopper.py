"""`fused_logprob` in Pallas through Mosaic GPU for Hopper: the forward pass, and the gradient of a block of logits.

A block of three warpgroups owns 128 rows and walks along its share of the vocabulary, 256 entries at a time. One
warpgroup copies pieces of rows and head, 64 deep, into a ring of four buffers in shared memory (TMA); the other two
multiply them (wgmma), 64 rows each, so that a row's softmax stays within a warpgroup and its running peak and sums
within registers. The ring runs on while logits are reduced: the next tile's pieces are on their way.

```
                vocabulary ->
            share 1         share 2
        +---+---+---+   +---+---+---+
 rows   | 1 | 2 | 3 |   | 1 | 2 | 3 |    a block's tiles [128, 256] in order; all shares of 16 blocks of rows before the
   |    +---+---+---+   +---+---+---+    next 16, so that those at work share rows and head in the L2 cache
   v    | 1 | 2 | 3 |   | 1 | 2 | 3 |
        +---+---+---+   +---+---+---+
```

There are about eight blocks for each multiprocessor, whatever the number of rows, and as many peaks and sums to be
joined by XLA. The gradient kernel walks the same way and writes every tile in the dtype of the operands; cuBLAS
multiplies it with rows and head (`logprob_xla.backward`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jaxrl_kernels.logprob_math import LOWEST, Options, join_parts, logit_gradient, logits_of, pad_rows, varying_like
from jaxrl_kernels.tiles_hopper import launch, produce, read, shared, spread

ROWS, ENTRIES, DEPTH = 128, 256, 64  # of a tile, and of the pieces that its product is the sum of
HALF = ROWS // 2  # rows of a warpgroup
STAGES = 4  # buffers of rows and head: 192 of the 227 KiB of shared memory
OUT_ENTRIES = 64  # of the gradient on its way out
GROUP = 16  # blocks of rows that walk along the vocabulary together
BLOCKS = 8 * 132  # of the grid, about: 8 for each multiprocessor of an H100 or H200
BACKWARD_SIZES = 8192, 8192  # rows and entries of a gradient in memory: 128 MiB


def refusal(options: Options, rows: Any, head: Any) -> str | None:
    """Why this version cannot serve a call; None where it can."""
    if rows.dtype != head.dtype or rows.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs hidden and head both in bfloat16 or both in float16, got {rows.dtype} and {head.dtype}"
    multiples = (8, DEPTH) if options.vocab_axis == 0 else (DEPTH, 64)  # what TMA cuts into tiles [8, 64] must be whole
    if head.shape[0] % multiples[0] or head.shape[1] % multiples[1]:
        return f"needs a head of a multiple of {multiples[0]} by a multiple of {multiples[1]}, got {list(head.shape)}"
    return None


def forward(
    options: Options,
    rows: Float[Array, "N D"],
    head: Float[Array, "*VD"],
    bias: Float[Array, "V"] | None,
    targets: Int[Array, "N K"],
    count: Int[Array, ""] | None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "N"], Float[Array, "N"], Float[Array, "N K"]]:
    """As `logprob_xla.forward`."""
    (num_rows, num_targets), vocab = targets.shape, head.shape[options.vocab_axis]
    num_parts, long = _shares(num_rows, vocab)[1], pl.cdiv(num_rows, ROWS) * ROWS
    by_part = jax.ShapeDtypeStruct((num_parts, long), jnp.float32)
    normalizers, means, picked = _call(
        functools.partial(_forward_kernel, bias is not None),
        options,
        (rows, head),
        [by_part, by_part, jax.ShapeDtypeStruct((num_parts, num_targets, long), jnp.float32)],
        jnp.full(1, num_rows, jnp.int32) if count is None else count[None].astype(jnp.int32),
        *_entries(bias),
        pad_rows(targets, long).T,
        interpret=interpret,
    )
    inside = jnp.arange(num_rows) < (num_rows if count is None else count)
    # rows of skipped blocks hold anything
    picked = jnp.where(inside, jnp.sum(picked[:, :, :num_rows], axis=0), 0).T
    return *join_parts(options, normalizers[:, :num_rows], means[:, :num_rows], inside), picked


def gradient_block(
    options: Options,
    rows: Float[Array, "n D"],
    piece: Float[Array, "*vD"],
    bias: Float[Array, "v"] | None,
    targets: Int[Array, "n K"],
    normalizer: Float[Array, "n"],
    mean: Float[Array, "n"],
    to_normalizer: Float[Array, "n"],
    to_mean: Float[Array, "n"] | None,
    to_picked: Float[Array, "n K"],
    seen: Int[Array, ""] | int,
    *,
    interpret: bool = False,
) -> Float[Array, "n v"]:
    """As `logprob_xla.gradient_block`, in the dtype of rows and head."""
    num_rows, vocab = rows.shape[0], piece.shape[options.vocab_axis]
    long, wide = pl.cdiv(num_rows, ROWS) * ROWS, pl.cdiv(vocab, ENTRIES) * ENTRIES
    numbers = normalizer, to_normalizer, *(() if to_mean is None else (mean, to_mean))
    (out,) = _call(
        functools.partial(_gradient_kernel, bias is not None),
        options,
        (rows, piece),
        [jax.ShapeDtypeStruct((long, wide), rows.dtype)],
        jnp.asarray(seen, jnp.int32)[None],
        *_entries(bias),
        *(pad_rows(x, long).T for x in (targets, to_picked)),
        *(pad_rows(x, long) for x in numbers),
        out=shared(2, HALF, OUT_ENTRIES, dtype=rows.dtype),
        interpret=interpret,
    )
    return out[:num_rows, :vocab]


def _shares(num_rows: int, vocab: int) -> tuple[int, int]:
    """Tiles in one share of the vocabulary, and the number of shares."""
    tiles = pl.cdiv(vocab, ENTRIES)
    length = pl.cdiv(tiles, min(tiles, pl.cdiv(BLOCKS, pl.cdiv(num_rows, ROWS))))
    return length, pl.cdiv(tiles, length)


def _entries(bias: Array | None) -> list[Array]:
    return [] if bias is None else [pad_rows(bias, pl.cdiv(bias.shape[0], ENTRIES) * ENTRIES)]


def _call(
    kernel: Callable,
    options: Options,
    operands: tuple[Array, Array],
    out_type: list[jax.ShapeDtypeStruct],
    *arrays: Array,
    interpret: bool,
    **scratch: Any,
) -> Any:
    (rows, head), axis = operands, options.vocab_axis
    num_rows, vocab = rows.shape[0], head.shape[axis]
    num_blocks, num_parts = pl.cdiv(num_rows, ROWS), _shares(num_rows, vocab)[1]
    rows = pad_rows(rows, pl.cdiv(num_rows, 8) * 8)
    if interpret:  # JAX 0.10's knows neither transposed operands nor that TMA reads zeros beyond an array
        head = pad_rows(head.T if axis == 1 else head, pl.cdiv(vocab, ENTRIES) * ENTRIES).T
        rows, axis = pad_rows(rows, num_blocks * ROWS), 1
    piece = (ENTRIES, DEPTH) if axis == 0 else (DEPTH, ENTRIES)
    numbers = launch(
        functools.partial(kernel, options._replace(vocab_axis=axis), vocab, interpret),
        out_type=out_type,
        grid=(num_blocks * num_parts,),
        grid_names=("block",),
        num_threads=3,
        scratch_types=dict(
            row_pieces=shared(STAGES, ROWS, DEPTH, dtype=rows.dtype),
            head_pieces=shared(STAGES, *piece, dtype=rows.dtype),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            empty=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            **scratch,
        ),
        # an approximate tanh has 11 bits; an approximate exponential has 22
        approx_math=options.softcap is None,
        semantics=plgpu.LoweringSemantics.Warpgroup,
        interpret=interpret,
    )(rows, head, *arrays)
    return [varying_like(x, rows) for x in numbers]  # Mosaic's kernels lose it


def _forward_kernel(biased, options, vocab, interpret, rows, head, count, *refs, **ring):
    bias = refs[0] if biased else None
    targets, normalizer, mean, picked = refs[biased:]
    row, part, first, num_tiles = _place(rows, vocab)
    here, shape = pl.ds(row + _warpgroup() * HALF, HALF), (HALF, ENTRIES)

    def pick(entry, logits, columns):
        def body(k, _):
            target = read(targets.at[k, here], interpret)
            found = jnp.sum(jnp.where(columns == spread(target, shape, 0), logits, 0.0), axis=1)
            ours, earlier = (target >= entry) & (target < vocab), (target >= first) & (target < entry)
            old = read(picked.at[part, k, here], interpret)
            picked[part, k, here] = jnp.where(ours, found, jnp.where(earlier, old, 0.0))

        jax.lax.fori_loop(0, targets.shape[0], body, None)

    def start():
        zeros = jnp.zeros(HALF)
        return zeros + LOWEST, zeros, zeros

    def reduce(entry, products, carry):
        peak, sums, moment = carry
        logits, _ = _logits(options, products, bias, entry, interpret)
        columns = entry + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        logits = jnp.where(columns < vocab, logits, -jnp.inf)
        pick(entry, logits, columns)
        new = jnp.maximum(peak, jnp.max(logits, axis=1))
        shrink, weights = jnp.exp(peak - new), jnp.exp(logits - spread(new, shape, 0))
        sums = sums * shrink + jnp.sum(weights, axis=1)
        if options.with_mean:
            moment = moment * shrink + jnp.sum(jnp.where(weights > 0, weights * logits, 0.0), axis=1)
        return new, sums, moment

    def finish(carry):
        peak, sums, moment = carry
        sums = jnp.maximum(sums, jnp.finfo(jnp.float32).tiny)
        normalizer[part, here] = peak + jnp.log(sums)
        mean[part, here] = moment / sums

    @pl.when(row < count[0])
    def _():
        _walk(options, rows, head, row, first, num_tiles, start, reduce, finish, **ring)


def _gradient_kernel(biased, options, vocab, interpret, rows, head, seen, *refs, out, **ring):
    bias = refs[0] if biased else None
    targets, to_picked, *numbers, grads = refs[biased:]
    row, _, first, num_tiles = _place(rows, vocab)
    mine, shape = _warpgroup(), (HALF, OUT_ENTRIES)
    here = pl.ds(row + mine * HALF, HALF)

    def start():
        return [read(ref.at[here], interpret) for ref in numbers]

    def gradient(entry, products, carry):
        normalizer, to_normalizer, *of_mean = (spread(x, shape, 0) for x in carry)
        mean, to_mean = of_mean if of_mean else (None, None)
        logits, slope = _logits(options, products, bias, entry, interpret)
        grad = logit_gradient(logits, normalizer, mean, to_normalizer, to_mean)
        columns = entry + jax.lax.broadcasted_iota(jnp.int32, shape, 1)

        def add(k, grad):
            target, weight = (read(ref.at[k, here], interpret) for ref in (targets, to_picked))
            return grad + jnp.where(columns == spread(target, shape, 0), spread(weight, shape, 0), 0.0)

        grad = jax.lax.fori_loop(0, targets.shape[0], add, grad)
        return jnp.where(columns >= seen[0], grad * slope, 0.0)

    def reduce(entry, products, carry):
        for column in range(0, ENTRIES, OUT_ENTRIES):  # a whole tile of several numbers would fill the registers
            grad = gradient(entry + column, products[:, column : column + OUT_ENTRIES], carry)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out[mine] = grad.astype(out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out.at[mine], grads.at[here, pl.ds(entry + column, OUT_ENTRIES)])
        return carry

    def finish(_):
        plgpu.wait_smem_to_gmem(0)

    _walk(options, rows, head, row, first, num_tiles, start, reduce, finish, **ring)


def _walk(options, rows, head, row, first, num_tiles, start, reduce, finish, *, row_pieces, head_pieces, full, empty):
    """Runs over the `num_tiles` tiles of rows at `row` from the vocabulary's entry `first` on: `start()`, then
    `reduce(first entry, products [64, 256], carry)` of each tile, then `finish(carry)`, in two warpgroups."""
    depth = pl.cdiv(rows.shape[1], DEPTH)
    mine = _warpgroup()

    def slot(step):
        return jax.lax.rem(step, jnp.int32(STAGES))

    @pl.when(mine == 2)
    def copy():
        plgpu.set_max_registers(40, action="decrease")

        def pieces(step, here):
            tile = jax.lax.div(step, jnp.int32(depth))
            deep, entries = pl.ds((step - tile * depth) * DEPTH, DEPTH), pl.ds(first + tile * ENTRIES, ENTRIES)
            piece = head.at[entries, deep] if options.vocab_axis == 0 else head.at[deep, entries]
            plgpu.copy_gmem_to_smem(rows.at[pl.ds(row, ROWS), deep], row_pieces.at[here], full.at[here])
            plgpu.copy_gmem_to_smem(piece, head_pieces.at[here], full.at[here])

        produce(num_tiles * depth, STAGES, (pieces, empty))

    @pl.when(mine < 2)
    def multiply():
        plgpu.set_max_registers(232, action="increase")

        def of_tile(tile, carry):
            def products(total):
                def body(deep, _):
                    here = slot(tile * depth + deep)
                    plgpu.barrier_wait(full.at[here])
                    piece = head_pieces.at[here]
                    piece = piece.transpose((1, 0)) if options.vocab_axis == 0 else piece
                    plgpu.wgmma(total, row_pieces.at[here, pl.ds(mine * HALF, HALF)], piece)
                    plgpu.wgmma_wait(1)  # all but this one are done

                    @pl.when(deep > 0)
                    def free():
                        plgpu.barrier_arrive(empty.at[slot(tile * depth + deep - 1)])

                jax.lax.fori_loop(0, depth, body, None)
                return total[...]

            numbers = pl.run_scoped(products, plgpu.ACC((HALF, ENTRIES), jnp.float32))
            plgpu.barrier_arrive(empty.at[slot(tile * depth + depth - 1)])
            return reduce(first + tile * ENTRIES, numbers, carry)

        finish(jax.lax.fori_loop(0, num_tiles, of_tile, start()))


def _place(rows, vocab):
    """First row of this block, the number of its share of the vocabulary, that one's first entry and its tiles."""
    length, num_parts = _shares(rows.shape[0], vocab)
    block, part = plgpu.planar_snake(
        jax.lax.axis_index("block"), (pl.cdiv(rows.shape[0], ROWS), num_parts), minor_dim=0, tile_width=GROUP
    )
    return block * ROWS, part, part * (length * ENTRIES), jnp.minimum(length, pl.cdiv(vocab, ENTRIES) - part * length)


def _warpgroup():
    return jax.lax.axis_index("warpgroup")


def _logits(options, products, bias, entry, interpret):
    if bias is not None:
        bias = read(bias.at[pl.ds(entry, products.shape[1])], interpret)
        bias = jax.lax.broadcast_in_dim(bias, products.shape, [1])
    return logits_of(products, bias, options)
