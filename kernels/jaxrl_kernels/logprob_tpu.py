"""`fused_logprob` in Pallas for TPUs: the forward pass, and the gradient of a block of logits.

Both kernels multiply a block of rows with a block of the head over the whole width at once, so a block of logits is one
product and never leaves vector memory unreduced. The forward grid walks over rows and, innermost, the vocabulary, with
peak, sums and the targets' logits in scratch; blocks beyond the last needed row are neither computed nor copied. The
gradient kernel writes its block in the dtype of the operands, and XLA multiplies it with rows and head
(`logprob_xla.backward`): those two products have nothing left to fuse, and the recomputed logits serve both.

| per step | v5e, v5p, v6e |
| --- | --- |
| rows [512, D] and head [512, D], each twice (the next is copied meanwhile) | 14 MiB at D 3584 in bfloat16 |
| logits [512, 512] in float32 and what comes of them | about 4 MiB |
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxrl_kernels.logprob_math import LOWEST, Options, logit_gradient, logits_of, shape_like
from jaxrl_kernels.tiles import VMEM_LIMIT, dot, estimate

LANES = 128
BLOCK = 512
OPERAND_BYTES = 8 * 2**20  # of a block of rows or of the head: four of them stand in VMEM
BACKWARD_SIZES = 8192, 3072  # rows and entries of a gradient in memory: 48 MiB in bfloat16


def forward(
    options: Options,
    rows: Float[Array, "N D"],
    head: Float[Array, "*VD"],
    bias: Float[Array, "V"] | None,
    targets: Int[Array, "N K"],
    count: Int[Array, ""] | None,
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "N"], Float[Array, "N"], Float[Array, "N K"]]:
    """As `logprob_xla.forward`."""
    (num_rows, width), vocab, num_targets = rows.shape, head.shape[options.vocab_axis], targets.shape[1]
    size, vocab_size = _block(rows, num_rows), _block(head, vocab, width)
    num_blocks, num_vocab = pl.cdiv(num_rows, size), pl.cdiv(vocab, vocab_size)
    count = jnp.full(1, num_rows, jnp.int32) if count is None else count[None].astype(jnp.int32)

    def held(i, j, count):  # beyond the last needed row the blocks stay those of the last step: nothing is copied
        last = jnp.maximum(jax.lax.div(count[0] - 1, size), 0)
        return jnp.minimum(i, last), jnp.where(i <= last, j, num_vocab - 1)

    def row_spec(columns):
        return pl.BlockSpec((size, columns), lambda i, j, count: (held(i, j, count)[0], 0))

    def out_spec(columns):
        return pl.BlockSpec((size, columns), lambda i, j, count: (i, 0))

    head_spec, bias_spec = _head_specs(options, vocab_size, width, lambda i, j, count: held(i, j, count)[1])
    like = rows
    normalizer, mean, picked = pl.pallas_call(
        functools.partial(_forward_kernel, options, vocab, bias is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_blocks, num_vocab),
            in_specs=[row_spec(width), head_spec, *([] if bias is None else [bias_spec]), row_spec(num_targets)],
            out_specs=[out_spec(1), out_spec(1), out_spec(num_targets)],
            scratch_shapes=[*[pltpu.VMEM((size, LANES), jnp.float32)] * 3, pltpu.VMEM((size, vocab_size), jnp.float32)],
        ),
        out_shape=[shape_like((num_rows, n), jnp.float32, like) for n in (1, 1, num_targets)],
        compiler_params=_params("parallel", "arbitrary"),
        cost_estimate=estimate(num_rows * vocab * width, rows, *[head] * num_blocks),
        interpret=interpret,
        name="fused_logprob",
    )(count, rows, head, *([] if bias is None else [bias[None]]), targets)
    return normalizer[:, 0], mean[:, 0], picked


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
    interpret: Any = False,
) -> Float[Array, "n v"]:
    """As `logprob_xla.gradient_block`, in the dtype of rows and head."""
    (num_rows, width), vocab, num_targets = rows.shape, piece.shape[options.vocab_axis], targets.shape[1]
    size, vocab_size = _block(rows, num_rows), _block(piece, vocab, width)
    numbers = jnp.stack([normalizer, mean, to_normalizer, to_normalizer if to_mean is None else to_mean], axis=1)

    def row_spec(columns):
        return pl.BlockSpec((size, columns), lambda i, j, seen: (i, 0))

    head_spec, bias_spec = _head_specs(options, vocab_size, width, lambda i, j, seen: j)
    out_shape = shape_like((num_rows, vocab), jnp.promote_types(rows.dtype, piece.dtype), rows)
    passes = pl.cdiv(num_rows, size)
    return pl.pallas_call(
        functools.partial(_gradient_kernel, options, to_mean is not None, bias is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(passes, pl.cdiv(vocab, vocab_size)),
            in_specs=[
                *(row_spec(width), head_spec, *([] if bias is None else [bias_spec])),
                *(row_spec(num_targets), row_spec(4), row_spec(num_targets)),
            ],
            out_specs=pl.BlockSpec((size, vocab_size), lambda i, j, seen: (i, j)),
            scratch_shapes=[pltpu.VMEM((size, vocab_size), jnp.float32)],
        ),
        out_shape=out_shape,
        compiler_params=_params("parallel", "parallel"),
        cost_estimate=estimate(num_rows * vocab * width, rows, out_shape, *[piece] * passes),
        interpret=interpret,
        name="fused_logprob_gradient",
    )(
        jnp.asarray(seen, jnp.int32)[None],
        *(rows, piece, *([] if bias is None else [bias[None]]), targets, numbers, to_picked),
    )


def _params(*semantics: Any) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT)


def _block(x: Array, length: int, width: int | None = None) -> int:
    """Rows, or entries of the vocabulary, of a block: a whole number of lanes that fits, or all there are."""
    fitting = OPERAND_BYTES // (x.dtype.itemsize * (width or x.shape[1])) // LANES * LANES
    size = max(LANES, min(BLOCK, fitting))
    return length if length <= size else size


def _head_specs(options: Options, size: int, width: int, place: Any) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    shape = (size, width) if options.vocab_axis == 0 else (width, size)

    def index(*step):
        return (place(*step), 0) if options.vocab_axis == 0 else (0, place(*step))

    return pl.BlockSpec(shape, index), pl.BlockSpec((1, size), lambda *step: (0, place(*step)))


def _logits(options: Options, rows: Any, head: Any, bias: Any) -> tuple[Array, Array | float]:
    dtype = jnp.promote_types(rows.dtype, head.dtype)
    products = dot(rows[...].astype(dtype), head[...].astype(dtype), 1, 1 - options.vocab_axis)
    return logits_of(products, None if bias is None else bias[...], options)


def _each_target(targets: Any, body: Any) -> None:
    """`body(k, column [rows, 1] of the targets, function that takes column k of an array)` for every k."""
    num_targets = targets.shape[1]
    if num_targets == 1:
        body(0, targets[...], lambda ref: ref[...])
        return
    lane = jax.lax.broadcasted_iota(jnp.int32, targets.shape, 1)

    def step(k, _):
        def column(ref):
            return jnp.sum(jnp.where(lane == k, ref[...], 0), axis=1, keepdims=True)

        body(k, column(targets), column)

    jax.lax.fori_loop(0, num_targets, step, None)


def _forward_kernel(options, vocab, biased, count, rows, head, *refs):
    bias = refs[0] if biased else None
    targets, normalizer, mean, picked, peak, sums, moment, logits_ref = refs[biased:]
    i, j = pl.program_id(0), pl.program_id(1)
    needed = i * rows.shape[0] < count[0]

    @pl.when(j == 0)
    def _():
        peak[...] = jnp.full_like(peak, LOWEST)
        sums[...] = jnp.zeros_like(sums)
        moment[...] = jnp.zeros_like(moment)
        picked[...] = jnp.zeros_like(picked)

    @pl.when(needed)
    def _():
        logits, _ = _logits(options, rows, head, bias)
        column = j * logits.shape[1] + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        if vocab % logits.shape[1]:  # the last block reaches beyond the head, where anything may stand
            logits = jnp.where(column < vocab, logits, -jnp.inf)
        old = peak[:, :1]
        new = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
        shrink, weights = jnp.exp(old - new), jnp.exp(logits - new)
        peak[...] = jnp.broadcast_to(new, peak.shape)
        sums[...] = sums[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        if options.with_mean:
            share = jnp.where(weights > 0, weights * logits, 0)
            moment[...] = moment[...] * shrink + jnp.sum(share, axis=1, keepdims=True)
        logits_ref[...] = logits

        def pick(k, target, _):
            found = jnp.sum(jnp.where(column == target, logits_ref[...], 0), axis=1, keepdims=True)
            lane = jax.lax.broadcasted_iota(jnp.int32, picked.shape, 1)
            picked[...] += jnp.where(lane == k, found, 0)

        _each_target(targets, pick)

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        safe = jnp.maximum(sums[:, :1], jnp.finfo(jnp.float32).tiny)
        normalizer[...] = peak[:, :1] + jnp.log(safe)
        mean[...] = moment[:, :1] / safe


def _gradient_kernel(options, with_mean, biased, seen, rows, head, *refs):
    bias = refs[0] if biased else None
    targets, numbers, to_picked, out, grad_ref = refs[biased:]
    logits, slope = _logits(options, rows, head, bias)
    column = pl.program_id(1) * logits.shape[1] + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    normalizer, mean, to_normalizer, to_mean = (numbers[:, n : n + 1] for n in range(4))
    grad_ref[...] = logit_gradient(logits, normalizer, mean, to_normalizer, to_mean if with_mean else None)

    def add(k, target, take):
        grad_ref[...] += jnp.where(column == target, take(to_picked), 0)

    _each_target(targets, add)
    out[...] = jnp.where(column >= seen[0], grad_ref[...] * slope, 0).astype(out.dtype)
