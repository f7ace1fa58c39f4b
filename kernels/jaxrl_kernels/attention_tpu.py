"""`flash_attention` in Pallas for TPUs: three kernels, one forward and two backward.

The grid walks over blocks of queries and, innermost, blocks of keys (the kernel for the gradients of keys and values:
the other way round); running sums stay in vector memory meanwhile. The bounds of `block_bounds` are prefetched as
scalars: outside them nothing is computed, and the block's index is held still, so nothing is copied either.

What the outer blocks carry per row (marks, normalizers) is needed as columns, and what the inner blocks carry as rows.
All of it lies in memory as rows, since a column would be padded to 128 lanes; the outer blocks' are turned around once,
at the first inner step. For that the backward kernel of keys and values works on transposed logits.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxrl_kernels.attention_mask import (
    HIDDEN,
    PADDED_KEY,
    PADDED_QUERY,
    Options,
    block_bounds,
    logits_of,
    pad_marks,
    pad_rows,
    visible,
)
from jaxrl_kernels.tiles import VMEM_LIMIT, dot, estimate

LANES = 128
BLOCK = 512


def forward(
    options: Options,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S KV D"],
    v: Float[Array, "B S KV D"],
    query_marks: Int[Array, "B 2 T"],
    key_marks: Int[Array, "B 2 S"],
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
    """Attention and the logarithm of each row's softmax normalizer (minus infinity where a query sees nothing)."""
    sizes = _Sizes(q, k)
    query_marks, key_marks, bounds, _ = sizes.marks(query_marks, key_marks, options)
    out, normalizer = _call(
        functools.partial(_forward_kernel, options),
        sizes.by_queries(),
        in_specs=["query", "key", "key", "query_marks", "key_marks"],
        out_specs=["query", "query_row"],
        out_shape=[sizes.query_shape(q.dtype), sizes.row_shape()],
        scratch=[_sums(sizes.block_q, q.shape[3]), *[_sums(sizes.block_q, LANES)] * 2, *_mark_columns(sizes.block_q)],
        cost=sizes.cost(options, 2),
        interpret=interpret,
    )(bounds, sizes.queries(q), sizes.keys(k), sizes.keys(v), query_marks, key_marks)
    return out[:, :, : q.shape[1]].swapaxes(1, 2), normalizer[:, :, 0, : q.shape[1]]


