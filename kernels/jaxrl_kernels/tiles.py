"""What kernels of every kind need inside a tile: a product that keeps its digits, and how much of it a TPU may hold."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

VMEM_LIMIT = 64 * 2**20  # v5e, v5p and v6e have 95 to 128 MiB; the compiler's default of 16 or 32 is for many kernels


def dot(x: Float[Array, "M N"], y: Float[Array, "K L"], axis_x: int, axis_y: int) -> Float[Array, "m l"]:
    """Product over one axis of each, accumulated in float32; float32 inputs are not rounded on the way."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        x, y, (((axis_x,), (axis_y,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def estimate(products: float, *arrays: Any) -> pl.CostEstimate:
    """What a kernel costs, for the compiler to plan by: so many multiplications with an addition, and each array moved
    once. It knows no other cost of a kernel than what it is told."""
    moved = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)
    return pl.CostEstimate(flops=int(2 * products), transcendentals=0, bytes_accessed=int(moved))
