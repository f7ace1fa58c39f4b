"""A decoder-only transformer for all families: RMSNorm, rotary positions, grouped-query attention, gated feed-forward
networks or experts (Touvron et al. 2023, and the options of `DecoderConfig`).

Layers are unrolled, each with its own key/value arrays, or with `scan_layers` run by a loop over stacked ones: on a CPU
a loop doubles an update and copies the cache at every decode step, for a TPU dozens of layers take minutes to compile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrl_kernels.logprob import soft_cap
from jaxrl_kernels.mesh import constrain
from jaxrl_llm.models.activations import ACTIVATIONS
from jaxrl_llm.models.attention import Attention, Cache, make_norm
from jaxrl_llm.models.decoder_config import DecoderConfig
from jaxrl_llm.models.functional import split_module, stack_modules
from jaxrl_llm.models.moe import Experts
from jaxrl_llm.types import Params

# What the backward pass finds of a layer: nothing but its input, or what products with weights gave.
REMAT = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class DecoderLayer(nnx.Module):
    """Attention and a feed-forward network or experts, each with a norm before or behind it or both, added to the
    residual stream."""

    def __init__(self, config: DecoderConfig, layer: int, rngs: nnx.Rngs) -> None:
        self.config, self.layer = config, layer
        narrow = nnx.initializers.variance_scaling(1 / (2 * config.num_layers), "fan_in", "truncated_normal")
        if config.norm_placement != "post":
            self.attention_norm = make_norm(config, config.width, rngs)
        self.attention = Attention(config, layer, rngs)
        if config.norm_placement != "post":
            self.ffn_norm = make_norm(config, config.width, rngs)
        if config.norm_placement != "pre":
            self.attention_post_norm = make_norm(config, config.width, rngs)
            self.ffn_post_norm = make_norm(config, config.width, rngs)
        if config.has_experts(layer):
            self.experts = Experts(config, rngs)
        else:
            bias = config.ffn_bias
            self.gate = nnx.Linear(config.width, config.ffn_width, use_bias=bias, rngs=rngs)
            self.up = nnx.Linear(config.width, config.ffn_width, use_bias=bias, rngs=rngs)
            self.down = nnx.Linear(config.ffn_width, config.width, use_bias=bias, kernel_init=narrow, rngs=rngs)

    def __call__(self, x, positions, segment_ids, cache):
        before, behind = self.config.norm_placement != "post", self.config.norm_placement != "pre"
        h, cache = self.attention(self.attention_norm(x) if before else x, positions, segment_ids, cache)
        x = x + (self.attention_post_norm(h) if behind else h)
        h, router_logits = self._feed_forward(self.ffn_norm(x) if before else x)
        return x + (self.ffn_post_norm(h) if behind else h), cache, router_logits

    def _feed_forward(self, h):
        if self.config.has_experts(self.layer):
            return self.experts(h)
        return self.down(ACTIVATIONS[self.config.activation](self.gate(h)) * self.up(h)), None


class Decoder(nnx.Module):
    """Embedding, layers, final norm: tokens to hidden states. The output matrix is applied by whoever needs logits."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embedding = nnx.Param(
            config.width**-0.5 * jax.random.normal(rngs.params(), (config.vocab_size, config.width))
        )

        def layers(rngs: nnx.Rngs) -> nnx.List:
            count = config.period if config.scan_layers else config.num_layers
            return nnx.List([DecoderLayer(config, layer, rngs) for layer in range(count)])

        repeats = config.num_layers // config.period
        self.layers = stack_modules(layers, repeats, rngs) if config.scan_layers else layers(rngs)
        self.norm = make_norm(config, config.width, rngs)
        if not config.tie_embeddings:
            self.head = nnx.Param(
                config.width**-0.5 * jax.random.normal(rngs.params(), (config.vocab_size, config.width))
            )

    def __call__(self, tokens, *, positions=None, segment_ids=None, cache=None, router_logits=False):
        if router_logits and not any(map(self.config.has_experts, range(self.config.num_layers))):
            raise ValueError("router_logits=True, but this decoder has no experts (num_experts=0)")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        # rows over devices, before and behind every layer: XLA then gathers the weights of a layer and not the rows
        along = "length" if cache is None else None
        x = constrain(constrain(self.embedding[...], "vocabulary", None)[tokens], "batch", along, None)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        run = self._scan if self.config.scan_layers else functools.partial(self._run, self.layers)
        x, cache, routed = run(x, positions, segment_ids, cache, along)
        hidden = self.norm(x)
        return (hidden, cache, routed) if router_logits else (hidden, cache)

    def _run(self, layers, x, positions, segment_ids, cache, along):
        """Layers one after another; the router's logits of those that have one are stacked."""
        policy, scanned = self.config.remat, self.config.scan_layers
        new_cache: Cache | None = None if cache is None else []
        routed = []
        for i, layer in enumerate(layers):
            # what is computed again keeps its inputs, of which the cache of a scan holds all layers
            if policy != "none" and not (scanned and cache is not None):
                layer = jax.checkpoint(layer, policy=REMAT[policy], prevent_cse=not scanned)
            x, layer_cache, layer_logits = layer(x, positions, segment_ids, None if cache is None else cache[i])
            x = constrain(x, "batch", along, None)
            if new_cache is not None:
                new_cache.append(layer_cache)
            if layer_logits is not None:
                routed.append(layer_logits)
        return x, new_cache, jnp.stack(routed) if routed else None

    def _scan(self, x, positions, segment_ids, cache, along):
        """The layers of a period, as often as there are. The cache is carried and changed in place: as an input and an
        output of each step it would be copied."""
        graph, stacked = nnx.split(self.layers)

        def period(carry, step):
            (x, cache), (number, params) = carry, step
            if cache is not None:
                cache = [entry | {"layer": number} for entry in cache]
            x, cache, routed = self._run(nnx.merge(graph, params), x, positions, segment_ids, cache, along)
            if cache is not None:
                cache = [{name: x for name, x in entry.items() if name != "layer"} for entry in cache]
            return (x, cache), routed

        repeats = jnp.arange(self.config.num_layers // self.config.period)
        (x, cache), routed = jax.lax.scan(period, (x, cache), (repeats, stacked))
        if cache is not None:
            # as attention has it: a loop keeps one layout, and in another the whole stack would move at each layer
            rows = None if "page_table" in cache[0] else "batch"
            laid = {name: (rows, None, "heads") for name in ("keys", "values")}
            cache = [{name: constrain(x, *laid.get(name, ())) for name, x in entry.items()} for entry in cache]
        return x, cache, None if routed is None else routed.reshape(-1, *routed.shape[2:])


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A decoder behind the functional seam, compared by identity.

    `apply(params, tokens[B, T], *, positions[B, T], segment_ids[B, T], cache) -> (hidden[B, T, D], cache)`. Without a
    cache, attention is causal by place within a row and stays inside a segment; positions default to 0, 1, ... and
    restart where the caller lets them (packed rows). With a cache, keys are written at their position and a query sees
    all positions up to its own; position -1 marks padding. `hidden` goes to `ops.token_logprobs` with `head(params)`,
    so that `[B, T, V]` need never exist. With `router_logits=True`, `apply` of a decoder with experts gives a third
    result, the routers' logits `[layers with experts, B, T, E]`.

    A model that was loaded from a checkpoint carries its `params`, its `tokenizer`, its `family` (the architecture that
    config.json names) and `source`, the contents of config.json.
    """

    config: DecoderConfig
    init: Callable[[jax.Array], Params]
    apply: Callable[..., Any]
    params: Params | None = None
    tokenizer: Any = None
    family: str | None = None
    source: dict[str, Any] | None = None

    def head(self, params: Params) -> Float[Array, "V D"]:
        """The output matrix."""
        return params["embedding"] if self.config.tie_embeddings else params["head"]

    def logits(self, params: Params, tokens: Int[Array, "B T"], **kwargs) -> Float[Array, "B T V"]:
        """Logits of the next token, in float32, soft-capped where the config says so. For looking at; training uses
        `ops.token_logprobs`, which wants `softcap=model.config.logit_softcap`."""
        hidden, _ = self.apply(params, tokens, **kwargs)
        return output_logits(self, params, hidden)

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype = jnp.float32) -> Cache:
        """Empty keys and values for `length` positions of `batch` sequences."""
        config = self.config
        count = config.period if config.scan_layers else config.num_layers
        shape = (batch, *((config.num_layers // count,) if config.scan_layers else ()), config.num_kv_heads)
        return [
            {
                "keys": jnp.zeros((*shape, config.head_dim, length), dtype),
                "values": jnp.zeros((*shape, length, config.head_dim), dtype),
            }
            for _ in range(count)
        ]


def init_pages(model: Model, num_pages: int, page_size: int, dtype: jnp.dtype = jnp.float32) -> Cache:
    """An empty cache of pages that rows share through a page table (`with_page_table`)."""

    def pages(like: jax.ShapeDtypeStruct, axis: int) -> Array:
        shape = [num_pages, *like.shape[1:]]
        shape[axis] = page_size
        return jnp.zeros(shape, dtype)

    layers = jax.eval_shape(lambda: model.init_cache(1, 1, dtype))
    return [{"keys": pages(layer["keys"], -1), "values": pages(layer["values"], -2)} for layer in layers]


def with_page_table(pages: Cache, page_table: Int[Array, "B M"]) -> Cache:
    """The cache of B rows that lie in `pages`: position p of row b in page `page_table[b, p // page size]`. Entries for
    places that a row does not use yet may be any number; one beyond the last page is never written to."""
    return [layer | {"page_table": page_table} for layer in pages]


def without_page_table(cache: Cache) -> Cache:
    """The pages of a cache alone, as `init_pages` gives them."""
    return [{"keys": layer["keys"], "values": layer["values"]} for layer in cache]


def output_logits(model: Model, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Logits of hidden states, in float32, soft-capped where the model's config says so: what it samples from."""
    logits = jnp.einsum("...d,vd->...v", hidden, model.head(params), preferred_element_type=jnp.float32)
    softcap = model.config.logit_softcap
    return logits if softcap is None else soft_cap(logits, softcap)


def replace_prefix(cache: Cache, prefix: Cache, rows: Bool[Array, "B"]) -> Cache:
    """The cache with the entries of `prefix` (same batch, fewer positions) at the front of the chosen `rows`.

    Scattered by row: a select over the front of all rows would compute every entry to change the few of a row or two.
    """
    chosen = jnp.where(rows, jnp.arange(rows.shape[0]), rows.shape[0])  # out of range: dropped
    return [
        {
            "keys": old["keys"].at[chosen, ..., : new["keys"].shape[-1]].set(new["keys"], mode="drop"),
            "values": old["values"].at[chosen, ..., : new["values"].shape[-2], :].set(new["values"], mode="drop"),
        }
        for old, new in zip(cache, prefix, strict=True)
    ]


def make_decoder(config: DecoderConfig) -> Model:
    """The functions of a decoder with the sizes of `config`; `Model.init(key)` draws parameters."""
    init, apply = split_module(lambda rngs: Decoder(config, rngs))
    return Model(config=config, init=init, apply=apply)
