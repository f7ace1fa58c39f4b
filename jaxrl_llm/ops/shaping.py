"""Terms that shape a reward."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.ops._checks import check_range, check_shapes


def overlong_penalty(lengths: Int[Array, "B"], *, max_len: int, buffer: int, factor: float = 1.0) -> Float[Array, "B"]:
    """DAPO's soft overlong punishment, to be added to the reward (Yu et al. 2025, eq. 13).

    0 up to `max_len - buffer` tokens, then linear down to `-factor` at `max_len`, and `-factor` beyond.
    """
    check_shapes(lengths=(lengths, "B"))
    check_range("max_len", max_len, 1)
    check_range("buffer", buffer, 1, max_len)
    check_range("factor", factor, 0)
    return factor * jnp.clip((max_len - buffer - lengths.astype(jnp.float32)) / buffer, -1, 0)
