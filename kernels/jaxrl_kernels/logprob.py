"""Log-probabilities of target tokens straight from hidden states, without ever holding all logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_kernels.sampling import filter_logits


def soft_cap(x: Float[Array, "*B"], cap: float) -> Float[Array, "*B"]:
    """`cap * tanh(x / cap)`: between plus and minus `cap`, and small numbers nearly as they are (Gemma 2)."""
    return cap * jnp.tanh(x / cap)


def fused_logprob(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "N"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    softcap: float | None = None,
    needed: Bool[Array, "N"] | None = None,
    entropy_gradient: bool = False,
    chunk: int = 512,
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Log-probability of `targets` and entropy (nats) under `softmax(hidden @ head.T / temperature)`, filtered.

    With `softcap` the logits go through `soft_cap` before they are divided. They exist for `chunk` rows at a time,
    forward and backward (they are computed again). With a filter the log-prob is that of the renormalized distribution
    of `filter_logits`, which never excludes the target; the entropy is always of the unfiltered one. Rows where
    `needed` is false give 0 and no gradient, and cost nothing: needed rows are moved to the front and chunks without
    any are skipped. Differentiable in hidden and head; the entropy only with `entropy_gradient`, since its backward
    pass costs as much again. All in float32.
    """
    num_rows = hidden.shape[0]
    order = None if needed is None else jnp.argsort(~needed, stable=True)
    if needed is not None:
        # a row that is not needed may hold anything, NaN included: 0 * NaN would reach the gradient of the head
        hidden, targets = jnp.where(needed[:, None], hidden, 0)[order], targets[order]
    pad = -num_rows % chunk
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, chunk, hidden.shape[1])
    targets = jnp.pad(targets, (0, pad)).reshape(-1, chunk)
    count = num_rows if needed is None else jnp.sum(needed)
    starts = jnp.arange(hidden.shape[0]) * chunk

    def score(rows, row_targets):
        logits = jnp.einsum("nd,vd->nv", rows, head, preferred_element_type=jnp.float32)
        logits = (logits if softcap is None else soft_cap(logits, softcap)) / temperature
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, row_targets[:, None], axis=-1)[:, 0]
        free = logits if entropy_gradient else jax.lax.stop_gradient(logits)
        entropy = jax.nn.logsumexp(free, axis=-1) - jnp.sum(jax.nn.softmax(free, axis=-1) * free, axis=-1)
        if top_k is not None or top_p < 1 or min_p > 0:
            kept = filter_logits(jax.lax.stop_gradient(logits), top_k=top_k, top_p=top_p, min_p=min_p, keep=row_targets)
            normalizer = jax.nn.logsumexp(jnp.where(jnp.isfinite(kept), logits, -1e30), axis=-1)
        return picked - normalizer, entropy

    def skip(rows, row_targets):
        return jnp.zeros(chunk), jnp.zeros(chunk)

    # Around the cond, not inside it: a cond hands on what its branches read, the whole head, once for every chunk.
    @jax.checkpoint
    def body(_, block):
        start, rows, row_targets = block
        return None, jax.lax.cond(start < count, score, skip, rows, row_targets)

    _, (logprobs, entropy) = jax.lax.scan(body, None, (starts, hidden, targets))
    logprobs, entropy = logprobs.reshape(-1)[:num_rows], entropy.reshape(-1)[:num_rows]
    if needed is not None and order is not None:
        inverse = jnp.argsort(order)
        logprobs = jnp.where(needed, logprobs[inverse], 0)
        entropy = jnp.where(needed, entropy[inverse], 0)
    return logprobs, entropy
