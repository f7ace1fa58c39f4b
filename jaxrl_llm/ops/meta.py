"""Operations on whole trees of parameters or gradients."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.ops._checks import check_range
from jaxrl_llm.ops.masked import safe_divide
from jaxrl_llm.types import Params


def interpolate_params(old: Params, new: Params, weight: float | Float[Array, ""]) -> Params:
    """`(1 - weight) * old + weight * new`, leaf by leaf: a moving average or Polyak's target (a small weight), the mean
    of two models (0.5), a reference that follows the policy, one task of Reptile.

    In float32, then in the type of `old`: a bfloat16 tree does not move by less than 1/256 of a value, so keep the
    average itself in float32. The weight may be an array (a schedule's value).

    Raises:
      ValueError: `weight` outside [0, 1], trees of another structure, leaves of another shape or that are no floats.
    """
    check_range("weight", weight, 0, 1)

    def mix(path: Any, a: Array, b: Array) -> Array:
        _check_leaves(path, a, b)
        return ((1 - weight) * a.astype(jnp.float32) + weight * b.astype(jnp.float32)).astype(a.dtype)

    return jax.tree_util.tree_map_with_path(mix, old, new)


def project_conflicting_grads(grads: Params, reference: Params) -> Params:
    """`grads` without its part against `reference`: where their inner product over the whole tree is negative,
    `g - <g, r> / <r, r> * r`, else `g` (PCGrad, Yu et al. 2020, one way).

    A reference of zero changes nothing. PCGrad proper for two tasks is this in both directions.

    Raises:
      ValueError: trees of another structure, leaves of another shape or that are no floats.
    """
    jax.tree_util.tree_map_with_path(_check_leaves, grads, reference)
    share = safe_divide(jnp.minimum(_dot(grads, reference), 0), _dot(reference, reference))
    return jax.tree.map(
        lambda g, r: (g.astype(jnp.float32) - share * r.astype(jnp.float32)).astype(g.dtype), grads, reference
    )


def _dot(a: Params, b: Params) -> Float[Array, ""]:
    products = jax.tree.map(lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), a, b)
    return jax.tree.reduce(operator.add, products, jnp.float32(0))


def _check_leaves(path: Any, a: Array, b: Array) -> None:
    if a.shape != b.shape or not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (a, b)):
        raise ValueError(
            f"leaf {jax.tree_util.keystr(path)} must hold floats of one shape in both trees, got {a.dtype} "
            f"{list(a.shape)} and {b.dtype} {list(b.shape)}"
        )
