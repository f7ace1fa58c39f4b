"""Attention of a few new tokens per slot over a cache of keys in pages (Kwon et al. 2023, arXiv 2309.06180).

A decode step is bound by reading the cache, so every version reads the pages that somebody sees, once for all queries
of a key head (which form the rows of one product), and no others. `positions`, `lengths` and `window` come down to one
range of keys per query, which is all that the versions know of them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_kernels import (
    decode_attention_gpu,
    decode_attention_hopper,
    decode_attention_tpu,
    decode_attention_xla,
)
from jaxrl_kernels.attention_mask import Options
from jaxrl_kernels.decode_attention_layout import Sight
from jaxrl_kernels.dispatch import choose


def decode_attention(
    q: Float[Array, "S T H D"],
    k_pages: Float[Array, "P KV D page"],
    v_pages: Float[Array, "P KV page D"],
    lengths: Int[Array, "S"],
    page_table: Int[Array, "S M"] | None = None,
    *,
    positions: Int[Array, "S T"] | None = None,
    window: int | None = None,
    sinks: Float[Array, "H"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "S T H D"]:
    """`softmax(scale * q k) v` of T queries per slot over the keys that its cache holds, accumulated in float32.

    Query t of slot s sees the keys at places 0 to `positions[s, t]`, its own included, that lie below `lengths[s]` and
    within the window. One that sees no key gives 0. Differentiable, through the plain form, which holds all weights.

    Args:
      q: T new tokens of each of S slots (1 to 16, more is only slow), H query heads, a multiple of the KV heads of the
        cache; query head h reads key head h // (H / KV).
      k_pages, v_pages: P pages of the cache, each with the keys (transposed) and the values of as many places as a page
        has. The new tokens are in it already, and q is rounded to its dtype. What lies at places that nobody sees may
        be anything finite.
      lengths: how many keys slot s holds, the new tokens included. 0 for a slot that is not in use.
      page_table: `page_table[s, m]` is the page with places `m * page` to `(m + 1) * page - 1` of slot s. Slots may
        share pages. Entries at and beyond `lengths` are never read from and may be any number. None: the cache is
        contiguous, slot s has the one page s, and P = S.
      positions: the place of each query, by default `lengths - T + arange(T)`. Negative marks padding, which gives 0.
      window: how many places a query sees, its own included.
      sinks: a logit per head that takes part in the softmax but has no value (gpt-oss).
      softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2).
      scale: by default `1 / sqrt(D)`.
      implementation: None (the platform decides, when the program is lowered), "xla", "pallas_tpu", "pallas_gpu",
        "mosaic_gpu" (Hopper), "reference" (plain, gathers all pages), or for tests "interpret_tpu", "interpret_gpu" and
        "interpret_mosaic".

    Returns:
      [S, T, H, D] in the dtype of q.

    Raises:
      ValueError: shapes, dtypes or options that do not fit, an implementation that cannot serve this call, and outside
        jit also lengths beyond the table and page ids in use that name no page (inside jit both are clamped).
    """
    _check(q, k_pages, v_pages, lengths, page_table, positions, window, sinks, softcap)
    capacity = k_pages.shape[3] * (1 if page_table is None else page_table.shape[1])
    _check_values(lengths, page_table, k_pages.shape[0], k_pages.shape[3], capacity)
    options = Options(True, window, softcap, q.shape[-1] ** -0.5 if scale is None else float(scale))
    lengths = jnp.asarray(lengths, jnp.int32)
    if positions is None:
        positions = lengths[:, None] - q.shape[1] + jnp.arange(q.shape[1])
    if page_table is not None:
        page_table = jnp.clip(page_table, 0, k_pages.shape[0] - 1).astype(jnp.int32)
    sight = _sight(jnp.asarray(positions, jnp.int32), jnp.minimum(lengths, capacity), window)
    out = _attend_once(options, implementation, q.astype(k_pages.dtype), k_pages, v_pages, page_table, sight, sinks)
    return out.astype(q.dtype)


def _sight(positions: Int[Array, "S T"], lengths: Int[Array, "S"], window: int | None) -> Sight:
    """The keys that each query sees, and those between which all of a slot's queries look."""
    end = jnp.maximum(jnp.minimum(positions + 1, lengths[:, None]), 0)
    if window is None:
        return Sight(jnp.zeros_like(end), end, jnp.zeros_like(lengths), jnp.max(end, axis=1))
    first = jnp.minimum(jnp.maximum(positions - window + 1, 0), end)
    high = jnp.max(end, axis=1)
    low = jnp.min(jnp.where(first < end, first, high[:, None]), axis=1)
    return Sight(first, end, low, high)


