"""`decode_attention` in plain XLA, for a CPU and for pages that the kernels do not take; and the plain reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_kernels.attention_mask import HIDDEN, Options, logits_of
from jaxrl_kernels.decode_attention_layout import LOWEST, Sight, join_heads, split_heads, split_sinks


def attend(
    options: Options,
    q: Float[Array, "S T H D"],
    k_pages: Float[Array, "P KV D page"],
    v_pages: Float[Array, "P KV page D"],
    page_table: Int[Array, "S M"] | None,
    sight: Sight,
    sinks: Float[Array, "H"] | None,
) -> Float[Array, "S T H D"]:
    """One product over a contiguous cache; over pages a loop that takes the m-th page of every slot at a time.

    The loop ends at the longest slot. Pages are gathered as they lie: to put several side by side, or all of them,
    means to copy them once more, which took 1.5 to 10 times as long on a CPU.
    """
    num_kv, page = k_pages.shape[1], k_pages.shape[3]
    rows = split_heads(q, num_kv)
    first, end = (jnp.tile(x, (1, q.shape[2] // num_kv))[:, None, :, None] for x in (sight.first, sight.end))

    def attend_to(keys, values, start, floor):
        """Peak, at least `floor`, and sum of the weights, and the weighted sum of values, over one page per slot."""
        logits, _ = logits_of(_product(rows, keys), options)
        places = start + jnp.arange(page)
        seen = places < end
        if options.window is not None:
            seen = seen & (places >= first)
        logits = jnp.where(seen, logits, HIDDEN)
        peak = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), floor)
        weights = jnp.exp(logits - peak)
        return peak, jnp.sum(weights, axis=-1, keepdims=True), _product(weights.astype(values.dtype), values)

    def page_step(m, carry):
        ids = jax.lax.dynamic_index_in_dim(page_table, m, axis=1, keepdims=False)
        old, sums, total = carry
        peak, more_sums, more_total = attend_to(k_pages[ids], v_pages[ids], m * page, old)
        shrink = jnp.exp(old - peak)
        return peak, sums * shrink + more_sums, total * shrink + more_total

    if sinks is not None:
        sinks = split_sinks(sinks, num_kv, q.shape[1])[..., None]
    floor = LOWEST if sinks is None else jnp.maximum(sinks, LOWEST)
    if page_table is None:
        peak, sums, total = attend_to(k_pages, v_pages, 0, floor)
    else:
        column = jnp.zeros((*rows.shape[:3], 1))
        ends = jnp.min(sight.low) // page, -(-jnp.max(sight.high) // page)
        peak, sums, total = jax.lax.fori_loop(*ends, page_step, (column + floor, column, jnp.zeros(rows.shape)))
    if sinks is not None:
        sums = sums + jnp.exp(sinks - peak)
    return join_heads(total / jnp.where(sums > 0, sums, 1), q.shape[1]).astype(q.dtype)


def _product(x: Float[Array, "S KV M N"], y: Float[Array, "S KV N L"]) -> Float[Array, "S KV M L"]:
    precision = jax.lax.Precision.HIGHEST if y.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum("skmn,sknl->skml", x, y, precision=precision, preferred_element_type=jnp.float32)


def reference(
    options: Options,
    q: Float[Array, "S T H D"],
    k_pages: Float[Array, "P KV D page"],
    v_pages: Float[Array, "P KV page D"],
    page_table: Int[Array, "S M"] | None,
    sight: Sight,
    sinks: Float[Array, "H"] | None,
) -> Float[Array, "S T H D"]:
    """All pages of a slot side by side, all weights at once, in float32."""
    (slots, length, heads, width), num_kv = q.shape, k_pages.shape[1]
    table = jnp.arange(slots)[:, None] if page_table is None else page_table
    keys = jnp.moveaxis(k_pages[table], 1, 3).reshape(slots, num_kv, width, -1).astype(jnp.float32)
    values = jnp.moveaxis(v_pages[table], 1, 2).reshape(slots, num_kv, -1, width).astype(jnp.float32)
    group = heads // num_kv
    rows = q.astype(jnp.float32).reshape(slots, length, num_kv, group, width)
    logits, _ = logits_of(jnp.einsum("stkgd,skdn->skgtn", rows, keys, precision="highest"), options)
    places = jnp.arange(keys.shape[3])
    seen = (sight.first[..., None] <= places) & (places < sight.end[..., None])
    logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    sink = jnp.full(heads, -jnp.inf) if sinks is None else sinks.astype(jnp.float32)
    sink = jnp.broadcast_to(sink.reshape(num_kv, group, 1, 1), (*logits.shape[:-1], 1))
    logits = jnp.concatenate([logits, sink], axis=-1)
    peak = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), LOWEST)
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.where(total > 0, total, 1))[..., :-1]
    out = jnp.einsum("skgtn,sknd->stkgd", weights, values, precision="highest")
    return out.reshape(q.shape).astype(q.dtype)
