"""`decode_attention` in plain XLA, for a CPU and for pages that the kernels do not take; and the plain reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_kernels.attention_mask import HIDDEN, Options, logits_of
from jaxrl_kernels.decode_attention_layout import LOWEST, Sight, join_heads, split_heads, split_sinks

AT_A_TIME = 128  # places of a slot that are looked at together, at least one page


def attend(
    options: Options,
    q: Float[Array, "S T H D"],
    k_pages: Float[Array, "P KV D page"],
    v_pages: Float[Array, "P KV page D"],
    page_table: Int[Array, "S M"] | None,
    sight: Sight,
    sinks: Float[Array, "H"] | None,
) -> Float[Array, "S T H D"]:
    """One product over a contiguous cache; over pages a loop that takes the next few pages of every slot at a time.

    The loop ends at the longest slot. Pages are gathered as they lie, each a matrix of one batched product: to put
    those of a slot side by side means to copy them once more, which took 1.5 to 10 times as long on a CPU.
    """
    (slots, _, heads, _), (num_kv, page) = q.shape, (k_pages.shape[1], k_pages.shape[3])
    rows = split_heads(q, num_kv)
    first, end = (jnp.tile(x, (1, heads // num_kv))[:, None, None, :, None] for x in (sight.first, sight.end))

    def attend_to(keys, values, start, floor):
        """Peak, at least `floor`, and sum of the weights, and the weighted sum of values, over as many pages of each
        slot as there are."""
        few = keys.shape[0] // slots
        logits, _ = logits_of(_product(jnp.repeat(rows, few, axis=0), keys), options)
        places = start + jnp.arange(few * page).reshape(few, 1, 1, page)
        seen = places < end
        if options.window is not None:
            seen = seen & (places >= first)
        logits = jnp.where(seen, logits.reshape(slots, few, *logits.shape[1:]), HIDDEN)
        peak = jnp.maximum(jnp.max(logits, axis=(1, 4), keepdims=True), floor)
        weights = jnp.exp(logits - peak)
        total = _product(weights.astype(values.dtype).reshape(-1, *weights.shape[2:]), values)
        total = jnp.sum(total.reshape(slots, few, *total.shape[1:]), axis=1, keepdims=True)
        return peak, jnp.sum(weights, axis=(1, 4), keepdims=True), total

    def pages_step(m, carry):
        ids = jax.lax.dynamic_slice_in_dim(table, m * few, few, axis=1).reshape(-1)
        old, sums, total = carry
        peak, more_sums, more_total = attend_to(_take(k_pages, ids), _take(v_pages, ids), m * few * page, old)
        shrink = jnp.exp(old - peak)
        return peak, sums * shrink + more_sums, total * shrink + more_total

    if sinks is not None:
        sinks = split_sinks(sinks, num_kv, q.shape[1])[..., None]
    floor = LOWEST if sinks is None else jnp.maximum(sinks, LOWEST)
    if page_table is None:
        peak, sums, total = attend_to(k_pages, v_pages, 0, floor)
    else:
        few = max(1, min(AT_A_TIME // page, page_table.shape[1]))
        table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % few)))  # nobody sees those places
        column = jnp.zeros((slots, 1, *rows.shape[1:3], 1))
        ends = jnp.min(sight.low) // (few * page), -(-jnp.max(sight.high) // (few * page))
        carry = (column + floor, column, jnp.zeros((slots, 1, *rows.shape[1:])))
        peak, sums, total = jax.lax.fori_loop(*ends, pages_step, carry)
    if sinks is not None:
        sums = sums + jnp.exp(sinks - peak)
    return join_heads((total / jnp.where(sums > 0, sums, 1))[:, 0], q.shape[1]).astype(q.dtype)


def _take(pages: Float[Array, "P KV M N"], ids: Int[Array, "S"]) -> Float[Array, "S KV M N"]:
    """Pages by their number, which names one: copied whole, not as rows of N."""
    flat = pages.reshape(pages.shape[0], -1).at[ids].get(mode="promise_in_bounds")
    return flat.reshape(-1, *pages.shape[1:])


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
