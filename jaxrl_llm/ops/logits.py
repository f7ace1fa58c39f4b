"""Which tokens a policy may choose from, and its log-probs among them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_kernels import filter_logits
from jaxrl_llm.ops._checks import check_range, check_shapes
from jaxrl_llm.ops.masked import select


def nucleus_mask(
    logits: Float[Array, "... V"], *, top_p: float = 0.9, min_keep: int = 1, always: Sequence[int] = ()
) -> Bool[Array, "... V"]:
    """True for the smallest set of likeliest tokens whose probability reaches `top_p`, as the sampler's filter of that
    name keeps them: a token equally likely as the last of them is kept too.

    Args:
      top_p: in (0, 1]; 1 keeps every token whose logit is above minus infinity.
      min_keep: at least so many of the likeliest.
      always: ids of tokens that are never excluded (begin and end).
    """
    check_range("min_keep", min_keep, 1)
    allowed = _kept(logits, top_p=top_p)
    if min_keep > 1:
        allowed |= top_k_mask(logits, min_keep)
    if len(always):
        allowed = allowed.at[..., jnp.array(always)].set(True)
    return allowed


def top_k_mask(logits: Float[Array, "... V"], k: int) -> Bool[Array, "... V"]:
    """True for the `k` largest logits, and for what equals the last of them."""
    return _kept(logits, top_k=k)


def masked_log_softmax(logits: Float[Array, "... V"], allowed: Bool[Array, "... V"]) -> Float[Array, "... V"]:
    """Log-probs among the allowed tokens, minus infinity for the others, whose logits are not read and get gradient 0.

    Nothing allowed: minus infinity throughout, gradient 0.
    """
    check_shapes(logits=(logits, "... V"), allowed_mask=(allowed, "... V"))
    live = jnp.any(allowed, axis=-1, keepdims=True)
    logprobs = jax.nn.log_softmax(select(logits, allowed), axis=-1, where=allowed | ~live)
    return jnp.where(allowed, logprobs, -jnp.inf)


def _kept(logits: Float[Array, "... V"], **filters: float) -> Bool[Array, "... V"]:
    rows = jax.lax.stop_gradient(logits).reshape(-1, logits.shape[-1])
    return jnp.isfinite(filter_logits(rows, **filters)).reshape(logits.shape)  # type: ignore[arg-type]
