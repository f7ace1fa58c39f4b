"""`flash_attention` in plain XLA: the one for a CPU, and on every platform the one for an additive bias.

A block of queries at a time, against the blocks of keys that it may see, with an online softmax; the backward pass
computes the logits again from the normalizer that the forward pass left. The largest temporary is a block by a block.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
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


def forward(
    options: Options,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S KV D"],
    v: Float[Array, "B S KV D"],
    query_marks: Int[Array, "B 2 T"],
    key_marks: Int[Array, "B 2 S"],
    bias: Float[Array, "b h T S"] | None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
    """Attention and the logarithm of each row's softmax normalizer (minus infinity where a query sees nothing)."""
    length, num_kv = q.shape[1], k.shape[2]
    queries, keys, values = _query_blocks(q, num_kv), _key_blocks(k), _key_blocks(v)
    scores = _scorer(options, q, k, query_marks, key_marks, bias)
    (first, last), num_blocks = _bounds(options, q, k, query_marks, key_marks), queries.shape[0]

    def block(i):
        rows = queries[i].astype(jnp.float32)

        def step(j, carry):
            peak, total, out = carry
            logits, seen, _ = scores(rows, keys[j], i, j)
            new = jnp.maximum(peak, jnp.max(jnp.where(seen, logits, HIDDEN), axis=-1))
            weights = jnp.where(seen, jnp.exp(logits - new[..., None]), 0)
            shrink = jnp.exp(peak - new)
            out = out * shrink[..., None] + jnp.einsum("bkgts,bksd->bkgtd", weights, values[j].astype(jnp.float32))
            return new, total * shrink + jnp.sum(weights, axis=-1), out

        empty = jnp.zeros(rows.shape[:-1])
        start = (empty + HIDDEN, empty, jnp.zeros(rows.shape))
        peak, total, out = _loop(keys.shape[0], first[i], last[i], step, start)
        safe = jnp.where(total > 0, total, 1)
        return (out / safe[..., None]).astype(q.dtype), jnp.where(total > 0, peak + jnp.log(safe), -jnp.inf)

    _, (out, normalizer) = _over_queries(lambda _, i: (None, block(i)), None, num_blocks)
    return _join_queries(out)[:, :length], _join_rows(normalizer)[:, :, :length]


