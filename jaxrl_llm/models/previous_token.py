"""A starting point from which a small decoder learns to copy: one head that looks at the token before."""

from __future__ import annotations

import jax.numpy as jnp

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
