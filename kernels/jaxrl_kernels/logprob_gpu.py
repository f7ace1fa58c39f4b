"""`fused_logprob` in Pallas through Triton for GPUs: the forward pass, and the gradient of a block of logits.

A program multiplies one tile of logits, rows [128, D] with head [128, D], like a plain matrix product, and reduces it
before it leaves the registers: to a peak, sums and the targets' logits in the forward pass, whose few numbers per tile
are joined by XLA afterwards. So all tiles are independent and fill the device, and there is no running state to wait
for. Tiles are dealt out in groups of rows, so that those in flight share rows and head in the L2 cache. The gradient
kernel writes its tile in the dtype of the operands, and cuBLAS multiplies it with rows and head
(`logprob_xla.backward`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from jaxrl_kernels.logprob_math import LOWEST, Options, join_parts, logit_gradient, logits_of, shape_like
from jaxrl_kernels.tiles import dot

TILE = 128
GROUP = 8  # tiles of rows that walk along the vocabulary together
BACKWARD_SIZES = 8192, 8192  # rows and entries of a gradient in memory: 128 MiB in bfloat16


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
    num_rows, num_targets = targets.shape
    num_tiles = pl.cdiv(head.shape[options.vocab_axis], TILE)
    count = jnp.full(1, num_rows, jnp.int32) if count is None else count[None].astype(jnp.int32)
    by_tile = shape_like((num_tiles, num_rows), jnp.float32, rows)
    normalizers, means, picked = _call(
        functools.partial(_forward_kernel, options, bias is not None),
        options,
        (rows, head),
        out_shape=[by_tile, by_tile, shape_like((num_rows, num_targets), jnp.float32, rows)],
        name="fused_logprob",
        interpret=interpret,
    )(count, rows, head, *([] if bias is None else [bias]), targets)
    # rows of skipped tiles hold anything
    done = jnp.arange(num_rows) < count
    inside = (targets >= 0) & (targets < head.shape[options.vocab_axis])
    return *join_parts(options, normalizers, means, done), jnp.where(inside & done[:, None], picked, 0)


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
    numbers = normalizer, to_normalizer, *(() if to_mean is None else (mean, to_mean))
    shape = rows.shape[0], piece.shape[options.vocab_axis]
    return _call(
        functools.partial(_gradient_kernel, options, bias is not None),
        options,
        (rows, piece),
        out_shape=shape_like(shape, jnp.promote_types(rows.dtype, piece.dtype), rows),
        name="fused_logprob_gradient",
        interpret=interpret,
    )(
        jnp.asarray(seen, jnp.int32)[None],
        *(rows, piece, *([] if bias is None else [bias]), targets, to_picked, *numbers),
    )


def _call(kernel: Any, options: Options, operands: tuple[Array, Array], **kwargs: Any) -> Any:
    rows, head = operands
    num_tiles = pl.cdiv(rows.shape[0], TILE) * pl.cdiv(head.shape[options.vocab_axis], TILE)
    wide = jnp.promote_types(rows.dtype, head.dtype) == jnp.float32
    params = plgpu.CompilerParams(num_warps=8, num_stages=2 if wide else 4)
    return pl.pallas_call(kernel, grid=(num_tiles,), compiler_params=params, **kwargs)


def _tile(rows, head, options) -> tuple[Array, Array]:
    """First row and first entry of the vocabulary of this program's tile."""
    num_row_tiles, num_vocab_tiles = pl.cdiv(rows.shape[0], TILE), pl.cdiv(head.shape[options.vocab_axis], TILE)
    group, place = _divmod(pl.program_id(0), GROUP * num_vocab_tiles)
    height = jnp.minimum(GROUP, num_row_tiles - group * GROUP)
    column, row = _divmod(place, height)
    return (group * GROUP + row) * TILE, column * TILE


def _divmod(x, y):
    return jax.lax.div(x, jnp.int32(y)), jax.lax.rem(x, jnp.int32(y))


