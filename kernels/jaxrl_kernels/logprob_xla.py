"""`fused_logprob` in blocks of XLA: the forward pass for CPUs, top-k, and the backward pass of every platform.

A block of logits is [rows, entries of the vocabulary] and small enough to stay in a CPU's cache. The forward pass walks
over rows and, innermost, the vocabulary, with a running peak and running sums. The backward pass walks the other way
round: the gradient of a block of the head is summed over all rows in float32 and written once, in place and in the
head's dtype, while the gradient of the rows is one float32 array [N, D] that every block adds to.

```
                vocabulary ->                                        vocabulary ->
         +------+------+------+                               +------+------+------+
   rows  |  1   |  2   |  3   |  peak, sums of a row    rows  |  1   |  3   |  5   |  hidden gradient [N, D] +=
    |    +------+------+------+  run along               |    +------+------+------+
    v    |  4   |  5   |  6   |                          v    |  2   |  4   |  6   |
         +------+------+------+                               +------+------+------+
               forward                                     head gradient: one block at a time
```

That makes four products of [N, D] with [D, V]: logits twice, and one for each gradient. Saving the expected embedding
`sum_v p_v w_v` in the forward pass makes four as well, but cancels against the target's embedding where a token is
nearly certain, and serves no entropy gradient. Loops over rows end with the last row that is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_kernels.logprob_math import (
    LOWEST,
    Options,
    logit_gradient,
    logits_of,
    pad_rows,
    slice_head,
    start_of,
    varying_like,
)
from jaxrl_kernels.tiles import dot

CPU_SIZES = 1024, 512  # rows and entries of a block: 2 MiB, half of it for each of two cores with as much cache
TOP_K_VOCAB = 8192  # lax.top_k has a cost per call and row

Count = Int[Array, ""] | None


def forward(
    options: Options,
    rows: Float[Array, "N D"],
    head: Float[Array, "*VD"],
    bias: Float[Array, "V"] | None,
    targets: Int[Array, "N K"],
    count: Count,
) -> tuple[Float[Array, "N"], Float[Array, "N"], Float[Array, "N K"]]:
    """Per row: log of the softmax normalizer, mean logit (0 without `with_mean`), and the targets' logits.

    Only the first `count` rows are computed. A target outside the vocabulary gives 0.
    """

    def block(rows, targets):
        def step(logits, first, seen, picked):
            place = targets - first
            found = jnp.take_along_axis(logits, jnp.clip(place, 0, logits.shape[1] - 1), axis=1)
            return jnp.where((place >= seen) & (place < logits.shape[1]), found, picked)

        start = varying_like(jnp.zeros(targets.shape), rows)
        # float32 in the cache: a CPU is no faster in bfloat16
        return _along_vocabulary(options, rows.astype(jnp.float32), head, bias, CPU_SIZES[1], step, start)

    return _over_rows(block, rows, targets, count=count, size=CPU_SIZES[0])


def top_k(
    options: Options,
    k: int,
    rows: Float[Array, "N D"],
    head: Float[Array, "*VD"],
    bias: Float[Array, "V"] | None,
) -> tuple[Float[Array, "N"], Float[Array, "N k"], Int[Array, "N k"]]:
    """Per row: log of the softmax normalizer, the `k` largest logits in falling order, and their ids."""

    def block(rows):
        def step(logits, first, seen, best):
            found, place = jax.lax.top_k(logits, min(k, logits.shape[1]))
            values = jnp.concatenate([best[0], found], axis=1)
            ids = jnp.concatenate([best[1], place + first], axis=1)
            values, chosen = jax.lax.top_k(values, k)
            return values, jnp.take_along_axis(ids, chosen, axis=1)

        # below every logit but those of minus infinity, which may be in the result where nothing else is left
        nothing = jnp.full((rows.shape[0], k), -jnp.inf), jnp.zeros((rows.shape[0], k), jnp.int32)
        start = tuple(varying_like(x, rows) for x in nothing)
        rows = rows.astype(jnp.promote_types(rows.dtype, head.dtype))
        normalizer, _, (values, ids) = _along_vocabulary(options, rows, head, bias, TOP_K_VOCAB, step, start)
        return normalizer, values, ids

    return _over_rows(block, rows, count=None, size=CPU_SIZES[0])


def _along_vocabulary(
    options: Options, rows: Array, head: Array, bias: Array | None, size: int, step: Callable, start: Any
) -> tuple[Array, Array, Any]:
    """Normalizer and mean logit of some rows, and what `step(logits, first id, columns seen, carried)` carries."""
    vocab = head.shape[options.vocab_axis]
    size = min(size, vocab)

    def body(j, carry):
        peak, sums, moment, carried = carry
        first, seen = start_of(j, size, vocab)
        piece = slice_head(head, first, size, options).astype(rows.dtype)
        ours = None if bias is None else jax.lax.dynamic_slice_in_dim(bias, first, size)
        logits, _ = logits_of(dot(rows, piece, 1, 1 - options.vocab_axis), ours, options)
        if vocab % size:
            logits = jnp.where(jnp.arange(size) >= seen, logits, -jnp.inf)
        new = jnp.maximum(peak, jnp.max(logits, axis=1))
        shrink, weights = jnp.exp(peak - new), jnp.exp(logits - new[:, None])
        sums = sums * shrink + jnp.sum(weights, axis=1)
        if options.with_mean:
            moment = moment * shrink + jnp.sum(jnp.where(weights > 0, weights * logits, 0), axis=1)
        return new, sums, moment, step(logits, first, seen, carried)

    zeros = varying_like(jnp.zeros(rows.shape[0]), rows)
    peak, sums, moment, carried = jax.lax.fori_loop(0, -(-vocab // size), body, (zeros + LOWEST, zeros, zeros, start))
    safe = jnp.maximum(sums, jnp.finfo(jnp.float32).tiny)  # 0 where every logit is minus infinity
    return peak + jnp.log(safe), moment / safe, carried


def _over_rows(block: Callable, *arrays: Array, count: Count, size: int) -> Any:
    """`block` of some rows of all `arrays` at a time, until `count` rows are done; 0 beyond them."""
    num_rows = arrays[0].shape[0]
    size, num_blocks = _divide(num_rows, size)
    arrays = tuple(pad_rows(x, size * num_blocks) for x in arrays)

    def cut(i):
        return [jax.lax.dynamic_slice_in_dim(x, i * size, size) for x in arrays]

    def body(i, out):
        part = block(*cut(i))
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, i * size, 0), out, part)

    shapes = jax.eval_shape(lambda: block(*cut(0)))
    out = jax.tree.map(lambda x: jnp.zeros((size * num_blocks, *x.shape[1:]), x.dtype), shapes)
    out = jax.tree.map(lambda x: varying_like(x, arrays[0]), out)
    out = jax.lax.fori_loop(0, _blocks_of(count, size, num_blocks), body, out)
    return jax.tree.map(lambda x: x[:num_rows], out)


def backward(
    options: Options,
    gradient_block: Callable,
    sizes: tuple[int, int],
    rows: Float[Array, "N D"],
    head: Float[Array, "*VD"],
    bias: Float[Array, "V"] | None,
    targets: Int[Array, "N K"],
    statistics: tuple[Float[Array, "N"], Float[Array, "N"]],
    cotangents: tuple[Float[Array, "N"], Float[Array, "N"] | None, Float[Array, "N K"]],
    count: Count,
) -> tuple[Float[Array, "N D"], Float[Array, "*VD"], Float[Array, "V"] | None]:
    """Gradients of rows, head and bias from the cotangents of normalizer, mean logit (None: nobody asks) and targets'
    logits. `gradient_block` gives the gradient of the products for some rows and some entries of the vocabulary; its
    dtype is the one that the two products are computed in. `sizes` are its largest numbers of rows and of entries.
    """
    num_rows, vocab, axis = rows.shape[0], head.shape[options.vocab_axis], options.vocab_axis
    (row_size, num_row_blocks), vocab_size = _divide(num_rows, sizes[0]), min(sizes[1], vocab)
    by_row = [pad_rows(x, row_size * num_row_blocks) for x in (rows, targets, *statistics, *cotangents)]
    inside = jnp.arange(row_size * num_row_blocks) < (num_rows if count is None else count)
    by_row[2] = jnp.where(inside, by_row[2], jnp.inf)  # a row beyond has no weights

    def over_vocabulary(j, carry):
        rows_grad, head_grad, bias_grad = carry
        first, seen = start_of(j, vocab_size, vocab)
        piece = slice_head(head, first, vocab_size, options)
        bias_piece = None if bias is None else jax.lax.dynamic_slice_in_dim(bias, first, vocab_size)

        def over_rows(i, carry):
            rows_grad, piece_grad, bias_piece_grad = carry
            cut: list[Any] = [
                None if x is None else jax.lax.dynamic_slice_in_dim(x, i * row_size, row_size) for x in by_row
            ]
            part, ours, *numbers = cut
            block = gradient_block(options, part, piece, bias_piece, ours - first, *numbers, seen)
            part, weights = part.astype(block.dtype), piece.astype(block.dtype)
            piece_grad += dot(block, part, 0, 0) if axis == 0 else dot(part, block, 0, 0)
            if bias_piece_grad is not None:
                bias_piece_grad += jnp.sum(block, axis=0, dtype=jnp.float32)
            before = jax.lax.dynamic_slice_in_dim(rows_grad, i * row_size, row_size)
            total = before + dot(block, weights, 1, axis)
            rows_grad = jax.lax.dynamic_update_slice_in_dim(rows_grad, total, i * row_size, 0)
            return rows_grad, piece_grad, bias_piece_grad

        start = rows_grad, zeros(piece.shape), None if bias is None else zeros(vocab_size)
        rows_grad, piece_grad, bias_piece_grad = jax.lax.fori_loop(
            0, _blocks_of(count, row_size, num_row_blocks), over_rows, start
        )
        head_grad = write(head_grad, piece_grad, first, seen, axis)
        return rows_grad, head_grad, None if bias is None else write(bias_grad, bias_piece_grad, first, seen, 0)

    def write(whole, piece, first, seen, axis):
        piece = piece.astype(whole.dtype)
        if vocab % vocab_size:  # what an earlier block has written stays
            old = jax.lax.dynamic_slice_in_dim(whole, first, vocab_size, axis)
            fresh = jax.lax.broadcasted_iota(jnp.int32, piece.shape, axis) >= seen
            piece = jnp.where(fresh, piece, old)
        return jax.lax.dynamic_update_slice_in_dim(whole, piece, first, axis)

    def zeros(shape, dtype=jnp.float32):
        return varying_like(jnp.zeros(shape, dtype), rows)

    start = zeros(by_row[0].shape), zeros(head.shape, head.dtype), None if bias is None else zeros(vocab, bias.dtype)
    rows_grad, head_grad, bias_grad = jax.lax.fori_loop(0, -(-vocab // vocab_size), over_vocabulary, start)
    return rows_grad[:num_rows].astype(rows.dtype), head_grad, bias_grad


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
) -> Float[Array, "n v"]:
    """Gradient of the products of some rows with a piece of the head, in float32; 0 in the first `seen` columns.
    `targets` count from the piece's first entry."""
    logits, slope = logits_of(
        dot(rows.astype(jnp.float32), piece.astype(jnp.float32), 1, 1 - options.vocab_axis), bias, options
    )
    columns = jnp.arange(logits.shape[1])
    column = None if to_mean is None else to_mean[:, None]
    grad = logit_gradient(logits, normalizer[:, None], mean[:, None], to_normalizer[:, None], column)
    grad += jnp.sum(jnp.where(targets[:, :, None] == columns, to_picked[:, :, None], 0), axis=1)
    return jnp.where(columns >= seen, grad * slope, 0)


def _blocks_of(count: Count, size: int, num_blocks: int) -> Int[Array, ""] | int:
    """How many blocks of rows hold the first `count` rows."""
    return num_blocks if count is None else jax.lax.div(count + size - 1, size)


def _divide(length: int, size: int) -> tuple[int, int]:
    """Blocks of nearly equal size, at most `size`, in steps of 8: how long one is, and how many."""
    num_blocks = -(-length // size)
    return min(-(-length // (8 * num_blocks)) * 8, length), num_blocks
