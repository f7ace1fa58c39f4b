"""Log-probabilities of tokens from hidden states: the fused head."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxrl_kernels import filtered_logprob, fused_logprob
from jaxrl_kernels.mesh import mesh_axes, row_spec, split
from jaxrl_llm.types import Decoding


def token_logprobs(
    hidden: Float[Array, "*B D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "*B"],
    *,
    decoding: Decoding = Decoding(),
    softcap: float | None = None,
    mask: Bool[Array, "*B"] | None = None,
    entropy_gradient: bool = False,
    allowed: Callable[[Int[Array, "N"]], Bool[Array, "N V"]] | None = None,
    states: Int[Array, "*B"] | None = None,
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Log-prob and entropy (nats) of the distribution that `hidden` predicts, for the token `targets` beside it.

    `log softmax(hidden @ head.T / temperature)[target]`, renormalized over what the filters of `decoding` keep, so that
    a token sampled under `decoding` gets the log-prob it was sampled with. `softcap` is what the model's config calls
    `logit_softcap`: the products are soft-capped before the temperature divides them. The caller aligns: the hidden
    state at t goes with the token at t + 1. Entries where `mask` is false are 0 and cost nothing. `[..., V]` never
    exists at once, in the backward pass either: without a filter in blocks (`fused_logprob`), with one for some rows at
    a time (`filtered_logprob`), as with a constraint: `allowed`, a `jax.tree_util.Partial`, gives the tokens that rows
    may take, by their `states`. The entropy carries a gradient only with `entropy_gradient`. Float32. A target outside
    the vocabulary, or one not allowed, gives NaN where `mask` is true; the former ValueError where the ids are known
    before the program runs. Under `jax.set_mesh` each device does its own rows, and its own part of the vocabulary
    where no filter needs all of it.

    Raises:
      ValueError: shapes do not fit, or `softcap` is not positive.
    """
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}; for none, leave it None")
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(f"targets must have the leading shape of hidden {hidden.shape[:-1]}, got {targets.shape}")
    if hidden.shape[-1] != head.shape[-1]:
        raise ValueError(f"head must be [V, {hidden.shape[-1]}] like hidden, got {head.shape}")
    if mask is not None and mask.shape != targets.shape:
        raise ValueError(f"mask must have the shape of targets {targets.shape}, got {mask.shape}")
    whole_rows = decoding.filters or allowed is not None
    vocabulary = None if whole_rows else mesh_axes("vocabulary", head.shape[0])

    def score(hidden, head, targets, mask, allowed, states):
        rows, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        needed = None if mask is None else mask.reshape(-1)
        if whole_rows:
            logprobs, entropy = filtered_logprob(
                *(rows, head, ids),
                temperature=decoding.temperature,
                top_k=decoding.top_k,
                top_p=decoding.top_p,
                min_p=decoding.min_p,
                softcap=softcap,
                needed=needed,
                entropy_gradient=entropy_gradient,
                allowed=allowed,
                states=None if states is None else states.reshape(-1),
            )
        else:
            logprobs, entropy = fused_logprob(
                *(rows, head, ids),
                temperature=decoding.temperature,
                softcap=softcap,
                needed=needed,
                with_entropy=True,
                axis_name=None if vocabulary is None else vocabulary[0],
                layout="VD",
            )
            entropy = entropy if entropy_gradient else jax.lax.stop_gradient(entropy)
        return logprobs.reshape(targets.shape), entropy.reshape(targets.shape)

    rows = row_spec(targets.shape)
    split_score = split(score, (rows, P(vocabulary), rows, rows, P(), rows), (rows, rows))
    return split_score(hidden, head, targets, mask, allowed, states)