def backward(
    options: Options,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S KV D"],
    v: Float[Array, "B S KV D"],
    query_marks: Int[Array, "B 2 T"],
    key_marks: Int[Array, "B 2 S"],
    normalizer: Float[Array, "B H T"],
    inner: Float[Array, "B H T"],
    cotangent: Float[Array, "B T H D"],
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S KV D"], Float[Array, "B S KV D"]]:
    """Gradients of q, k and v; `inner` is the sum over D of output times cotangent."""
    sizes = _Sizes(q, k)
    query_marks, key_marks, key_bounds, query_bounds = sizes.marks(query_marks, key_marks, options)
    inputs = (sizes.queries(q), sizes.keys(k), sizes.keys(v), query_marks, key_marks)
    rows = (sizes.rows(normalizer), sizes.rows(inner), sizes.queries(cotangent.astype(q.dtype)))
    specs = ["query", "key", "key", "query_marks", "key_marks", "query_row", "query_row", "query"]
    (q_grad,) = _call(
        functools.partial(_query_grad_kernel, options),
        sizes.by_queries(),
        in_specs=specs,
        out_specs=["query"],
        out_shape=[sizes.query_shape(q.dtype)],
        scratch=[_sums(sizes.block_q, q.shape[3]), *_mark_columns(sizes.block_q), *[_sums(sizes.block_q, LANES)] * 2],
        cost=sizes.cost(options, 3),
        interpret=interpret,
    )(key_bounds, *inputs, *rows)
    k_grad, v_grad = _call(
        functools.partial(_key_grad_kernel, options),
        sizes.by_keys(),
        in_specs=specs,
        out_specs=["key", "key"],
        out_shape=[sizes.key_shape(k.dtype)] * 2,
        scratch=[*[_sums(sizes.block_k, q.shape[3])] * 2, *_mark_columns(sizes.block_k)],
        cost=sizes.cost(options, 4),
        interpret=interpret,
    )(query_bounds, *inputs, *rows)
    q_grad = q_grad[:, :, : q.shape[1]].swapaxes(1, 2)
    return q_grad, *(x[:, :, : k.shape[1]].swapaxes(1, 2) for x in (k_grad, v_grad))


class _Sizes:
    """The shapes of a call: how its arrays are padded and laid out, and the grids with the blocks of each step."""

    def __init__(self, q, k):
        self.batch, self.length, self.heads, self.width = q.shape
        self.key_length, self.num_kv = k.shape[1:3]
        self.dtype = q.dtype
        # a block is a whole number of lanes, as marks and normalizers lie along them
        self.block_q = min(BLOCK, pl.cdiv(self.length, LANES) * LANES)
        self.block_k = min(BLOCK, pl.cdiv(self.key_length, LANES) * LANES)
        self.num_q, self.num_k = pl.cdiv(self.length, self.block_q), pl.cdiv(self.key_length, self.block_k)
        self.group = self.heads // self.num_kv

    def queries(self, x):
        return pad_rows(x, self.block_q, 1).swapaxes(1, 2)

    def keys(self, x):
        return pad_rows(x, self.block_k, 1).swapaxes(1, 2)

    def rows(self, x):
        return pad_rows(x, self.block_q, 2)[:, :, None]

    def marks(self, query_marks, key_marks, options):
        query_marks = pad_marks(query_marks, self.block_q, PADDED_QUERY)
        key_marks = pad_marks(key_marks, self.block_k, PADDED_KEY)
        return query_marks, key_marks, *block_bounds(query_marks, key_marks, self.block_q, self.block_k, options)

    def query_shape(self, dtype):
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.num_q * self.block_q, self.width), dtype)

    def key_shape(self, dtype):
        return jax.ShapeDtypeStruct((self.batch, self.num_kv, self.num_k * self.block_k, self.width), dtype)

    def row_shape(self):
        return jax.ShapeDtypeStruct((self.batch, self.heads, 1, self.num_q * self.block_q), jnp.float32)

    def cost(self, options, products):
        """Of a kernel with so many products for each pair of query and key, about as many arrays of each, and segments
        that are unknown until it runs: causality and window alone."""
        seen = self.key_length / 2 if options.causal else self.key_length
        seen = seen if options.window is None else min(seen, options.window)
        pairs = self.batch * self.heads * self.length * seen
        arrays = [self.query_shape(self.dtype), self.key_shape(self.dtype)] * products
        return estimate(products * pairs * self.width, *arrays)

    def _specs(self, place):
        """Blocks of every kind of array, from `place(*step) -> (row of the batch, head, query block, key block)`."""

        def spec(shape, index):
            return pl.BlockSpec(shape, lambda *step: index(*place(*step)))

        block_q, block_k, group = self.block_q, self.block_k, self.group
        # lax.div and not //, whose lowering asks which TPU is here, and there may be none
        return {
            "query": spec((None, None, block_q, self.width), lambda b, h, i, j: (b, h, i, 0)),
            "key": spec((None, None, block_k, self.width), lambda b, h, i, j: (b, jax.lax.div(h, group), j, 0)),
            "query_marks": spec((None, 2, block_q), lambda b, h, i, j: (b, 0, i)),
            "key_marks": spec((None, 2, block_k), lambda b, h, i, j: (b, 0, j)),
            "query_row": spec((None, None, 1, block_q), lambda b, h, i, j: (b, h, 0, i)),
        }

    def by_queries(self):
        """Grid (row, head, query block, key block)."""
        grid = (self.batch, self.heads, self.num_q, self.num_k)
        return grid, self._specs(lambda b, h, i, j, bounds: (b, h, i, _within(bounds, b, i, j))), 3

    def by_keys(self):
        """Grid (row, key head, key block, head within the group, query block)."""
        grid = (self.batch, self.num_kv, self.num_k, self.group, self.num_q)

        def place(b, h, j, g, i, bounds):
            return b, h * self.group + g, _within(bounds, b, j, i), j

        return grid, self._specs(place), 3


def _within(bounds, b, outer, inner):
    """The inner block itself, or the nearest one between the bounds."""
    return jnp.maximum(jnp.minimum(inner, bounds[b, 1, outer]), bounds[b, 0, outer])


def _sums(block, width):
    return pltpu.VMEM((block, width), jnp.float32)


def _mark_columns(block):
    return [pltpu.VMEM((block, LANES), jnp.int32)] * 2


