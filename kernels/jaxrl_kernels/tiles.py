"""What kernels of every kind need inside a tile: a product that keeps its digits, and how much of it a TPU may hold."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

VMEM_LIMIT = 64 * 2**20  # v5e, v5p and v6e have 95 to 128 MiB; the compiler's default of 16 or 32 is for many kernels


def dot(x: Float[Array, "M N"], y: Float[Array, "K L"], axis_x: int, axis_y: int) -> Float[Array, "m l"]:
    """Product over one axis of each, accumulated in float32; float32 inputs are not rounded on the way."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        x, y, (((axis_x,), (axis_y,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
