"""Grouped-query attention (Ainslie et al. 2023) with rotary positions, over a sequence itself or over a cache."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxrl_kernels import cache_write, decode_attention, flash_attention, ring_attention
from jaxrl_kernels.mesh import mesh_axes, split
from jaxrl_llm.models.decoder_config import DecoderConfig
from jaxrl_llm.models.rotary import rotate

# Per layer {"keys": [B, KV, D, S], "values": [B, KV, S, D]}; the entry at s belongs to position s. Keys lie as the
# product with the queries reads them: a decode step of benchmarks/grpo_step.py is a fifth faster for it on a CPU.
# With a "page_table" [B, M] beside them, the first axis are pages of S places each, which rows may share: position p of
# row b lies in page `page_table[b, p // S]`. With `scan_layers` there is an entry for each layer of a period, which has
# those of its repetitions on an axis behind the first, [B, L, KV, D, S]; attention is told of which it is as "layer".
Cache = list[dict[str, Float[Array, "B KV _ _"]]]

FEW = 16  # so many new tokens use the cache as a decode step does; more are worth blocks of queries


class OffsetRMSNorm(nnx.Module):
    """Divides by the root mean square over the last axis and multiplies by `1 + scale`, in float32 (Gemma).

    The offset is added here and not to the parameter: near 1, bfloat16 has fewer digits than near 0.
    """

    def __init__(self, size: int, epsilon: float) -> None:
        self.scale = nnx.Param(jnp.zeros(size))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + self.epsilon)
        return (wide * (1 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


def make_norm(config: DecoderConfig, size: int, rngs: nnx.Rngs) -> nnx.Module:
    """The kind of norm that all layers of a decoder have, over a last axis of `size`."""
    if config.norm_offset:
        return OffsetRMSNorm(size, config.norm_eps)
    return nnx.RMSNorm(size, epsilon=config.norm_eps, rngs=rngs)


def write_cache(
    cache: dict[str, Float[Array, "B KV _ _"]],
    keys: Float[Array, "B T KV D"],
    values: Float[Array, "B T KV D"],
    positions: Int[Array, "B T"],
) -> dict[str, Float[Array, "B KV _ _"]]:
    """The cache of a layer with new entries at their positions; position -1 marks padding, which is not written.

    Heads may lie on several axes (those of a stack of layers, all of which are written).
    """
    size = cache["values"].shape[-2]
    rows, slots = jnp.arange(positions.shape[0])[:, None], positions
    if "page_table" in cache:
        rows = jnp.take_along_axis(cache["page_table"], jnp.maximum(positions, 0) // size, axis=1)
        slots = positions % size
    # the index of padding lies behind the end, where a write is dropped
    slots = jnp.where(positions >= 0, slots, size)
    if positions.shape[1] <= FEW and keys.ndim == 4:
        rows = jnp.broadcast_to(rows, slots.shape)
        written = cache_write(cache["keys"], cache["values"], keys, values, rows, slots)
        return cache | dict(zip(("keys", "values"), written, strict=True))
    return cache | {
        "keys": cache["keys"].at[rows, ..., slots].set(keys.astype(cache["keys"].dtype), mode="drop"),
        "values": cache["values"].at[rows, ..., slots, :].set(values.astype(cache["values"].dtype), mode="drop"),
    }


def attend_to_cache(
    queries: Float[Array, "B T H D"],
    cache: dict[str, Float[Array, "B KV _ _"]],
    positions: Int[Array, "B T"],
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Float[Array, "B T H D"]:
    """Attention over all cached places up to each query's own; a query at position -1 gives 0.

    What an earlier sequence left behind in a row has a position that is still to come, so it is never seen.
    """
    options: dict[str, Any] = {"window": window, "softcap": softcap, "scale": scale}
    if queries.shape[1] <= FEW:
        options |= {"positions": positions, "page_table": cache.get("page_table")}
        lengths = jnp.max(positions, axis=1) + 1
        return decode_attention(queries, cache["keys"], cache["values"], lengths, **options)
    keys, values = cache["keys"], cache["values"]
    if "page_table" in cache:
        table = jnp.clip(cache["page_table"], 0, keys.shape[0] - 1)
        keys, values = _side_by_side(keys[table], 3), _side_by_side(values[table], 2)
    keys, values = jnp.moveaxis(keys, 3, 1), jnp.moveaxis(values, 2, 1)
    places = jnp.broadcast_to(jnp.arange(keys.shape[1]), keys.shape[:2])
    dtype = queries.dtype
    return flash_attention(queries, keys.astype(dtype), values.astype(dtype), positions=(positions, places), **options)


def _take_layer(cache: dict[str, Any], few: bool) -> dict[str, Any]:
    """The cache of one layer of a stack. For a few tokens these are pages of the whole stack, as it would be a copy of
    the layer at every step to cut it out."""
    if "layer" not in cache:
        return cache
    parts, layer = {name: cache[name] for name in ("keys", "values")}, cache["layer"]
    if not few:
        rest = {name: x for name, x in cache.items() if name == "page_table"}
        return {name: jax.lax.dynamic_index_in_dim(x, layer, 1, keepdims=False) for name, x in parts.items()} | rest
    rows, layers = cache["keys"].shape[:2]
    table = jnp.minimum(cache["page_table"], rows) if "page_table" in cache else jnp.arange(rows)[:, None]
    pages = {name: x.reshape(-1, *x.shape[2:]) for name, x in parts.items()}
    return pages | {"page_table": table * layers + layer}


def _put_layer(cache: dict[str, Any], own: dict[str, Any], few: bool) -> dict[str, Any]:
    """The cache with what `_take_layer` gave of it as it is now."""
    if few or "layer" not in cache:
        return cache | {name: own[name].reshape(cache[name].shape) for name in ("keys", "values")}
    put = jax.lax.dynamic_update_index_in_dim
    return cache | {name: put(cache[name], own[name], cache["layer"], 1) for name in ("keys", "values")}


def _side_by_side(pages: Float[Array, "B M *shape"], axis: int) -> Float[Array, "B *joined"]:
    """The pages of each row joined along `axis` of the result."""
    pages = jnp.moveaxis(pages, 1, axis)
    return pages.reshape(*pages.shape[:axis], -1, *pages.shape[axis + 2 :])


class Attention(nnx.Module):
    """Causal self-attention of one layer."""

    def __init__(self, config: DecoderConfig, layer: int, rngs: nnx.Rngs) -> None:
        self.config, self.layer = config, layer
        head_dim: int = config.head_dim  # type: ignore[assignment]  # set by the config
        narrow = nnx.initializers.variance_scaling(1 / (2 * config.num_layers), "fan_in", "truncated_normal")
        bias, query_width, key_width = (
            config.attention_bias,
            config.num_heads * head_dim,
            config.num_kv_heads * head_dim,
        )
        self.query = nnx.Linear(config.width, query_width, use_bias=bias, rngs=rngs)
        self.key = nnx.Linear(config.width, key_width, use_bias=bias, rngs=rngs)
        self.value = nnx.Linear(config.width, key_width, use_bias=bias, rngs=rngs)
        self.out = nnx.Linear(
            query_width, config.width, use_bias=config.attention_out_bias, kernel_init=narrow, rngs=rngs
        )
        if config.qk_norm is not None:
            per_head = config.qk_norm == "head"
            self.query_norm = make_norm(config, head_dim if per_head else query_width, rngs)
            self.key_norm = make_norm(config, head_dim if per_head else key_width, rngs)

    def __call__(self, x, positions, segment_ids, cache):
        batch, length, _ = x.shape
        config, window = self.config, self.config.window(self.layer)
        queries, keys = self._queries_and_keys(x, positions)
        values = self.value(x).reshape(batch, length, config.num_kv_heads, -1)
        options: dict[str, Any] = {
            "window": window,
            "softcap": config.attention_softcap,
            "scale": config.attention_scale,
        }
        # query heads follow the key heads that they read; rows that share pages cannot be on different devices
        heads = mesh_axes("heads", config.num_kv_heads)
        paged = cache is not None and "page_table" in cache
        rows = None if paged else mesh_axes("batch", batch, strict=False)
        if cache is None:
            # causal by place within the row: positions restart where a packed segment begins
            along = mesh_axes("length", length, strict=False)
            attend = flash_attention if along is None else functools.partial(ring_attention, axis_name=along[0])
            parts = P(rows, along, heads)
            attended = split(
                lambda queries, keys, values, segments: attend(queries, keys, values, segment_ids=segments, **options),
                *((parts, parts, parts, P(rows, along)), parts),
            )(queries, keys, values, segment_ids)
        else:

            def write_and_attend(queries, keys, values, cache, positions):
                few = positions.shape[1] <= FEW
                own = write_cache(_take_layer(cache, few), keys, values, positions)
                return attend_to_cache(queries, own, positions, **options), _put_layer(cache, own, few)

            parts = P(rows, None, heads)
            layers = (None,) * ("layer" in cache)
            cached = {name: P(rows, *layers, heads) if name in ("keys", "values") else P() for name in cache}
            attended, cache = split(write_and_attend, (parts, parts, parts, cached, P(rows)), (parts, cached))(
                queries, keys, values, cache, positions
            )
        return self.out(attended.reshape(batch, length, -1)), cache

    def _queries_and_keys(self, x, positions):
        """Projected, normed where the config says so, and turned: [B, T, H, D] and [B, T, KV, D]."""
        config, rope = self.config, self.config.rope(self.layer)
        queries, keys = self.query(x), self.key(x)
        if config.qk_norm == "full":
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        queries = queries.reshape(*x.shape[:2], config.num_heads, -1)
        keys = keys.reshape(*x.shape[:2], config.num_kv_heads, -1)
        if config.qk_norm == "head":
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        if rope is None:
            return queries, keys
        return rotate(queries, positions, rope), rotate(keys, positions, rope)
