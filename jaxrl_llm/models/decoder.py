"""A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU (Touvron et al. 2023).

Layers are unrolled, each with its own key/value arrays: on a CPU a scan over stacked layers doubles an update and
copies the cache at every decode step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.models.functional import split_module
from jaxrl_llm.types import Params

# Per layer {"keys": [B, KV, D, S], "values": [B, KV, S, D]}; the entry at s belongs to position s. Keys lie as the
# product with the queries reads them: a decode step of benchmarks/grpo_step.py is a fifth faster for it on a CPU.
Cache = list[dict[str, Float[Array, "B KV _ _"]]]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder.

    Raises:
      ValueError: heads do not divide evenly among key/value heads, or a head's width is odd.
    """

    vocab_size: int
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int | None = None  # width / num_heads if not given
    ffn_width: int = 512
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    attention_bias: bool = False  # on queries, keys and values, as in Qwen2

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim is None:
            if self.width % self.num_heads:
                raise ValueError(
                    f"width={self.width} must be a multiple of num_heads={self.num_heads}, or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.width // self.num_heads)
        if self.head_dim % 2:  # type: ignore[operator]  # set above
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs of dimensions")


def rotate(x: Float[Array, "B T H D"], positions: Int[Array, "B T"], theta: float) -> Float[Array, "B T H D"]:
    """Rotary position embedding on the two halves of the last axis (Su et al. 2021), angles in float32."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    left, right = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)


def attend(
    queries: Float[Array, "B T H D"],
    keys: Float[Array, "B KV D S"],
    values: Float[Array, "B KV S D"],
    allowed: Bool[Array, "B #T S"],
) -> Float[Array, "B T HD"]:
    """Softmax attention with `H / KV` query heads to a key/value head. A query that may see nothing gets the mean
    value."""
    batch, length, heads, dim = queries.shape
    kv_heads, groups = keys.shape[1], heads // keys.shape[1]
    # one axis for all queries of a key/value head: only small arrays are transposed, never the scores
    queries = jnp.moveaxis((queries * dim**-0.5).reshape(batch, length, kv_heads, groups, dim), 1, 3)
    queries = queries.reshape(batch, kv_heads, groups * length, dim)
    scores = jnp.einsum("bkqd,bkds->bkqs", queries, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(jnp.tile(allowed[:, None], (1, 1, groups, 1)), scores, -1e30), axis=-1)
    attended = jnp.einsum("bkqs,bksd->bkqd", weights.astype(values.dtype), values)
    attended = jnp.moveaxis(attended.reshape(batch, kv_heads, groups, length, dim), 3, 1)
    return attended.reshape(batch, length, heads * dim)


class Attention(nnx.Module):
    """Causal self-attention with rotary positions, over the sequence itself or over a cache."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        head_dim: int = config.head_dim  # type: ignore[assignment]  # set by the config
        narrow = nnx.initializers.variance_scaling(1 / (2 * config.num_layers), "fan_in", "truncated_normal")
        bias = config.attention_bias
        self.query = nnx.Linear(config.width, config.num_heads * head_dim, use_bias=bias, rngs=rngs)
        self.key = nnx.Linear(config.width, config.num_kv_heads * head_dim, use_bias=bias, rngs=rngs)
        self.value = nnx.Linear(config.width, config.num_kv_heads * head_dim, use_bias=bias, rngs=rngs)
        self.out = nnx.Linear(config.num_heads * head_dim, config.width, use_bias=False, kernel_init=narrow, rngs=rngs)

    def __call__(self, x, positions, segment_ids, cache):
        batch, length, _ = x.shape
        config = self.config
        queries = rotate(self.query(x).reshape(batch, length, config.num_heads, -1), positions, config.rope_theta)
        keys = rotate(self.key(x).reshape(batch, length, config.num_kv_heads, -1), positions, config.rope_theta)
        values = self.value(x).reshape(batch, length, config.num_kv_heads, -1)
        if cache is None:
            steps = jnp.arange(length)
            allowed = (steps[:, None] >= steps)[None]
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
            allowed = jnp.arange(values.shape[2]) <= positions[:, :, None]
        return self.out(attend(queries, keys, values, allowed)), cache


class DecoderLayer(nnx.Module):
    """Attention and SwiGLU, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        narrow = nnx.initializers.variance_scaling(1 / (2 * config.num_layers), "fan_in", "truncated_normal")
        self.attention_norm = nnx.RMSNorm(config.width, epsilon=config.norm_eps, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.ffn_norm = nnx.RMSNorm(config.width, epsilon=config.norm_eps, rngs=rngs)
        self.gate = nnx.Linear(config.width, config.ffn_width, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(config.width, config.ffn_width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(config.ffn_width, config.width, use_bias=False, kernel_init=narrow, rngs=rngs)

    def __call__(self, x, positions, segment_ids, cache):
        attended, cache = self.attention(self.attention_norm(x), positions, segment_ids, cache)
        x = x + attended
        h = self.ffn_norm(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h)), cache


class Decoder(nnx.Module):
    """Embedding, layers, final norm: tokens to hidden states. The output matrix is applied by whoever needs logits."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Param(
            config.width**-0.5 * jax.random.normal(rngs.params(), (config.vocab_size, config.width))
        )
        self.layers = nnx.List([DecoderLayer(config, rngs) for _ in range(config.num_layers)])
        self.norm = nnx.RMSNorm(config.width, epsilon=config.norm_eps, rngs=rngs)
        if not config.tie_embeddings:
            self.head = nnx.Param(
                config.width**-0.5 * jax.random.normal(rngs.params(), (config.vocab_size, config.width))
            )

    def __call__(self, tokens, *, positions=None, segment_ids=None, cache=None):
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.embedding[...][tokens]
        new_cache: Cache | None = None if cache is None else []
        for i, layer in enumerate(self.layers):
            x, layer_cache = layer(x, positions, segment_ids, None if cache is None else cache[i])
            if new_cache is not None:
                new_cache.append(layer_cache)
        return self.norm(x), new_cache


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder behind the functional seam.

    `apply(params, tokens[B, T], *, positions[B, T], segment_ids[B, T], cache) -> (hidden[B, T, D], cache)`. Without a
    cache, attention is causal by place within a row and stays inside a segment; positions default to 0, 1, ... and
    restart where the caller lets them (packed rows). With a cache, keys are written at their position and a query sees
    all positions up to its own; position -1 marks padding. `hidden` goes to `ops.token_logprobs` with `head(params)`,
    so that `[B, T, V]` need never exist.
    """

    config: DecoderConfig
    init: Callable[[jax.Array], Params]
    apply: Callable[..., tuple[Float[Array, "B T D"], Any]]

    def head(self, params: Params) -> Float[Array, "V D"]:
        """The output matrix."""
        return params["embedding"] if self.config.tie_embeddings else params["head"]

    def logits(self, params: Params, tokens: Int[Array, "B T"], **kwargs) -> Float[Array, "B T V"]:
        """Logits of the next token, in float32. For looking at; training uses `ops.token_logprobs`."""
        hidden, _ = self.apply(params, tokens, **kwargs)
        return jnp.einsum("btd,vd->btv", hidden, self.head(params), preferred_element_type=jnp.float32)

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype = jnp.float32) -> Cache:
        """Empty keys and values for `length` positions of `batch` sequences."""
        heads, dim = self.config.num_kv_heads, self.config.head_dim
        return [
            {
                "keys": jnp.zeros((batch, heads, dim, length), dtype),
                "values": jnp.zeros((batch, heads, length, dim), dtype),
            }
            for _ in range(self.config.num_layers)
        ]


def replace_prefix(cache: Cache, prefix: Cache, rows: Bool[Array, "B"]) -> Cache:
    """The cache with the entries of `prefix` (same batch, fewer positions) at the front of the chosen `rows`."""

    def replaced(old: Array, new: Array, axis: int) -> Array:
        front = jax.lax.slice_in_dim(old, 0, new.shape[axis], axis=axis)
        front = jnp.where(rows[:, None, None, None], new, front)
        return jax.lax.dynamic_update_slice_in_dim(old, front, 0, axis=axis)

    return [
        {"keys": replaced(old["keys"], new["keys"], 3), "values": replaced(old["values"], new["values"], 2)}
        for old, new in zip(cache, prefix, strict=True)
    ]


def make_decoder(config: DecoderConfig) -> Model:
    """The functions of a decoder with the sizes of `config`; `Model.init(key)` draws parameters."""
    init, apply = split_module(lambda rngs: Decoder(config, rngs))
    return Model(config=config, init=init, apply=apply)


def previous_token_head(
    params: Params, config: DecoderConfig, *, layer: int = 0, kv_head: int = 0, margin: float = 8.0
) -> Params:
    """Freshly drawn parameters in which one query head of a layer starts out looking at the position before its own.

    Its query and its key are constants, the biases, with the query turned back by one position, so that the score of
    the position before exceeds those beside it by `margin` nats, whatever the tokens are. From there "find this token
    further up and copy what followed it" (an induction head, Olsson et al. 2022) is one thing to learn for the next
    layer; from a random start a small decoder takes thousands of updates to find both at once.

    Raises:
      ValueError: the decoder has no attention biases.
    """
    if not config.attention_bias:
        raise ValueError("a previous-token head lives in the biases of queries and keys: set attention_bias=True")
    dim: int = config.head_dim  # type: ignore[assignment]  # set by the config
    frequencies = config.rope_theta ** (-jnp.arange(dim // 2) / (dim // 2))
    strength = jnp.sqrt(margin * dim**0.5 / jnp.sum(1 - jnp.cos(frequencies)))
    head = kv_head * config.num_heads // config.num_kv_heads
    of_query, of_key = (slice(i * dim, (i + 1) * dim) for i in (head, kv_head))
    attention = params["layers"][str(layer)]["attention"]
    query, key = attention["query"], attention["key"]
    turned_back = strength * jnp.concatenate([jnp.cos(frequencies), -jnp.sin(frequencies)])
    straight = strength * jnp.concatenate([jnp.ones(dim // 2), jnp.zeros(dim // 2)])
    changed = {
        "query": {"kernel": query["kernel"].at[:, of_query].set(0), "bias": query["bias"].at[of_query].set(turned_back)},
        "key": {"kernel": key["kernel"].at[:, of_key].set(0), "bias": key["bias"].at[of_key].set(straight)},
    }
    changed_layer = params["layers"][str(layer)] | {"attention": attention | changed}
    return params | {"layers": params["layers"] | {str(layer): changed_layer}}
