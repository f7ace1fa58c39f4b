"""A bidirectional transformer encoder: BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019) and ModernBERT (Warner et
al. 2024) as one module with a config.

BERT and RoBERTa add learned positions to the embeddings and normalize after each block; ModernBERT turns queries and
keys by rotary positions, normalizes before each block, gates its feed-forward and lets most layers see a window only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxrl_kernels import flash_attention
from jaxrl_kernels.mesh import constrain, mesh_axes, split
from jaxrl_llm.models.activations import ACTIVATIONS
from jaxrl_llm.models.functional import split_module
from jaxrl_llm.models.rotary import Rope, rotate
from jaxrl_llm.types import Params

PADDING = -1  # the segment of what is not real


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and form of an encoder.

    Attributes:
      num_positions: rows of the table of learned positions, `position_offset` included.
      position_offset: the row of position 0. RoBERTa keeps the rows up to its padding id unused, and counts positions
        over a row's real tokens; with an offset of 0, positions count places.
      num_token_types: rows of the table of token types (0: no such table).
      pre_norm: norms stand before the blocks, none before the first attention, and one at the end; otherwise after the
        blocks. The embeddings are normalized in both forms.
      gated: the feed-forward is `activation(gate(x)) * up(x)`.
      rope_thetas: base of the rotary positions of each layer; None for learned positions.
      layer_windows: how far a token sees to either side, for each layer; None sees all. An empty tuple: all see all.

    Raises:
      ValueError: sizes that do not fit each other, or an unknown activation.
    """

    vocab_size: int
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    ffn_width: int = 512
    num_positions: int = 512
    position_offset: int = 0
    num_token_types: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"
    pre_norm: bool = False
    gated: bool = False
    attention_bias: bool = True
    ffn_bias: bool = True
    norm_bias: bool = True
    rope_thetas: tuple[float, ...] | None = None
    layer_windows: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {self.activation!r}")
        if self.rope_thetas is not None and len(self.rope_thetas) != self.num_layers:
            raise ValueError(f"rope_thetas has {len(self.rope_thetas)} entries, expected one for each of the "
                             f"{self.num_layers} layers")  # fmt: skip
        if self.rope_thetas is not None and (self.width // self.num_heads) % 2:
            raise ValueError(f"heads of width {self.width // self.num_heads} cannot be turned by rotary positions: the "
                             "width of a head must be even")  # fmt: skip
        if len(self.layer_windows) not in (0, self.num_layers):
            raise ValueError(f"layer_windows has {len(self.layer_windows)} entries, expected none or one for each of "
                             f"the {self.num_layers} layers")  # fmt: skip


def segments_to_see(mask: Bool[Array, "B T"] | None, segment_ids: Int[Array, "B T"] | None) -> Int[Array, "B T"] | None:
    """Segments within which tokens see each other; padding has one of its own. None if there is nothing to hide."""
    if mask is None:
        return segment_ids
    return jnp.where(mask, jnp.int32(0) if segment_ids is None else segment_ids, PADDING)


class FeedForward(nnx.Module):
    """Two linear maps with an activation between them, the first one gated or not."""

    def __init__(self, width: int, ffn_width: int, activation: str, gated: bool, bias: bool, rngs: nnx.Rngs) -> None:
        self.activation = activation
        if gated:
            self.gate = nnx.Linear(width, ffn_width, use_bias=bias, rngs=rngs)
        self.up = nnx.Linear(width, ffn_width, use_bias=bias, rngs=rngs)
        self.down = nnx.Linear(ffn_width, width, use_bias=bias, rngs=rngs)
        self.gated = gated

    def __call__(self, x):
        activation = ACTIVATIONS[self.activation]
        return self.down(activation(self.gate(x)) * self.up(x) if self.gated else activation(self.up(x)))


class Attention(nnx.Module):
    """Self-attention over all places of a segment, or a window of it to either side."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs) -> None:
        def linear() -> nnx.Linear:
            return nnx.Linear(config.width, config.width, use_bias=config.attention_bias, rngs=rngs)

        self.num_heads = config.num_heads
        self.query, self.key, self.value, self.out = linear(), linear(), linear(), linear()

    def __call__(self, x, segments, window, positions, rope):
        queries, keys, values = (
            linear(x).reshape(*x.shape[:2], self.num_heads, -1) for linear in (self.query, self.key, self.value)
        )
        if rope is not None:
            queries, keys = rotate(queries, positions, rope), rotate(keys, positions, rope)
        # a window of the config counts the places beside a token's own, that of the kernel counts its own too
        window = None if window is None else window + 1
        rows = mesh_axes("batch", len(x), strict=False)
        parts = P(rows, None, mesh_axes("heads", self.num_heads))  # a token sees both ways: rows stay whole
        attended = split(
            lambda q, k, v, segments: flash_attention(q, k, v, segment_ids=segments, causal=False, window=window),
            *((parts, parts, parts, P(rows)), parts),
        )(queries, keys, values, segments)
        return self.out(attended.reshape(x.shape))


def layer_norm(config: EncoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A norm of the config's form. The variance is that of the differences from the mean, as in PyTorch: the mean of
    squares less the square of the mean loses digits where the mean is large."""
    return nnx.LayerNorm(
        config.width, epsilon=config.norm_eps, use_bias=config.norm_bias, use_fast_variance=False, rngs=rngs
    )


class EncoderLayer(nnx.Module):
    """Attention and feed-forward, each added to the residual stream, with norms before or after."""

    def __init__(self, config: EncoderConfig, first: bool, rngs: nnx.Rngs) -> None:
        self.pre_norm = config.pre_norm
        self.attention = Attention(config, rngs)
        # in pre-norm form, the norm of the embeddings has just been applied to the input of the first layer
        self.normed = config.pre_norm and first
        if not self.normed:
            self.attention_norm = layer_norm(config, rngs)
        self.ffn = FeedForward(config.width, config.ffn_width, config.activation, config.gated, config.ffn_bias, rngs)
        self.ffn_norm = layer_norm(config, rngs)

    def __call__(self, x, segments, window, positions, rope):
        if self.pre_norm:
            h = x if self.normed else self.attention_norm(x)
            x = x + self.attention(h, segments, window, positions, rope)
            return x + self.ffn(self.ffn_norm(x))
        x = self.attention_norm(x + self.attention(x, segments, window, positions, rope))
        return self.ffn_norm(x + self.ffn(x))


class Encoder(nnx.Module):
    """Embeddings, layers and, in pre-norm form, a final norm: tokens to hidden states."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs) -> None:
        def table(rows: int) -> nnx.Param:
            return nnx.Param(config.width**-0.5 * jax.random.normal(rngs.params(), (rows, config.width)))

        self.config = config
        self.embedding = table(config.vocab_size)
        if config.rope_thetas is None:
            self.position_embedding = table(config.num_positions)
        if config.num_token_types:
            self.token_type_embedding = table(config.num_token_types)
        self.embedding_norm = layer_norm(config, rngs)
        self.layers = nnx.List([EncoderLayer(config, i == 0, rngs) for i in range(config.num_layers)])
        if config.pre_norm:
            self.norm = layer_norm(config, rngs)

    def __call__(self, tokens, *, mask=None, segment_ids=None, positions=None, token_types=None):
        config = self.config
        if positions is None:
            positions = self._default_positions(tokens, mask, segment_ids)
        x = constrain(self.embedding[...], "vocabulary", None)[tokens]
        if config.rope_thetas is None:
            x = x + self.position_embedding[...][positions + config.position_offset]
        if config.num_token_types:
            x = x + self.token_type_embedding[...][0 if token_types is None else token_types]
        elif token_types is not None:
            raise ValueError("this encoder has no token types (num_token_types=0): leave token_types out")
        x = constrain(self.embedding_norm(x), "batch", None, None)
        windows = config.layer_windows or (None,) * config.num_layers
        segments = segments_to_see(mask, segment_ids)
        for i, layer in enumerate(self.layers):
            rope = None if config.rope_thetas is None else Rope(config.rope_thetas[i])
            x = constrain(layer(x, segments, windows[i], positions, rope), "batch", None, None)
        return self.norm(x) if config.pre_norm else x

    def _default_positions(self, tokens, mask, segment_ids):
        config, length = self.config, tokens.shape[1]
        if segment_ids is not None:
            raise ValueError("packed rows need positions that restart with each segment, as data.pack_sequences gives")
        room = config.num_positions - config.position_offset
        if config.rope_thetas is None and length > room:
            raise ValueError(f"rows of {length} tokens do not fit the {room} learned positions: truncate them")
        if config.position_offset and mask is not None:
            return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)
        return jnp.broadcast_to(jnp.arange(length), tokens.shape)


@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed by identity
class EncoderModel:
    """An encoder behind the functional seam.

    `apply(params, tokens[B, T], *, mask[B, T], segment_ids[B, T], positions[B, T], token_types[B, T]) ->
    hidden[B, T, D]`. `mask` is true at real tokens (on either side of the padding), and what is not real is never seen;
    the states there mean nothing. Packed rows give `segment_ids`, where tokens see their own segment alone, and
    `positions`, which restart at 0 with every segment. `params`, `tokenizer`, `family` and `source` (its config.json)
    are those of the checkpoint that the model was loaded from.
    """

    config: EncoderConfig
    init: Callable[[jax.Array], Params]
    apply: Callable[..., Float[Array, "B T D"]]
    params: Params | None = None
    tokenizer: Any = None
    family: str | None = None
    source: dict[str, Any] | None = None


def make_encoder(config: EncoderConfig) -> EncoderModel:
    """The functions of an encoder with the sizes of `config`; `EncoderModel.init(key)` draws parameters."""
    init, apply = split_module(lambda rngs: Encoder(config, rngs))
    return EncoderModel(config=config, init=init, apply=apply)