def _call(kernel, layout, *, in_specs, out_specs, out_shape, scratch, cost, interpret):
    grid, specs, parallel = layout
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[specs[name] for name in in_specs],
            out_specs=[specs[name] for name in out_specs],
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=cost,
        interpret=interpret,
    )


def _forward_kernel(options, bounds, q, k, v, query_marks, key_marks, out, normalizer, total, peak, sums, *columns):
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        total[...] = jnp.zeros_like(total)
        peak[...] = jnp.full_like(peak, HIDDEN)
        sums[...] = jnp.zeros_like(sums)
        _store_columns(columns, (query_marks[0:1], query_marks[1:2]))

    @pl.when((bounds[b, 0, i] <= j) & (j <= bounds[b, 1, i]))
    def _():
        logits, _ = logits_of(dot(q[...], k[...], 1, 1), options)
        seen = visible(_marks_of(columns), (key_marks[0:1], key_marks[1:2]), options)
        logits = jnp.where(seen, logits, HIDDEN)
        old = peak[:, :1]
        new = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(logits - new), 0)
        shrink = jnp.exp(old - new)
        peak[...] = jnp.broadcast_to(new, peak.shape)
        sums[...] = jnp.broadcast_to(sums[:, :1] * shrink + jnp.sum(weights, axis=1, keepdims=True), sums.shape)
        total[...] = total[...] * shrink + dot(weights.astype(v.dtype), v[...], 1, 0)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        some = sums[...] > 0
        safe = jnp.where(some, sums[...], 1)
        out[...] = (total[...] / safe[:, :1]).astype(out.dtype)
        normalizer[...] = jnp.where(some, peak[...] + jnp.log(safe), -jnp.inf).T[:1]


def _query_grad_kernel(
    options, bounds, q, k, v, query_marks, key_marks, normalizer, inner, cotangent, q_grad, total, *columns
):
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        total[...] = jnp.zeros_like(total)
        _store_columns(columns, (query_marks[0:1], query_marks[1:2], normalizer[...], inner[...]))

    @pl.when((bounds[b, 0, i] <= j) & (j <= bounds[b, 1, i]))
    def _():
        logits, slope = logits_of(dot(q[...], k[...], 1, 1), options)
        seen = visible(_marks_of(columns), (key_marks[0:1], key_marks[1:2]), options)
        weights = jnp.where(seen, jnp.exp(logits - columns[2][:, :1]), 0)
        weight_grad = dot(cotangent[...], v[...], 1, 1)
        product_grad = weights * (weight_grad - columns[3][:, :1]) * (slope * options.scale)
        total[...] += dot(product_grad.astype(k.dtype), k[...], 1, 0)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        q_grad[...] = total[...].astype(q_grad.dtype)


def _key_grad_kernel(
    options,
    bounds,
    q,
    k,
    v,
    query_marks,
    key_marks,
    normalizer,
    inner,
    cotangent,
    k_grad,
    v_grad,
    k_total,
    v_total,
    *columns,
):
    b, j, g, i = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.program_id(4)

    @pl.when((g == 0) & (i == 0))
    def _():
        k_total[...] = jnp.zeros_like(k_total)
        v_total[...] = jnp.zeros_like(v_total)
        _store_columns(columns, (key_marks[0:1], key_marks[1:2]))

    @pl.when((bounds[b, 0, j] <= i) & (i <= bounds[b, 1, j]))
    def _():
        logits, slope = logits_of(dot(k[...], q[...], 1, 1), options)  # [keys, queries]
        seen = visible((query_marks[0:1], query_marks[1:2]), _marks_of(columns), options)
        weights = jnp.where(seen, jnp.exp(logits - normalizer[...]), 0)
        weight_grad = dot(v[...], cotangent[...], 1, 1)
        product_grad = weights * (weight_grad - inner[...]) * (slope * options.scale)
        v_total[...] += dot(weights.astype(cotangent.dtype), cotangent[...], 1, 0)
        k_total[...] += dot(product_grad.astype(q.dtype), q[...], 1, 0)

    @pl.when((g == pl.num_programs(3) - 1) & (i == pl.num_programs(4) - 1))
    def _():
        k_grad[...] = k_total[...].astype(k_grad.dtype)
        v_grad[...] = v_total[...].astype(v_grad.dtype)


def _store_columns(columns, rows):
    """Turns rows [1, block] into columns [block, 128], the same number in each lane."""
    for column, row in zip(columns, rows, strict=True):
        column[...] = jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _marks_of(columns):
    return tuple(column[:, :1] for column in columns[:2])
