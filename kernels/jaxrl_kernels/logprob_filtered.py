"""Log-probabilities under a distribution that is cut off: top-k, top-p, min-p, or only some tokens are allowed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_kernels.logprob_math import LOWEST, soft_cap
from jaxrl_kernels.sampling import filter_logits

CHUNK = 512  # rows whose logits exist at a time


@functools.partial(
    jax.jit, static_argnames=("temperature", "top_k", "top_p", "min_p", "softcap", "entropy_gradient", "chunk")
)
def filtered_logprob(
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
    allowed: Callable[[Int[Array, "N"]], Bool[Array, "N V"]] | None = None,
    states: Int[Array, "N"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Log-prob of `targets` and entropy (nats) as `fused_logprob` has them, but renormalized over what filters keep.

    The log-prob is that of the distribution of `filter_logits`, which never excludes the target; the entropy is always
    of the unfiltered one. A filter needs a whole row of logits: those of `chunk` rows exist at a time, and again in the
    backward pass. Rows where `needed` is false give 0 and no gradient, and cost nothing: needed rows are moved to the
    front and chunks without any are skipped. Differentiable in hidden and head, the entropy only with
    `entropy_gradient`, since its backward pass costs as much again. All in float32.

    `allowed`, a function as a pytree (`jax.tree_util.Partial`), is called with the `states` of a chunk's rows. What it
    excludes is left out before the filters, and of the entropy too; a target that it excludes has log-prob NaN.

    Raises:
      ValueError: shapes that do not fit, or `allowed` without `states`.
    """
    if hidden.ndim != 2 or head.shape[1:] != hidden.shape[1:] or targets.shape != hidden.shape[:1]:
        shapes = f"{list(hidden.shape)}, {list(head.shape)} and {list(targets.shape)}"
        raise ValueError(f"expected hidden [N, D], head [V, D] and targets [N], got {shapes}")
    num_rows = hidden.shape[0]
    if allowed is not None and states is None:
        raise ValueError(f"allowed needs states: one for each of the {num_rows} rows")
    states = jnp.zeros(num_rows, jnp.int32) if states is None else states
    order = None if needed is None else jnp.argsort(~needed, stable=True)
    if needed is not None:
        # a row that is not needed may hold anything, NaN included: 0 * NaN would reach the gradient of the head
        hidden, targets = jnp.where(needed[:, None], hidden, 0)[order], jnp.asarray(targets)[order]
        states = states[order]
    pad = -num_rows % chunk
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, chunk, hidden.shape[1])
    targets, states = (jnp.pad(x, (0, pad)).reshape(-1, chunk) for x in (targets, states))
    count = num_rows if needed is None else jnp.sum(needed)
    starts = jnp.arange(hidden.shape[0]) * chunk

    def score(rows, row_targets, row_states):
        logits = jnp.einsum("nd,vd->nv", rows, head, preferred_element_type=jnp.float32)
        logits = (logits if softcap is None else soft_cap(logits, softcap)) / temperature
        if allowed is not None:
            logits = jnp.where(allowed(row_states), logits, LOWEST)
        picked = jnp.take_along_axis(logits, row_targets[:, None], axis=-1)[:, 0]
        picked = jnp.where(picked > LOWEST, picked, jnp.nan)
        free = logits if entropy_gradient else jax.lax.stop_gradient(logits)
        entropy = jax.nn.logsumexp(free, axis=-1) - jnp.sum(jax.nn.softmax(free, axis=-1) * free, axis=-1)
        kept = filter_logits(jax.lax.stop_gradient(logits), top_k=top_k, top_p=top_p, min_p=min_p, keep=row_targets)
        normalizer = jax.nn.logsumexp(jnp.where(jnp.isfinite(kept), logits, LOWEST), axis=-1)
        return picked - normalizer, entropy

    def skip(rows, row_targets, row_states):
        return jnp.zeros(chunk), jnp.zeros(chunk)

    # Around the cond, not inside it: a cond hands on what its branches read, the whole head, once for every chunk.
    @jax.checkpoint
    def body(_, block):
        start, *rows = block
        return None, jax.lax.cond(start < count, score, skip, *rows)

    _, (logprobs, entropy) = jax.lax.scan(body, None, (starts, hidden, targets, states))
    logprobs, entropy = logprobs.reshape(-1)[:num_rows], entropy.reshape(-1)[:num_rows]
    if needed is not None and order is not None:
        inverse = jnp.argsort(order)
        logprobs = jnp.where(needed, logprobs[inverse], 0)
        entropy = jnp.where(needed, entropy[inverse], 0)
    return logprobs, entropy
