"""`flash_attention` over rows that are split between devices (ring attention, Liu et al. 2023, arXiv 2310.01889)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_kernels.attention import add_sinks, check_shapes, inner_products, make_marks, run_backward, run_forward
from jaxrl_kernels.attention_mask import Options


def ring_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T KV D"],
    v: Float[Array, "B T KV D"],
    *,
    axis_name: str,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: Float[Array, "H"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H D"]:
    """`flash_attention` for use under `shard_map`, where T is this device's part of every row.

    Keys and values go around the devices of `axis_name`, one step of n at a time, and partial outputs are merged by
    their normalizers; in the backward pass the gradients of keys and values travel with them. A device computes nothing
    for keys that its queries cannot see, but waits for them: with `causal` the last part of a row has the most work,
    unless the parts are dealt out evenly and named by `positions`, by default the place in the joined row.

    Raises:
      ValueError: as `flash_attention`, and for lengths of queries and keys that differ.
    """
    check_shapes(q, k, v, window, softcap, sinks, None)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"{q.shape[1]} queries and {k.shape[1]} keys on a device: a ring splits rows of one length")
    if positions is None:
        places = jax.lax.axis_index(axis_name) * q.shape[1] + jnp.arange(q.shape[1])
        positions = jnp.broadcast_to(places, q.shape[:2])
    options = Options(causal, window, softcap, q.shape[-1] ** -0.5 if scale is None else float(scale))
    query_marks, key_marks = make_marks(q, k, segment_ids, positions)
    # sinks are put in from outside: their gradient is then JAX's own, summed over devices where shard_map does so
    out, normalizer = _ring(options, implementation, axis_name, q, k, v, query_marks, key_marks)
    return (out if sinks is None else add_sinks(out, normalizer, sinks)[0]).astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ring(options, implementation, axis_name, q, k, v, query_marks, key_marks):
    return _ring_forward(options, implementation, axis_name, q, k, v, query_marks, key_marks)[0]


def _ring_forward(options, implementation, axis_name, q, k, v, query_marks, key_marks):
    held = k, v, key_marks
    out = jnp.zeros(q.shape, jnp.float32)
    normalizer = jnp.full((q.shape[0], q.shape[2], q.shape[1]), -jnp.inf, jnp.float32)
    for step in range(jax.lax.axis_size(axis_name)):
        if step:
            held = _pass_on(held, axis_name)
        part, part_normalizer = run_forward(options, _named(implementation), q, *held[:2], query_marks, held[2], None)
        total = jnp.logaddexp(normalizer, part_normalizer)
        out = out * _share(normalizer, total) + part.astype(jnp.float32) * _share(part_normalizer, total)
        normalizer = total
    return (out, normalizer), (q, k, v, query_marks, key_marks, out.astype(q.dtype), normalizer)


def _ring_backward(options, implementation, axis_name, residuals, cotangents):
    q, k, v, query_marks, key_marks, out, normalizer = residuals
    cotangent, normalizer_cotangent = cotangents
    # the normalizer's gradient by a logit is that logit's weight, which puts it beside the inner products
    inner = inner_products(out, cotangent) - jnp.where(jnp.isfinite(normalizer), normalizer_cotangent, 0)
    q_grad, k_grad, v_grad = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    held = k, v, key_marks, k_grad, v_grad
    for _ in range(jax.lax.axis_size(axis_name)):
        k, v, key_marks, k_grad, v_grad = held
        arrays = q, k, v, query_marks, key_marks, None, normalizer, inner, cotangent.astype(q.dtype)
        parts = run_backward(options, _named(implementation), *arrays)
        q_grad, k_grad, v_grad = (x + part for x, part in zip((q_grad, k_grad, v_grad), parts[:3], strict=True))
        held = _pass_on((k, v, key_marks, k_grad, v_grad), axis_name)  # after the last step they are back at home
    return q_grad.astype(q.dtype), held[3].astype(k.dtype), held[4].astype(v.dtype), None, None


_ring.defvjp(_ring_forward, _ring_backward)


def _named(implementation):
    return implementation, "takes no part in a ring, as it hands out no normalizer"


def _share(normalizer, total):
    share = jnp.where(jnp.isfinite(total), jnp.exp(normalizer - total), 0)
    return share.swapaxes(1, 2)[..., None]


def _pass_on(arrays, axis_name):
    size = jax.lax.axis_size(axis_name)
    return jax.lax.ppermute(arrays, axis_name, [(i, (i + 1) % size) for i in range(size)])
