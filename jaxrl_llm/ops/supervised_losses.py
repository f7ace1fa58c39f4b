"""Losses towards given targets: a critic's returns, demonstrated tokens, class labels. They end as the policy losses do
(`agg`, `max_len`, `rollout_ids`, `weights`, `denominator`, see `policy_losses`) in (loss, metrics)."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.ops._checks import check_choice, check_range, check_shapes
from jaxrl_llm.ops.masked import Aggregation, masked_mean, masked_var, reduce_loss, safe_divide, select
from jaxrl_llm.types import Metrics

SftKind = Literal["nll", "dft"]


def value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"] | None,
    returns: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip: float | None = None,
    agg: Aggregation = "token",
    max_len: int | None = None,
    rollout_ids: Int[Array, "B"] | None = None,
    weights: Float[Array, "B T"] | None = None,
    denominator: Float[Array, ""] | float | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """`0.5 * (V - R)^2`, with `clip` the larger of that and `0.5 * (clip(V, V_old - clip, V_old + clip) - R)^2`.

    Args:
      values: [B, T] of the critic in training; old_values: [B, T] at sampling, None if nothing is clipped.
      returns: [B, T] targets, a constant: unwhitened advantages plus old values.
      clip: half width of the band, in units of value; PPO implementations use 0.2.

    Metrics: `value_mean`, `explained_variance` (1 - var(R - V) / var(R), 0 without variance), `value_clip_fraction`.
    """
    check_shapes(values=(values, "B T"), old_values=(old_values, "B T"), returns=(returns, "B T"), mask=(mask, "B T"))
    check_range("clip", clip, 0, open_low=True)
    value, target = select(values, mask), jax.lax.stop_gradient(select(returns, mask))
    squares, clipped = (value - target) ** 2, jnp.zeros_like(mask)
    if clip is not None:
        if old_values is None:
            raise ValueError("clip needs old_values, the values at sampling, got None; pass them, or clip=None")
        old = jax.lax.stop_gradient(select(old_values, mask))
        bounded = (jnp.clip(value, old - clip, old + clip) - target) ** 2
        squares, clipped = jnp.maximum(squares, bounded), bounded > squares
    loss = reduce_loss(
        0.5 * squares, mask, agg=agg, max_len=max_len, rollout_ids=rollout_ids, weights=weights, denominator=denominator
    )
    variance = masked_var(target, mask)
    metrics = {
        "value_mean": masked_mean(value, mask),
        "value_clip_fraction": masked_mean(clipped.astype(jnp.float32), mask),
        "explained_variance": safe_divide(variance - masked_var(target - value, mask), variance),
    }
    return loss, jax.lax.stop_gradient(metrics)


def sft_loss(
    logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    kind: SftKind = "nll",
    weights: Float[Array, "B"] | Float[Array, "B T"] | None = None,
    agg: Aggregation = "token",
    max_len: int | None = None,
    rollout_ids: Int[Array, "B"] | None = None,
    denominator: Float[Array, ""] | float | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Cross entropy of demonstrated tokens, nats: `-logprobs` ("nll"), or `-stop_gradient(p) * logprobs` with p the
    token's probability ("dft", dynamic fine-tuning, Wu et al. 2025).

    Args:
      weights: [B] of sequences or [B, T] of tokens. They multiply the terms; the denominator of `agg` stays that of the
        mask, unless `denominator` gives another (such as the number of questions, for weights that sum to one per
        question).

    Metrics: `nll` and `target_prob`, unweighted token means.
    """
    check_shapes(logprobs=(logprobs, "B T"), mask=(mask, "B T"))
    check_choice("kind", kind, SftKind)
    if weights is not None:
        check_shapes(mask=(mask, "B T"), weights=(weights, "B" if weights.ndim == 1 else "B T"))
        weights = jnp.broadcast_to(weights[:, None] if weights.ndim == 1 else weights, mask.shape)
    nll = -select(logprobs, mask)
    probability = jax.lax.stop_gradient(jnp.exp(-nll))
    loss = reduce_loss(
        nll * probability if kind == "dft" else nll,
        mask,
        agg=agg,
        max_len=max_len,
        rollout_ids=rollout_ids,
        weights=weights,
        denominator=denominator,
    )
    return loss, jax.lax.stop_gradient({"nll": masked_mean(nll, mask), "target_prob": masked_mean(probability, mask)})


def token_cross_entropy(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    shift: int = 0,
    agg: Aggregation = "token",
    max_len: int | None = None,
    denominator: Float[Array, ""] | float | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """`logsumexp(logits) - logits[target]` in nats, for small vocabularies and heads (it holds [B, T, V]).

    Args:
      targets, mask: [B, T]; what stands under a false entry, and its logits, is never read.
      shift: the logits at t - shift predict the target at t; 1 for a causal language model. The first `shift` targets
        have no prediction and are left out.

    Metrics: `accuracy`, the share of targets with the largest logit.
    """
    check_shapes(logits=(logits, "B T V"), targets=(targets, "B T"), mask=(mask, "B T"))
    if not 0 <= shift < mask.shape[1]:
        raise ValueError(f"shift must lie in [0, {mask.shape[1]}), the number of positions, got {shift}")
    length = mask.shape[1]
    logits, targets, mask = logits[:, : length - shift], targets[:, shift:], mask[:, shift:]
    scores, targets = select(logits, mask[..., None]), jnp.where(mask, targets, 0)
    chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(scores, axis=-1) - chosen
    loss = reduce_loss(nll, mask, agg=agg, max_len=max_len, denominator=denominator)
    hits = jnp.argmax(scores, axis=-1) == targets
    return loss, {"accuracy": masked_mean(hits.astype(jnp.float32), mask)}