def _logits(options, rows, head, bias, row, column) -> tuple[Array, Array | float]:
    """Logits of a tile, minus infinity beyond the vocabulary, and their derivative in the products."""
    (num_rows, width), vocab = rows.shape, head.shape[options.vocab_axis]
    dtype = jnp.promote_types(rows.dtype, head.dtype)
    step = min(64 if dtype != jnp.float32 else 32, max(16, pl.next_power_of_2(width)))
    row_inside, column_inside = row + jnp.arange(TILE) < num_rows, column + jnp.arange(TILE) < vocab

    def load(ref, places, inside):
        whole = width % step == 0 and ref.shape[0] % TILE == 0 and ref.shape[1] % TILE == 0
        return plgpu.load(ref.at[places], mask=None if whole else inside, other=None if whole else 0).astype(dtype)

    def body(n, total):
        depth = pl.ds(n * step, step)
        deep = n * step + jnp.arange(step) < width
        part = load(rows, (pl.ds(row, TILE), depth), row_inside[:, None] & deep[None])
        if options.vocab_axis == 0:
            piece = load(head, (pl.ds(column, TILE), depth), column_inside[:, None] & deep[None])
        else:
            piece = load(head, (depth, pl.ds(column, TILE)), deep[:, None] & column_inside[None])
        return total + dot(part, piece, 1, 1 - options.vocab_axis)

    products = jax.lax.fori_loop(0, pl.cdiv(width, step), body, jnp.zeros((TILE, TILE), jnp.float32))
    if bias is not None:
        bias = plgpu.load(bias.at[pl.ds(column, TILE)], mask=column_inside, other=0)[None]
    logits, slope = logits_of(products, bias, options)
    return jnp.where(column_inside[None], logits, -jnp.inf), slope


def _forward_kernel(options, biased, count, rows, head, *refs):
    bias = refs[0] if biased else None
    targets, normalizer, mean, picked = refs[biased:]
    row, column = _tile(rows, head, options)

    @pl.when(row < count[0])
    def _():
        here, inside = pl.ds(row, TILE), row + jnp.arange(TILE) < rows.shape[0]
        logits, _ = _logits(options, rows, head, bias, row, column)
        peak = jnp.maximum(jnp.max(logits, axis=1), LOWEST)
        weights = jnp.exp(logits - peak[:, None])
        sums = jnp.maximum(jnp.sum(weights, axis=1), jnp.finfo(jnp.float32).tiny)
        tile = jax.lax.div(column, jnp.int32(TILE))
        plgpu.store(normalizer.at[tile, here], peak + jnp.log(sums), mask=inside)
        if options.with_mean:
            moment = jnp.sum(jnp.where(weights > 0, weights * logits, 0.0), axis=1)
            plgpu.store(mean.at[tile, here], moment / sums, mask=inside)

        def pick(k, _):
            place = plgpu.load(targets.at[here, k], mask=inside, other=-1) - column
            found = jnp.sum(jnp.where(jnp.arange(TILE)[None] == place[:, None], logits, 0.0), axis=1)
            # exactly one tile has a target that is in the vocabulary
            ours = inside & (place >= 0) & (place < TILE)
            plgpu.store(picked.at[here, k], found, mask=ours)

        jax.lax.fori_loop(0, targets.shape[1], pick, None)


def _gradient_kernel(options, biased, seen, rows, head, *refs):
    bias = refs[0] if biased else None
    targets, to_picked, *numbers, out = refs[biased:]
    row, column = _tile(rows, head, options)
    here, inside = pl.ds(row, TILE), row + jnp.arange(TILE) < rows.shape[0]
    columns = column + jnp.arange(TILE)
    logits, slope = _logits(options, rows, head, bias, row, column)
    normalizer, to_normalizer, *of_mean = (plgpu.load(ref.at[here], mask=inside, other=0.0)[:, None] for ref in numbers)
    mean, to_mean = of_mean if of_mean else (None, None)
    grad = logit_gradient(logits, normalizer, mean, to_normalizer, to_mean)

    def add(k, grad):
        target = plgpu.load(targets.at[here, k], mask=inside, other=-1)
        weight = plgpu.load(to_picked.at[here, k], mask=inside, other=0.0)
        return grad + jnp.where(columns[None] == target[:, None], weight[:, None], 0.0)

    grad = jax.lax.fori_loop(0, targets.shape[1], add, grad)
    grad = jnp.where((columns >= seen[0])[None], grad * slope, 0.0)
    within = inside[:, None] & (columns < head.shape[options.vocab_axis])[None]
    plgpu.store(out.at[here, pl.ds(column, TILE)], grad.astype(out.dtype), mask=within)
