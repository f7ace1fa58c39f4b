"""`flash_attention` on GPUs: cuDNN where it covers a call, else kernels in Pallas through Triton.

A program of the grid holds one block of queries and loops over the blocks of keys between its bounds (the kernel for
the gradients of keys and values: the other way round). Arrays are read in place, without a transposition.

cuDNN has no sinks, soft caps or packed segments in what JAX offers of it, so a call with any of them never gets there:
a version that would ignore a mask is worse than a slow one.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.extend.backend import get_backend
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
from jaxrl_kernels.tiles import dot


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
    block_q, block_k, warps = _blocks(q, backward=False)
    arrays = _padded(q, block_q), _padded(k, block_k), _padded(v, block_k)
    query_marks, key_marks = pad_marks(query_marks, block_q, PADDED_QUERY), pad_marks(key_marks, block_k, PADDED_KEY)
    bounds, _ = block_bounds(query_marks, key_marks, block_q, block_k, options)
    inner, outer = _specs(arrays[0], arrays[1], block_q, bounds, by_queries=True)
    out, normalizer = pl.pallas_call(
        functools.partial(_forward_kernel, options, block_k),
        grid=(arrays[0].shape[1] // block_q, q.shape[2], q.shape[0]),
        in_specs=[outer["bounds"], outer["array"], inner["array"], inner["array"], outer["marks"], inner["marks"]],
        out_specs=[outer["array"], outer["row"]],
        out_shape=[
            jax.ShapeDtypeStruct(arrays[0].shape, q.dtype),
            jax.ShapeDtypeStruct((q.shape[0], q.shape[2], arrays[0].shape[1]), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
    )(bounds, *arrays, query_marks, key_marks)
    return out[:, : q.shape[1], :, : q.shape[3]], normalizer[..., : q.shape[1]]


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
    block_q, block_k, warps = _blocks(q, backward=True)
    arrays = _padded(q, block_q), _padded(k, block_k), _padded(v, block_k)
    query_marks, key_marks = pad_marks(query_marks, block_q, PADDED_QUERY), pad_marks(key_marks, block_k, PADDED_KEY)
    key_bounds, query_bounds = block_bounds(query_marks, key_marks, block_q, block_k, options)
    rows = pad_rows(normalizer, block_q, 2), pad_rows(inner_products, block_q, 2)
    operands = *arrays, query_marks, key_marks, *rows, _padded(cotangent.astype(q.dtype), block_q)
    params = plgpu.CompilerParams(num_warps=warps, num_stages=2)

    inner, outer = _specs(arrays[0], arrays[1], block_q, key_bounds, by_queries=True)
    q_grad = pl.pallas_call(
        functools.partial(_query_grad_kernel, options, block_k),
        grid=(arrays[0].shape[1] // block_q, q.shape[2], q.shape[0]),
        in_specs=[
            *(outer["bounds"], outer["array"], inner["array"], inner["array"], outer["marks"], inner["marks"]),
            *(outer["row"], outer["row"], outer["array"]),
        ],
        out_specs=outer["array"],
        out_shape=jax.ShapeDtypeStruct(arrays[0].shape, q.dtype),
        compiler_params=params,
        interpret=interpret,
    )(key_bounds, *operands)

    inner, outer = _specs(arrays[0], arrays[1], block_k, query_bounds, by_queries=False)
    k_grad, v_grad = pl.pallas_call(
        functools.partial(_key_grad_kernel, options, block_q),
        grid=(arrays[1].shape[1] // block_k, k.shape[2], k.shape[0]),
        in_specs=[
            *(outer["bounds"], inner["array"], outer["array"], outer["array"], inner["marks"], outer["marks"]),
            *(inner["row"], inner["row"], inner["array"]),
        ],
        out_specs=[outer["array"]] * 2,
        out_shape=[jax.ShapeDtypeStruct(arrays[1].shape, k.dtype)] * 2,
        compiler_params=params,
        interpret=interpret,
    )(query_bounds, *operands)
    k_grad, v_grad = (x[:, : k.shape[1], :, : k.shape[3]] for x in (k_grad, v_grad))
    return q_grad[:, : q.shape[1], :, : q.shape[3]], k_grad, v_grad


def refusal_of_cudnn(options: Options, q: Float[Array, "B T H D"], k: Float[Array, "B S KV D"]) -> str | None:
    """Why cuDNN cannot serve a call without sinks, segments, positions or bias; None where it can."""
    if jax.default_backend() != "gpu" or "cuda" not in get_backend().platform_version:
        return "needs an NVIDIA GPU on this machine, since JAX asks the device what its cuDNN can do"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, got {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"takes heads of up to 128 in steps of 8, got {q.shape[3]}"
    if q.shape[1] % 2 or k.shape[1] % 2:
        return f"takes even lengths, got {q.shape[1]} queries and {k.shape[1]} keys"
    if options.softcap is not None:
        return "has no soft cap"
    if options.causal and q.shape[1] != k.shape[1]:
        return f"aligns rows at their start, and {q.shape[1]} queries with {k.shape[1]} keys end together"
    if options.window is not None and not options.causal:
        return "has windows to the left only"
    return None


def cudnn_forward(
    options: Options,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S KV D"],
    v: Float[Array, "B S KV D"],
    query_marks: Int[Array, "B 2 T"],
    key_marks: Int[Array, "B 2 S"],
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
    """Attention by cuDNN, for calls without `refusal_of_cudnn`, and zeros in place of the normalizer.

    It is called as the backward pass calls it again, so that XLA merges the two within one program.
    """
    out, _ = jax.vjp(functools.partial(_cudnn, options), q, k, v)
    return out, jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)


def cudnn_backward(
    options: Options,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S KV D"],
    v: Float[Array, "B S KV D"],
    query_marks: Int[Array, "B 2 T"],
    key_marks: Int[Array, "B 2 S"],
    normalizer: Float[Array, "B H T"],
    inner_products: Float[Array, "B H T"],
    cotangent: Float[Array, "B T H D"],
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S KV D"], Float[Array, "B S KV D"]]:
    """Gradients by cuDNN, which keeps its own normalizer."""
    _, gradient = jax.vjp(functools.partial(_cudnn, options), q, k, v)
    return gradient(cotangent.astype(q.dtype))


def _cudnn(options, q, k, v):
    window = None if options.window is None else (options.window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=options.scale, is_causal=options.causal, local_window_size=window, implementation="cudnn"
    )


def _blocks(q, backward: bool) -> tuple[int, int, int]:
    """Rows of a block of queries and of keys, and warps: what a program holds must fit the shared memory."""
    width, wide = pl.next_power_of_2(q.shape[3]), q.dtype == jnp.float32
    if wide or width > 128:
        return 32, 32, 4
    return (64, 64, 8 if width > 64 else 4) if backward else (128, 64, 8 if width > 64 else 4)


def _padded(x, block):
    """Rows up to a multiple of the block, and heads up to a power of two (at least 16), as Triton's tiles are."""
    return pad_rows(pad_rows(x, block, 1), max(16, pl.next_power_of_2(x.shape[3])), 3)


