"""Parameters to and from safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from safetensors import safe_open
from safetensors.flax import save_file

from jaxrl_llm.files import replacing
from jaxrl_llm.types import Params


def save_params(
    params: Params, path: str | Path, *, dtype: DTypeLike | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes nested dicts of arrays to one safetensors file; names are joined by dots. `dtype` rounds them all to a
    type. The file is replaced in one go."""
    flat = {name: jnp.asarray(value, dtype) for name, value in flatten_dict(params, sep=".").items()}
    with replacing(path, sum(value.nbytes for value in flat.values())) as partial:
        save_file(flat, str(partial), metadata=dict(metadata or {}))


def load_params(path: str | Path, like: Params) -> Params:
    """Reads what `save_params` wrote, in the names, shapes and types of `like` (arrays or `jax.ShapeDtypeStruct`s).

    Raises:
      ValueError: a tensor is missing, is left over or has another shape; the message names it.
    """
    wanted = flatten_dict(like, sep=".")
    flat = {}
    with safe_open(str(path), framework="flax") as file:
        names = set(file.keys())
        if missing := sorted(set(wanted) - names):
            raise ValueError(f"{path} lacks {missing[:5]}; was it saved from a model of another size or kind?")
        if extra := sorted(names - set(wanted)):
            raise ValueError(f"{path} has {extra[:5]}, which the model lacks; was it saved from another model?")
        for name, leaf in wanted.items():
            tensor = file.get_tensor(name)
            if tensor.shape != leaf.shape:
                raise ValueError(f"{path}: {name} has shape {tensor.shape}, the model wants {leaf.shape}")
            flat[name] = jnp.asarray(tensor, leaf.dtype)
    return unflatten_dict(flat, sep=".")


def count_params(params: Params) -> int:
    """Number of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
