"""What a report makes of the scores of several tasks or models."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def forgetting(before: Float[Array, "... N"], after: Float[Array, "... N"]) -> Float[Array, "..."]:
    """The mean over N tasks of how far each one's score fell; a task that got better counts as 0, not against others.

    Raises:
      ValueError: scores of different tasks.
    """
    if before.shape != after.shape:
        raise ValueError(f"before and after must be scores of the same tasks, got {before.shape} and {after.shape}")
    return jnp.mean(jnp.maximum(before - after, 0), axis=-1)