def _specs(q, k, block, bounds, *, by_queries: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a program sees of each array: all inner rows, and its block of outer rows.

    By queries a program has one query head; by keys it has one key head and all query heads of it.
    """
    group = q.shape[2] // k.shape[2]
    heads, inner_length, width = (1, k.shape[1], q.shape[3]) if by_queries else (group, q.shape[1], q.shape[3])
    if by_queries:
        inner_array = pl.BlockSpec((None, inner_length, None, width), lambda i, h, b: (b, 0, jax.lax.div(h, group), 0))
    else:
        inner_array = pl.BlockSpec((None, inner_length, heads, width), lambda i, h, b: (b, 0, h, 0))
    inner = {
        "array": inner_array,
        "marks": pl.BlockSpec((None, 2, inner_length), lambda i, h, b: (b, 0, 0)),
        "row": pl.BlockSpec((None, heads, inner_length), lambda i, h, b: (b, h, 0)),
    }
    outer = {
        "array": pl.BlockSpec((None, block, None, width), lambda i, h, b: (b, i, h, 0)),
        "marks": pl.BlockSpec((None, 2, block), lambda i, h, b: (b, 0, i)),
        "row": pl.BlockSpec((None, None, block), lambda i, h, b: (b, h, i)),
        "bounds": pl.BlockSpec((None, 2, bounds.shape[2]), lambda i, h, b: (b, 0, 0)),
    }
    return inner, outer


def _forward_kernel(options, block, bounds, q, k, v, query_marks, key_marks, out, normalizer):
    i = pl.program_id(0)
    rows, marks = q[...], (query_marks[0, :][:, None], query_marks[1, :][:, None])

    def step(j, carry):
        peak, sums, total = carry
        here = pl.ds(j * block, block)
        logits, _ = logits_of(dot(rows, k[here, :], 1, 1), options)
        seen = visible(marks, (key_marks[0, here][None], key_marks[1, here][None]), options)
        logits = jnp.where(seen, logits, HIDDEN)
        new = jnp.maximum(peak, jnp.max(logits, axis=1))
        weights = jnp.where(seen, jnp.exp(logits - new[:, None]), 0.0)
        shrink = jnp.exp(peak - new)
        total = total * shrink[:, None] + dot(weights.astype(v.dtype), v[here, :], 1, 0)
        return new, sums * shrink + jnp.sum(weights, axis=1), total

    start = jnp.full(rows.shape[0], HIDDEN, jnp.float32), jnp.zeros(rows.shape[0], jnp.float32)
    peak, sums, total = jax.lax.fori_loop(
        bounds[0, i], bounds[1, i] + 1, step, (*start, jnp.zeros(rows.shape, jnp.float32))
    )
    safe = jnp.where(sums > 0, sums, 1.0)
    out[...] = (total / safe[:, None]).astype(out.dtype)
    normalizer[...] = jnp.where(sums > 0, peak + jnp.log(safe), -jnp.inf)


def _query_grad_kernel(
    options, block, bounds, q, k, v, query_marks, key_marks, normalizer, inner_products, cotangent, q_grad
):
    i = pl.program_id(0)
    rows, out_grad, marks = q[...], cotangent[...], (query_marks[0, :][:, None], query_marks[1, :][:, None])
    shift, inner = normalizer[...][:, None], inner_products[...][:, None]

    def step(j, total):
        here = pl.ds(j * block, block)
        columns = k[here, :]
        logits, slope = logits_of(dot(rows, columns, 1, 1), options)
        seen = visible(marks, (key_marks[0, here][None], key_marks[1, here][None]), options)
        weights = jnp.where(seen, jnp.exp(logits - shift), 0.0)
        product_grad = weights * (dot(out_grad, v[here, :], 1, 1) - inner) * (slope * options.scale)
        return total + dot(product_grad.astype(columns.dtype), columns, 1, 0)

    total = jax.lax.fori_loop(bounds[0, i], bounds[1, i] + 1, step, jnp.zeros(rows.shape, jnp.float32))
    q_grad[...] = total.astype(q_grad.dtype)


def _key_grad_kernel(
    options, block, bounds, q, k, v, query_marks, key_marks, normalizer, inner_products, cotangent, k_grad, v_grad
):
    j = pl.program_id(0)
    columns, values, marks = k[...], v[...], (key_marks[0, :][:, None], key_marks[1, :][:, None])

    def of_head(head, carry):
        def step(i, carry):
            k_total, v_total = carry
            here = pl.ds(i * block, block)
            rows, out_grad = q[here, head, :], cotangent[here, head, :]
            logits, slope = logits_of(dot(columns, rows, 1, 1), options)  # [keys, queries]
            seen = visible((query_marks[0, here][None], query_marks[1, here][None]), marks, options)
            weights = jnp.where(seen, jnp.exp(logits - normalizer[head, here][None]), 0.0)
            weight_grad = dot(values, out_grad, 1, 1) - inner_products[head, here][None]
            product_grad = weights * weight_grad * (slope * options.scale)
            v_total = v_total + dot(weights.astype(out_grad.dtype), out_grad, 1, 0)
            return k_total + dot(product_grad.astype(rows.dtype), rows, 1, 0), v_total

        return jax.lax.fori_loop(bounds[0, j], bounds[1, j] + 1, step, carry)

    zeros = jnp.zeros(columns.shape, jnp.float32)
    k_total, v_total = jax.lax.fori_loop(0, q.shape[1], of_head, (zeros, zeros))
    k_grad[...] = k_total.astype(k_grad.dtype)
    v_grad[...] = v_total.astype(v_grad.dtype)
