"""Between the two forms of a decoder's layers: one by one, and stacked for `DecoderConfig.scan_layers`.

In trees of parameters, and of whatever else lies as they do (gradients, adapters), layer `l` is `layers.{l}` or place
`l // period` of `layers.{l % period}`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxrl_llm.models.checkpoint import Stored
from jaxrl_llm.models.decoder_config import DecoderConfig
from jaxrl_llm.types import Params


def stack_layers(params: Params, config: DecoderConfig) -> Params:
    """Parameters for `scan_layers=True` from those for `scan_layers=False`; other entries stay as they are.

    Raises:
      ValueError: layers that should be alike differ, as in an adapter of some of them only.
    """
    layers = params["layers"]
    stacked = {}
    for first in range(config.period):
        names = [str(layer) for layer in range(first, config.num_layers, config.period)]
        alike = [layers[name] for name in names if name in layers]
        if alike and (len(alike) < len(names) or len(set(map(jax.tree.structure, alike))) > 1):
            raise ValueError(f"layers {', '.join(names)} cannot be stacked: not all of them have the same entries")
        if alike:
            stacked[str(first)] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alike)
    return params | {"layers": stacked}


def unstack_layers(params: Params, config: DecoderConfig) -> Params:
    """Parameters for `scan_layers=False` from those for `scan_layers=True`; other entries stay as they are."""
    layers = {
        str(layer): jax.tree.map(lambda leaf, place=layer // config.period: leaf[place], stacked)
        for layer in range(config.num_layers)
        if (stacked := params["layers"].get(str(layer % config.period)))
    }
    return params | {"layers": layers}


def stacked_name(name: str, config: DecoderConfig) -> str:
    """The dotted name, of a parameter or a module, under which a layer lies in its stack."""
    parts = name.split(".")
    return ".".join([parts[0], str(int(parts[1]) % config.period), *parts[2:]]) if parts[0] == "layers" else name


def stack_stored(stored: Mapping[str, Stored], config: DecoderConfig) -> dict[str, Stored]:
    """Where a checkpoint has the parameters of `scan_layers=True`, from where it has those of each layer, in order."""
    stacked: dict[str, Stored] = {}
    for name, place in stored.items():
        own = stacked_name(name, config)
        if name.startswith("layers."):
            before = stacked[own].names if own in stacked else ()
            place = dataclasses.replace(place, names=before + place.names, layers=config.num_layers // config.period)
        stacked[own] = place
    return stacked