def backward(
    options: Options,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S KV D"],
    v: Float[Array, "B S KV D"],
    query_marks: Int[Array, "B 2 T"],
    key_marks: Int[Array, "B 2 S"],
    bias: Float[Array, "b h T S"] | None,
    normalizer: Float[Array, "B H T"],
    inner: Float[Array, "B H T"],
    cotangent: Float[Array, "B T H D"],
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of q, k, v and the bias; `inner` is the sum over D of output times cotangent."""
    length, num_kv = q.shape[1], k.shape[2]
    queries, keys, values = _query_blocks(q, num_kv), _key_blocks(k), _key_blocks(v)
    cotangents = _query_blocks(cotangent, num_kv)
    normalizers, inners = (
        _row_blocks(normalizer, num_kv, queries.shape[4]),
        _row_blocks(inner, num_kv, queries.shape[4]),
    )
    scores = _scorer(options, q, k, query_marks, key_marks, bias)
    first, last = _bounds(options, q, k, query_marks, key_marks)

    def block(carry, i):
        rows, out_grad = queries[i].astype(jnp.float32), cotangents[i].astype(jnp.float32)

        def step(j, carry):
            q_grad, k_grad, v_grad, bias_grad = carry
            columns = keys[j].astype(jnp.float32)
            logits, seen, slope = scores(rows, columns, i, j)
            weights = jnp.where(seen, jnp.exp(logits - normalizers[i][..., None]), 0)
            weight_grad = jnp.einsum("bkgtd,bksd->bkgts", out_grad, values[j].astype(jnp.float32))
            logit_grad = weights * (weight_grad - inners[i][..., None])
            if bias_grad is not None:
                bias_grad = _add_bias_block(bias_grad, logit_grad, i, j)
            product_grad = logit_grad * slope * options.scale
            q_grad = q_grad + jnp.einsum("bkgts,bksd->bkgtd", product_grad, columns)
            k_grad = k_grad.at[j].add(jnp.einsum("bkgts,bkgtd->bksd", product_grad, rows))
            v_grad = v_grad.at[j].add(jnp.einsum("bkgts,bkgtd->bksd", weights, out_grad))
            return q_grad, k_grad, v_grad, bias_grad

        q_grad, *carry = _loop(keys.shape[0], first[i], last[i], step, (jnp.zeros(rows.shape), *carry))
        return tuple(carry), q_grad.astype(q.dtype)

    zeros = jnp.zeros(keys.shape)
    bias_zeros: Any = None if bias is None else jnp.zeros_like(_pad_bias(bias, q, k), dtype=jnp.float32)
    (*key_grads, bias_sums), q_grad = _over_queries(block, (zeros, zeros, bias_zeros), queries.shape[0])
    k_grad, v_grad = (_join_keys(x)[:, : k.shape[1]].astype(k.dtype) for x in key_grads)
    bias_grad = None if bias is None else bias_sums[..., :length, : k.shape[1]].astype(bias.dtype)
    return _join_queries(q_grad)[:, :length], k_grad, v_grad, bias_grad


def _over_queries(block: Any, carry: Any, num_blocks: int) -> Any:
    """`jax.lax.scan` over the blocks of queries; a single one without the cost of a loop."""
    if num_blocks > 1:
        return jax.lax.scan(block, carry, jnp.arange(num_blocks))
    carry, out = block(carry, 0)
    return carry, jax.tree.map(lambda x: x[None], out)


def _loop(num_blocks: int, first: Array, last: Array, step: Any, carry: Any) -> Any:
    """The blocks of keys from `first` to `last`; here too a single one without a loop."""
    return step(0, carry) if num_blocks == 1 else jax.lax.fori_loop(first, last + 1, step, carry)


def _block(length: int) -> int:
    """The size of equal blocks: small ones where half of the work would lie beyond the diagonal."""
    largest = 64 if 128 <= length <= 256 else 128
    return -(-length // -(-length // largest))


def _sizes(q, k) -> tuple[int, int]:
    return _block(q.shape[1]), _block(k.shape[1])


def _bounds(options, q, k, query_marks, key_marks):
    """Bounds of `block_bounds` that hold for every row of the batch, which goes through the loop together."""
    block_q, block_k = _sizes(q, k)
    query_marks, key_marks = pad_marks(query_marks, block_q, PADDED_QUERY), pad_marks(key_marks, block_k, PADDED_KEY)
    bounds, _ = block_bounds(query_marks, key_marks, block_q, block_k, options)
    return jnp.min(bounds[:, 0], axis=0), jnp.max(bounds[:, 1], axis=0)


def _scorer(options, q, k, query_marks, key_marks, bias):
    """A function of a block of queries and one of keys: logits, who sees whom, and the slope of the cap."""
    block_q, block_k = _sizes(q, k)
    num_kv, group = k.shape[2], q.shape[2] // k.shape[2]
    query_marks, key_marks = pad_marks(query_marks, block_q, PADDED_QUERY), pad_marks(key_marks, block_k, PADDED_KEY)
    if bias is not None:
        bias = _pad_bias(bias, q, k)
        heads = (1, 1) if bias.shape[1] == 1 else (num_kv, group)

    def scores(rows, columns, i, j):
        products = jnp.einsum("bkgtd,bksd->bkgts", rows, columns.astype(jnp.float32))
        logits, slope = logits_of(products, options)
        if bias is not None:
            block = jax.lax.dynamic_slice(bias, (0, 0, i * block_q, j * block_k), (*bias.shape[:2], block_q, block_k))
            logits = logits + block.reshape(bias.shape[0], *heads, block_q, block_k).astype(jnp.float32)
        ours = jax.lax.dynamic_slice_in_dim(query_marks, i * block_q, block_q, 2)[..., None]
        theirs = jax.lax.dynamic_slice_in_dim(key_marks, j * block_k, block_k, 2)[:, :, None]
        seen = visible((ours[:, 0], ours[:, 1]), (theirs[:, 0], theirs[:, 1]), options)
        return logits, seen[:, None, None], slope

    return scores


def _pad_bias(bias, q, k):
    block_q, block_k = _sizes(q, k)
    return pad_rows(pad_rows(bias, block_q, 2), block_k, 3)


def _add_bias_block(total, logit_grad, i, j):
    """Adds the gradient of one block, summed over what the bias is shared by."""
    batch, num_kv, group, block_q, block_k = logit_grad.shape
    block = logit_grad.reshape(batch, num_kv * group, block_q, block_k)
    shared = tuple(axis for axis in (0, 1) if total.shape[axis] == 1)
    block = jnp.sum(block, axis=shared, keepdims=True)
    start = (0, 0, i * block_q, j * block_k)
    return jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, start, block.shape) + block, start)


def _query_blocks(x, num_kv):
    """[B, T, H, D] -> [blocks, B, KV, H/KV, block, D]: the query heads of a key head side by side."""
    block = _block(x.shape[1])
    x = pad_rows(x, block, 1)
    x = x.reshape(x.shape[0], -1, block, num_kv, x.shape[2] // num_kv, x.shape[3])
    return x.transpose(1, 0, 3, 4, 2, 5)


def _join_queries(x):
    num_blocks, batch, num_kv, group, block, width = x.shape
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, num_blocks * block, num_kv * group, width)


def _key_blocks(x):
    """[B, S, KV, D] -> [blocks, B, KV, block, D]."""
    block = _block(x.shape[1])
    x = pad_rows(x, block, 1)
    return x.reshape(x.shape[0], -1, block, *x.shape[2:]).transpose(1, 0, 3, 2, 4)


def _join_keys(x):
    num_blocks, batch, num_kv, block, width = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, num_blocks * block, num_kv, width)


def _row_blocks(x, num_kv, block):
    """[B, H, T] -> [blocks, B, KV, H/KV, block]."""
    x = pad_rows(x, block, 2)
    return x.reshape(x.shape[0], num_kv, x.shape[1] // num_kv, -1, block).transpose(3, 0, 1, 2, 4)


def _join_rows(x):
    num_blocks, batch, num_kv, group, block = x.shape
    return x.transpose(1, 2, 3, 0, 4).reshape(batch, num_kv * group, num_blocks * block)
