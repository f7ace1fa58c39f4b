"""Grouped-query attention (Ainslie et al. 2023) with rotary positions, over a sequence itself or over a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxrl_kernels.logprob import soft_cap
from jaxrl_llm.models.decoder_config import DecoderConfig
from jaxrl_llm.models.rotary import rotate

# Per layer {"keys": [B, KV, D, S], "values": [B, KV, S, D]}; the entry at s belongs to position s. Keys lie as the
# product with the queries reads them: a decode step of benchmarks/grpo_step.py is a fifth faster for it on a CPU.
Cache = list[dict[str, Float[Array, "B KV _ _"]]]


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


def attend(
    queries: Float[Array, "B T H D"],
    keys: Float[Array, "B KV D S"],
    values: Float[Array, "B KV S D"],
    allowed: Bool[Array, "B #T S"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T HD"]:
    """Softmax attention with `H / KV` query heads to a key/value head. A query that may see nothing gets the mean
    value.

    Scores are multiplied by `scale` (`D**-0.5` if not given) and, with `softcap`, kept between plus and minus that.
    """
    batch, length, heads, dim = queries.shape
    kv_heads, groups = keys.shape[1], heads // keys.shape[1]
    scale = dim**-0.5 if scale is None else scale
    # one axis for all queries of a key/value head: only small arrays are transposed, never the scores
    queries = jnp.moveaxis((queries * scale).reshape(batch, length, kv_heads, groups, dim), 1, 3)
    queries = queries.reshape(batch, kv_heads, groups * length, dim)
    scores = jnp.einsum("bkqd,bkds->bkqs", queries, keys, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = soft_cap(scores, softcap)
    weights = jax.nn.softmax(jnp.where(jnp.tile(allowed[:, None], (1, 1, groups, 1)), scores, -1e30), axis=-1)
    attended = jnp.einsum("bkqs,bksd->bkqd", weights.astype(values.dtype), values)
    attended = jnp.moveaxis(attended.reshape(batch, kv_heads, groups, length, dim), 3, 1)
    return attended.reshape(batch, length, heads * dim)


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
        if cache is None:
            steps = jnp.arange(length)
            allowed = (steps[:, None] >= steps)[None]
            if window is not None:  # by place within the row: positions restart where a packed segment begins
                allowed = allowed & (steps[:, None] - steps < window)
            if segment_ids is not None:
                allowed = allowed & (segment_ids[:, :, None] == segment_ids[:, None, :])
            keys, values = jnp.moveaxis(keys, 1, 3), jnp.moveaxis(values, 1, 2)
        else:
            # position -1 marks padding: its index lies behind the end, and the write is dropped
            slots = jnp.where(positions >= 0, positions, cache["values"].shape[2])
            rows = jnp.arange(batch)[:, None]
            keys = cache["keys"].at[rows, :, :, slots].set(keys.astype(cache["keys"].dtype), mode="drop")
            values = cache["values"].at[rows, :, slots].set(values.astype(cache["values"].dtype), mode="drop")
            cache = {"keys": keys, "values": values}
            # what an earlier sequence left behind in a slot has a position that is still to come, so it is never seen
            steps = jnp.arange(values.shape[2])
            allowed = steps <= positions[:, :, None]
            if window is not None:
                allowed = allowed & (positions[:, :, None] - steps < window)
        attended = attend(
            queries, keys, values, allowed, scale=config.attention_scale, softcap=config.attention_softcap
        )
        return self.out(attended), cache

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
