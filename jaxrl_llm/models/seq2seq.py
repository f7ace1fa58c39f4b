"""T5, an encoder and a decoder with relative positions (Raffel et al. 2020), in its first form (ReLU, tied head) and in
that of v1.1 and Flan (gated GELU, own head)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrl_kernels.mesh import constrain, mesh_axes
from jaxrl_llm.models.activations import ACTIVATIONS
from jaxrl_llm.models.attention import write_cache
from jaxrl_llm.models.encoder import FeedForward, segments_to_see
from jaxrl_llm.models.functional import split_module
from jaxrl_llm.types import Params

# {"mask": [B, S], "layers": [{"keys": [B, H, D, L], "values": [B, H, L, D], "cross_keys": [B, H, D, S],
# "cross_values": [B, H, S, D]}]}: L positions of the decoder and S of the encoder. Rows come first everywhere, so a
# beam search reorders it with `jax.tree.map(lambda x: x[order], cache)`.
Seq2SeqCache = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Seq2SeqConfig:
    """Sizes and form of a T5.

    Attributes:
      num_layers, num_decoder_layers: depth of the encoder and of the decoder.
      num_buckets, max_distance: the relative positions that attention tells apart; from `max_distance` on they are one.
      gated: the feed-forward is `activation(gate(x)) * up(x)`.
      tie_embeddings: the head is the embedding, and hidden states are scaled by `width ** -0.5` before it.

    Raises:
      ValueError: an unknown activation, or buckets that cannot be halved.
    """

    vocab_size: int
    width: int = 128
    head_dim: int = 32
    num_heads: int = 4
    ffn_width: int = 512
    num_layers: int = 2
    num_decoder_layers: int = 2
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    activation: str = "relu"
    gated: bool = False
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {self.activation!r}")
        if self.num_buckets < 4 or self.num_buckets % 4:
            raise ValueError(f"num_buckets={self.num_buckets} must be a multiple of 4: half of them for each direction,"
                             " half of those for single distances")  # fmt: skip
        if self.max_distance <= self.num_buckets // 2:
            raise ValueError(f"max_distance={self.max_distance} must exceed num_buckets / 2 = {self.num_buckets // 2}: "
                             "shorter distances have a bucket each")  # fmt: skip


def relative_position_buckets(
    relative: Int[Array, "..."], *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[Array, "..."]:
    """The bucket of each relative position, that of the key less that of the query (Raffel et al. 2020, section 2.1).

    Half of the buckets of a direction hold one distance each; the others grow with the logarithm of the distance, and
    the last one takes all from `max_distance` on. If not `bidirectional`, keys ahead of the query count as distance 0.
    """
    per_direction = num_buckets // 2 if bidirectional else num_buckets
    exact = per_direction // 2
    # Looked up in a table that NumPy computes while tracing: compilers round logarithms and divisions differently, and
    # a bucket's edge can lie on a whole number.
    distances = np.arange(max_distance + 1)
    scaled = np.log(np.maximum(distances, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        np.log(max_distance / exact)
    )
    large = exact + (scaled * np.float32(per_direction - exact)).astype(np.int32)
    table = jnp.asarray(np.where(distances < exact, distances, np.minimum(large, per_direction - 1)))
    distance = jnp.abs(relative) if bidirectional else jnp.maximum(-relative, 0)
    buckets = table[jnp.minimum(distance, max_distance)]
    return buckets + jnp.where(relative > 0, per_direction, 0) if bidirectional else buckets


def attend(
    queries: Float[Array, "B T H D"],
    keys: Float[Array, "B H D S"],
    values: Float[Array, "B H S D"],
    allowed: Bool[Array, "#B #T S"] | None,
    bias: Float[Array, "#B H T S"] | None = None,
) -> Float[Array, "B T HD"]:
    """Softmax attention with as many key/value heads as query heads, scores in float32 plus `bias`. A query that may
    see nothing gets the mean value.

    In plain XLA: the bias is as large as the scores, so a kernel that does not hold these would save nothing.
    """
    batch, length, heads, dim = queries.shape
    mesh_axes("heads", heads)  # XLA divides them; a mesh that cannot is refused
    scores = jnp.einsum("bthd,bhds->bhts", queries, keys, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = jnp.where(allowed[:, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bhts,bhsd->bthd", weights, values).reshape(batch, length, heads * dim)


class RelativeAttention(nnx.Module):
    """Projections of an attention whose scores are not scaled: the initial queries are small instead."""

    def __init__(self, config: Seq2SeqConfig, rngs: nnx.Rngs) -> None:
        heads, inner = config.num_heads, config.num_heads * config.head_dim
        small = nnx.initializers.variance_scaling(1 / config.head_dim, "fan_in", "truncated_normal")
        self.num_heads = heads
        self.query = nnx.Linear(config.width, inner, use_bias=False, kernel_init=small, rngs=rngs)
        self.key = nnx.Linear(config.width, inner, use_bias=False, rngs=rngs)
        self.value = nnx.Linear(config.width, inner, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(inner, config.width, use_bias=False, rngs=rngs)

    def keys_and_values(self, memory: Float[Array, "B S W"]) -> tuple[Float[Array, "B H D S"], Float[Array, "B H S D"]]:
        """Keys `[B, H, D, S]` and values `[B, H, S, D]` of the states that are looked at."""
        shape = (*memory.shape[:2], self.num_heads, -1)
        return (
            jnp.moveaxis(self.key(memory).reshape(shape), 1, 3),
            jnp.moveaxis(self.value(memory).reshape(shape), 1, 2),
        )

    def __call__(self, x, keys, values, allowed, bias=None):
        queries = self.query(x).reshape(*x.shape[:2], self.num_heads, -1)
        return self.out(attend(queries, keys, values, allowed, bias))


class Block(nnx.Module):
    """Self-attention, cross-attention in a decoder, and feed-forward, each behind a norm."""

    def __init__(self, config: Seq2SeqConfig, cross: bool, rngs: nnx.Rngs) -> None:
        def norm() -> nnx.RMSNorm:
            return nnx.RMSNorm(config.width, epsilon=config.norm_eps, rngs=rngs)

        self.attention_norm, self.attention = norm(), RelativeAttention(config, rngs)
        if cross:
            self.cross_norm, self.cross_attention = norm(), RelativeAttention(config, rngs)
        self.ffn_norm = norm()
        self.ffn = FeedForward(config.width, config.ffn_width, config.activation, config.gated, False, rngs)

    def __call__(self, x, allowed, bias, cross_allowed=None, memory=None, cache=None, positions=None):
        """`memory` has the keys and values of the encoder; with a `cache`, those of the decoder are written to its
        `positions[B, T]`."""
        h = self.attention_norm(x)
        keys, values = self.attention.keys_and_values(h)
        if cache is not None:
            cache = cache | write_cache(cache, jnp.moveaxis(keys, 3, 1), jnp.moveaxis(values, 2, 1), positions)
            keys, values = cache["keys"], cache["values"]
        x = x + self.attention(h, keys, values, allowed, bias)
        if memory is not None:
            cross_keys, cross_values = memory
            x = x + self.cross_attention(self.cross_norm(x), cross_keys, cross_values, cross_allowed)
        return x + self.ffn(self.ffn_norm(x)), cache


class Stack(nnx.Module):
    """The layers of the encoder or of the decoder, the position bias that they share, and a final norm."""

    def __init__(self, config: Seq2SeqConfig, depth: int, cross: bool, rngs: nnx.Rngs) -> None:
        self.config, self.causal = config, cross
        self.position_bias = nnx.Param(
            config.width**-0.5 * jax.random.normal(rngs.params(), (config.num_buckets, config.num_heads))
        )
        self.layers = nnx.List([Block(config, cross, rngs) for _ in range(depth)])
        self.norm = nnx.RMSNorm(config.width, epsilon=config.norm_eps, rngs=rngs)

    def bias(self, queries: Int[Array, "#B T"], keys: Int[Array, "S"]) -> Float[Array, "#B H T S"]:
        """What is added to the scores of each head, by the positions of queries and keys."""
        buckets = relative_position_buckets(
            keys - queries[..., None],
            bidirectional=not self.causal,
            num_buckets=self.config.num_buckets,
            max_distance=self.config.max_distance,
        )
        return jnp.moveaxis(self.position_bias[...][buckets], -1, 1)


class Seq2Seq(nnx.Module):
    """Encoder and decoder over one embedding."""

    def __init__(self, config: Seq2SeqConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        # read as it is by both stacks, which begin with a norm
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.width)))
        self.encoder = Stack(config, config.num_layers, False, rngs)
        self.decoder = Stack(config, config.num_decoder_layers, True, rngs)
        if not config.tie_embeddings:
            self.head = nnx.Param(
                config.width**-0.5 * jax.random.normal(rngs.params(), (config.vocab_size, config.width))
            )

    def __call__(self, part, *args, **kwargs):
        return getattr(self, part)(*args, **kwargs)

    def _embed(self, tokens):
        return constrain(constrain(self.embedding[...], "vocabulary", None)[tokens], "batch", None, None)

    def encode(
        self,
        tokens: Int[Array, "B S"],
        *,
        mask: Bool[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S D"]:
        """States of the encoder."""
        places = jnp.arange(tokens.shape[1])
        segments, bias = segments_to_see(mask, segment_ids), self.encoder.bias(places[None], places)
        allowed = None if segments is None else segments[:, :, None] == segments[:, None, :]
        x = self._embed(tokens)
        for layer in self.encoder.layers:
            x = constrain(layer(x, allowed, bias)[0], "batch", None, None)
        return self.encoder.norm(x)

    def init_cache(
        self, encoded: Float[Array, "B S D"], *, length: int, mask: Bool[Array, "B S"] | None = None
    ) -> Seq2SeqCache:
        """A cache for `length` positions of the decoder, with the keys and values of the encoder in it."""
        config, (batch, memory_length) = self.config, encoded.shape[:2]
        layers = []
        for layer in self.decoder.layers:
            cross_keys, cross_values = layer.cross_attention.keys_and_values(encoded)
            shape = (batch, config.num_heads, config.head_dim, length)
            layers.append(
                {
                    "keys": jnp.zeros(shape, encoded.dtype),
                    "values": jnp.zeros((*shape[:2], length, config.head_dim), encoded.dtype),
                    "cross_keys": cross_keys,
                    "cross_values": cross_values,
                }
            )
        real = jnp.ones((batch, memory_length), bool) if mask is None else mask.astype(bool)
        return {"mask": real, "layers": layers}

    def decode(
        self,
        tokens: Int[Array, "B T"],
        encoded: Float[Array, "B S D"] | None = None,
        *,
        mask: Bool[Array, "B S"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        encoded_segment_ids: Int[Array, "B S"] | None = None,
        cache: Seq2SeqCache | None = None,
    ) -> tuple[Float[Array, "B T D"], Seq2SeqCache | None]:
        """States of the decoder, over given tokens in one pass or over a cache."""
        if (encoded is None) == (cache is None):
            raise ValueError("decode takes either the encoded states or a cache made from them by init_cache, not both")
        if cache is not None and positions is None:
            raise ValueError("decoding with a cache needs positions[B, T], the place of each token in its sequence")
        if (segment_ids is None) != (encoded_segment_ids is None):
            raise ValueError("packed rows need both segment_ids (of tokens) and encoded_segment_ids")
        return self._decode(tokens, encoded, mask, positions, segment_ids, encoded_segment_ids, cache)

    def _decode(self, tokens, encoded, mask, positions, segment_ids, encoded_segment_ids, cache):
        length = tokens.shape[1]
        if cache is None:
            places = jnp.arange(length)
            bias, allowed = self.decoder.bias(places[None], places), (places[:, None] >= places)[None]
            if segment_ids is not None:
                allowed = allowed & (segment_ids[:, :, None] == segment_ids[:, None, :])
            cross_allowed = None if mask is None else mask.astype(bool)[:, None, :]
            if segment_ids is not None:
                same = segment_ids[:, :, None] == encoded_segment_ids[:, None, :]
                cross_allowed = same if cross_allowed is None else same & cross_allowed
        else:
            places = jnp.arange(cache["layers"][0]["values"].shape[2])
            bias, allowed = self.decoder.bias(positions, places), places <= positions[:, :, None]
            cross_allowed = cache["mask"][:, None, :]
        x = self._embed(tokens)
        layers = []
        for i, layer in enumerate(self.decoder.layers):
            old = None if cache is None else cache["layers"][i]
            if old is None:
                memory = layer.cross_attention.keys_and_values(encoded)
            else:
                memory = old["cross_keys"], old["cross_values"]
            x, new = layer(x, allowed, bias, cross_allowed, memory, old, positions)
            x = constrain(x, "batch", None, None)
            layers.append(new)
        x = self.decoder.norm(x)
        if self.config.tie_embeddings:
            x = x * self.config.width**-0.5
        return x, None if cache is None else cache | {"layers": layers}


@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Seq2SeqModel:
    """A T5 behind the functional seam.

    - `encode(params, tokens[B, S], *, mask[B, S], segment_ids[B, S]) -> encoded[B, S, D]`; `mask` is true at real
      tokens.
    - `decode(params, tokens[B, T], encoded, *, mask[B, S], segment_ids[B, T], encoded_segment_ids[B, S]) -> (hidden[B,
      T, D], None)` reads given tokens in one pass, causally; `mask` is the encoder's. The first of `tokens` is the
      start token: see `shift_right`.
    - `init_cache(params, encoded, *, length, mask) -> cache` computes the keys and values of the encoded states once,
      and `decode(params, tokens[B, T], *, positions[B, T], cache) -> (hidden, cache)` then reads some more tokens at
      their positions; position -1 marks padding. A step of one token costs one token.

    `hidden` goes to `ops.token_logprobs` with `head(params)`; where the head is the embedding, it is scaled already.
    Packed rows need no positions, as only differences count. `params`, `tokenizer`, `family` and `source` (its
    config.json) are those of the checkpoint that the model was loaded from.
    """

    config: Seq2SeqConfig
    init: Callable[[jax.Array], Params]
    encode: Callable[..., Float[Array, "B S D"]]
    decode: Callable[..., tuple[Float[Array, "B T D"], Seq2SeqCache | None]]
    init_cache: Callable[..., Seq2SeqCache]
    params: Params | None = None
    tokenizer: Any = None
    family: str | None = None
    source: dict[str, Any] | None = None

    def head(self, params: Params) -> Float[Array, "V D"]:
        """The output matrix."""
        return params["embedding"] if self.config.tie_embeddings else params["head"]

    def logits(
        self,
        params: Params,
        tokens: Int[Array, "B S"],
        decoder_tokens: Int[Array, "B T"],
        *,
        mask: Bool[Array, "B S"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the token after each of `decoder_tokens`, in float32."""
        hidden, _ = self.decode(params, decoder_tokens, self.encode(params, tokens, mask=mask), mask=mask)
        return jnp.einsum("btd,vd->btv", hidden, self.head(params), preferred_element_type=jnp.float32)


def make_seq2seq(config: Seq2SeqConfig) -> Seq2SeqModel:
    """The functions of a T5 with the sizes of `config`; `Seq2SeqModel.init(key)` draws parameters."""
    init, apply = split_module(lambda rngs: Seq2Seq(config, rngs))

    def part(name: str) -> Callable[..., Any]:
        return lambda params, *args, **kwargs: apply(params, name, *args, **kwargs)

    return Seq2SeqModel(config, init, part("encode"), part("decode"), part("init_cache"))


def shift_right(tokens: Int[Array, "B T"], *, start_id: int = 0) -> Int[Array, "B T"]:
    """What the decoder reads to predict `tokens`: the start token (T5's is its padding id, 0) and all but the last."""
    return jnp.concatenate([jnp.full_like(tokens[:, :1], start_id), tokens[:, :-1]], axis=1)
