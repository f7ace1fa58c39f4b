"""A starting point from which a small decoder learns to copy: one head that looks at the token before."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxrl_llm.models.decoder_config import DecoderConfig
from jaxrl_llm.models.stacking import stack_layers, unstack_layers
from jaxrl_llm.types import Params


def previous_token_head(
    params: Params, config: DecoderConfig, *, layer: int = 0, kv_head: int = 0, margin: float = 8.0
) -> Params:
    """Freshly drawn parameters in which one query head of a layer starts out looking at the position before its own.

    Its query and its key are constants, the biases, with the query turned back by one position, so that the score of
    the position before exceeds those beside it by `margin` nats, whatever the tokens are. From there "find this token
    further up and copy what followed it" (an induction head, Olsson et al. 2022) is one thing to learn for the next
    layer; from a random start a small decoder takes thousands of updates to find both at once.

    Raises:
      ValueError: the decoder has no attention biases, or norms or stretched rotary positions that would undo them.
    """
    if not config.attention_bias:
        raise ValueError("a previous-token head lives in the biases of queries and keys: set attention_bias=True")
    if config.qk_norm is not None or config.layer_ropes is not None:
        raise ValueError("a previous-token head wants plain queries and keys: leave qk_norm and layer_ropes None")
    if config.scan_layers:
        params = unstack_layers(params, config)
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
        "query": {
            "kernel": query["kernel"].at[:, of_query].set(0),
            "bias": query["bias"].at[of_query].set(turned_back),
        },
        "key": {"kernel": key["kernel"].at[:, of_key].set(0), "bias": key["bias"].at[of_key].set(straight)},
    }
    changed_layer = params["layers"][str(layer)] | {"attention": attention | changed}
    params = params | {"layers": params["layers"] | {str(layer): changed_layer}}
    return stack_layers(params, config) if config.scan_layers else params


def induction_head(
    params: Params, config: DecoderConfig, *, key: jax.Array, reach: int = 256, margin: float = 8.0
) -> Params:
    """`previous_token_head` in layer 0, and in layer 1 a head that starts out looking at what followed its own token
    further up, wherever that was within `reach` tokens.

    The first head of layer 0 passes directions of the token before on, into others; queries of the first head of layer
    1 read the ones, keys the others, in the dimensions that rotary positions hardly turn, so that the score of a match
    is about `margin` nats. What else layer 0 adds starts out as 0. What to make of the token that is found is left to
    learn. For tasks that are about looking things up, not about how attention comes to do that.

    Raises:
      ValueError: as `previous_token_head`; fewer than two layers, heads wider than half of the model, or no dimension
        that turns by less than a radian over `reach`: raise `rope_theta`.
    """
    dim: int = config.head_dim  # type: ignore[assignment]  # set by the config
    still = config.rope_theta ** (-np.arange(dim // 2) / (dim // 2)) * reach < 1
    if config.num_layers < 2 or 2 * dim > config.width or not still.any():
        raise ValueError(
            f"an induction head wants 2 layers, heads of at most half the width and slow rotary positions; got "
            f"num_layers={config.num_layers}, head_dim={dim} of width={config.width}, rope_theta={config.rope_theta:g}"
        )
    params = previous_token_head(params, config, margin=margin)
    basis = jnp.linalg.qr(jax.random.normal(key, (config.width, config.width)))[0]
    read, write = basis[:, :dim], basis[:, dim : 2 * dim]
    first, second = (params["layers"][str(layer)]["attention"] for layer in range(2))

    def with_head(weights: dict[str, Any], kernel: Array) -> dict[str, Any]:
        return weights | {"kernel": weights["kernel"].at[:, :dim].set(kernel)}

    # tokens have norm 1, of which `share` (squared) is read; twice of it is passed on, and all is normed after that
    share = dim / config.width
    match = still.mean() * 2 * share * config.width / (1 + 4 * share) / dim**0.5
    strength = (margin / match) ** 0.5 * np.tile(still, 2)
    out = jnp.zeros_like(first["out"]["kernel"]).at[:dim].set(2 * config.width**-0.5 * write.T)
    passing = first | {"value": with_head(first["value"], read), "out": first["out"] | {"kernel": out}}
    parts = {"query": strength * read, "key": strength * write}
    matching = second | {name: with_head(second[name], part) for name, part in parts.items()}
    layers = params["layers"]
    down = jax.tree.map(jnp.zeros_like, layers["0"]["down"])
    changed = {"0": layers["0"] | {"attention": passing, "down": down}, "1": layers["1"] | {"attention": matching}}
    return params | {"layers": layers | changed}