def _check(q, k_pages, v_pages, lengths, page_table, positions, window, sinks, softcap) -> None:
    """Raises ValueError where the arrays and options of a call do not fit together."""
    shapes = f"q {q.shape}, k_pages {k_pages.shape}, v_pages {v_pages.shape}"
    if q.ndim != 4 or k_pages.ndim != 4 or v_pages.shape != (*k_pages.shape[:2], *k_pages.shape[:1:-1]):
        raise ValueError(
            f"expected q [S, T, H, D], k_pages [P, KV, D, page] and v_pages [P, KV, page, D], got {shapes}"
        )
    if q.shape[3] != k_pages.shape[2]:
        raise ValueError(f"heads of {q.shape[3]} in q and of {k_pages.shape[2]} in the cache: {shapes}")
    if 0 in q.shape or 0 in k_pages.shape:
        raise ValueError(f"an axis of length 0 in {shapes}: leave the call out where there are no tokens")
    if q.shape[2] % k_pages.shape[1]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k_pages.shape[1]} key heads: {shapes}")
    if k_pages.dtype != v_pages.dtype or not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (q, k_pages)):
        raise ValueError(
            f"q, k_pages and v_pages are {q.dtype}, {k_pages.dtype} and {v_pages.dtype}; expected floating point, and "
            "one dtype for keys and values"
        )
    slots, length, heads = q.shape[:3]
    if page_table is None and k_pages.shape[0] != slots:
        raise ValueError(f"{k_pages.shape[0]} pages for {slots} slots: without a page_table slot s has the one page s")
    if page_table is not None and (page_table.ndim != 2 or page_table.shape[0] != slots or not page_table.shape[1]):
        raise ValueError(f"page_table of shape {page_table.shape}, expected [{slots}, M] with M at least 1")
    for name, array, expected in (("lengths", lengths, (slots,)), ("positions", positions, (slots, length))):
        if array is not None and array.shape != expected:
            raise ValueError(f"{name} of shape {array.shape}, expected {expected} for {shapes}")
    for name, array in (("lengths", lengths), ("positions", positions), ("page_table", page_table)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} of dtype {array.dtype}, expected integers: cast them with astype(jnp.int32)")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: expected at least 1, as a query's own place counts; None sees all")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap}: expected a positive number; None caps nothing")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks of shape {sinks.shape}, expected one for each of the {heads} query heads")


def _check_values(lengths, page_table, num_pages: int, page: int, capacity: int) -> None:
    """Raises ValueError for lengths and page ids that cannot be, where their values can be looked at."""
    if any(isinstance(array, jax.core.Tracer) for array in (lengths, page_table)):
        return
    lengths = np.asarray(lengths)
    if lengths.min() < 0 or lengths.max() > capacity:
        raise ValueError(
            f"lengths of {lengths.min()} to {lengths.max()}, expected 0 to {capacity}, all that pages hold"
        )
    if page_table is None:
        return
    live = np.asarray(page_table)[np.arange(page_table.shape[1]) * page < lengths[:, None]]
    if live.size and (live.min() < 0 or live.max() >= num_pages):
        raise ValueError(f"page_table names pages {live.min()} to {live.max()} in use, expected 0 to {num_pages - 1}")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attend(options, implementation, q, k_pages, v_pages, page_table, sight, sinks):
    refusal = decode_attention_tpu.refusal(q, k_pages, page_table)
    hopper_refusal = decode_attention_hopper.refusal(k_pages)
    versions: dict[str, Any] = {
        "cpu": decode_attention_xla.attend,
        "tpu": refusal or decode_attention_tpu.attend,
        "gpu": decode_attention_gpu.attend,
        "hopper": hopper_refusal or decode_attention_hopper.attend,
        "reference": decode_attention_xla.reference,
        "interpret_tpu": refusal or functools.partial(decode_attention_tpu.attend, interpret=True),
        "interpret_gpu": functools.partial(decode_attention_gpu.attend, interpret=True),
        "interpret_mosaic": hopper_refusal or functools.partial(decode_attention_hopper.attend, interpret=True),
    }
    bound: dict[str, Any] = {
        name: version if isinstance(version, str) else functools.partial(version, options)
        for name, version in versions.items()
    }
    return choose(implementation, **bound)(q, k_pages, v_pages, page_table, sight, sinks)


@_attend.defjvp
def _differentiate(options, implementation, primals, tangents):
    """The derivative of the plain form: with few queries, the weights that it holds are few."""
    _, tangent = jax.jvp(functools.partial(decode_attention_xla.reference, options), primals, tangents)
    return _attend(options, implementation, *primals), tangent


# All versions are traced and one is lowered for each shape, not for each layer of a model that calls it.
_attend_once = jax.jit(_attend, static_argnums=(0, 1))
