"""Losses of the policy: per-token terms under one set of arguments, reduced to (loss, metrics).

Common arguments, all [B, T]:
  logprobs: log-probs of the sampled tokens under the policy in training; the gradient goes through these alone.
  old_logprobs: under the policy that sampled (or the one the clip is centered on).
  advantages: a constant, as are `weights` and `old_logprobs`.
  mask: true at policy tokens. What stands under a false entry is never read and its gradient is exactly 0.
  agg, max_len, rollout_ids, weights, denominator: which mean is taken over the tokens, see `aggregate_loss` (which of
    them are biased) and `reduce_loss`. `denominator` is for gradient accumulation: pass
    `loss_denominator(mask_of_the_batch)` to the loss of each micro-batch and the sum of their gradients is that of the
    batch.

The loss is a float32 scalar, to be minimized; 0 for an empty mask. Metrics are flat float32 scalars, token means over
the mask of this (micro-)batch: `ratio_mean`, `ratio_min`, `ratio_max`, `clip_fraction`, and two
estimates of KL(old || new) on the old policy's samples, `approx_kl_k1` (`-log ratio`) and `approx_kl_k3`
(`ratio - 1 - log ratio`). Log-ratios are clamped to [-20, 20] before `exp`.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.ops._checks import check_choice, check_range, check_shapes
from jaxrl_llm.ops.advantages import check_group_sizes
from jaxrl_llm.ops.groups import group_stats
from jaxrl_llm.ops.masked import Aggregation, dense_ids, masked_mean, reduce_loss, safe_divide, select
from jaxrl_llm.types import Metrics

Tokens = Float[Array, "B T"]
TokenMask = Bool[Array, "B T"]
Denominator = Float[Array, ""] | float | None
Level = Literal["token", "sequence"]
Outside = Literal["clip", "zero"]
RatioShape = Literal["percentile", "constant", "power"]
MirrorForm = Literal["surrogate", "squared"]
MirrorBaseline = Literal["mean", "logsumexp"]


def ppo_clip_loss(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Tokens,
    mask: TokenMask,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_max: float | None = None,
    agg: Aggregation = "token",
    max_len: int | None = None,
    rollout_ids: Int[Array, "B"] | None = None,
    weights: Tokens | None = None,
    denominator: Denominator = None,
) -> tuple[Float[Array, ""], Metrics]:
    """`max(-ratio * A, -clip(ratio, 1 - clip_low, 1 + clip_high) * A)` (Schulman et al. 2017, eq. 7).

    Args:
      clip_low, clip_high: the band; DAPO's clip-higher (Yu et al. 2025) is 0.2 and 0.28.
      dual_clip: c > 1, for A < 0 the loss is at most `-c * A` (Ye et al. 2020); off by default.
      ratio_max: the unclipped ratio is at most this (a two-sided bound); off by default.
      weights: detached weights of the tokens, such as `importance_weights(prox, old, mask)` of the decoupled loss.

    `clip_fraction` counts the tokens where the clipped term is strictly the larger; `dual_clip_fraction`, if that clip
    is on, those where it is active.

    Raises:
      ValueError: `clip_low` outside [0, 1), `clip_high < 0`, `dual_clip <= 1`, shapes, unknown `agg`.
    """
    _check(logprobs, old_logprobs, advantages, mask)
    check_range("clip_low", clip_low, 0, 1, open_high=True)
    check_range("clip_high", clip_high, 0)
    check_range("dual_clip", dual_clip, 1, open_low=True)
    check_range("ratio_max", ratio_max, 1)
    log_ratio, advantage = _log_ratio(logprobs, old_logprobs, mask), _constant(advantages, mask)
    ratio = jnp.exp(log_ratio)
    plain = -advantage * (ratio if ratio_max is None else jnp.minimum(ratio, ratio_max))
    clipped = -advantage * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    per_token = jnp.maximum(plain, clipped)
    metrics = _ratio_metrics(log_ratio, ratio, mask, clipped > plain)
    if dual_clip is not None:
        bound = -dual_clip * advantage
        active = (advantage < 0) & (per_token > bound)
        per_token = jnp.where(active, bound, per_token)
        metrics["dual_clip_fraction"] = masked_mean(active.astype(jnp.float32), mask)
    loss = reduce_loss(
        per_token, mask, agg=agg, max_len=max_len, rollout_ids=rollout_ids, weights=weights, denominator=denominator
    )
    return loss, metrics


def gspo_loss(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Tokens,
    mask: TokenMask,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    agg: Aggregation = "seq",
    max_len: int | None = None,
    rollout_ids: Int[Array, "B"] | None = None,
    weights: Tokens | None = None,
    denominator: Denominator = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Group sequence policy optimization (Zheng et al. 2025): PPO's clip on `s_b = exp(mean_t log ratio)`, one per
    sequence.

    Every token of the sequence carries s_b; its own log-prob carries the gradient, `s_b * A_t / n_b` under "seq" where
    the clip is not active (their GSPO-token form, equal to eq. 5 for an advantage that is constant over the sequence).
    With `rollout_ids` the sequence is the whole rollout, so that cutting it into pieces changes no ratio.
    """
    _check(logprobs, old_logprobs, advantages, mask)
    check_range("clip_low", clip_low, 0, 1, open_high=True)
    check_range("clip_high", clip_high, 0)
    check_shapes(mask=(mask, "B T"), rollout_ids=(rollout_ids, "B"))
    log_ratio, advantage = _log_ratio(logprobs, old_logprobs, mask), _constant(advantages, mask)
    sums, counts = jnp.sum(log_ratio, axis=1), jnp.sum(mask, axis=1, dtype=jnp.float32)
    if rollout_ids is not None:
        slots = dense_ids(rollout_ids)
        sums, counts = (jax.ops.segment_sum(y, slots, num_segments=len(y))[slots] for y in (sums, counts))
    sequence = jax.lax.stop_gradient(safe_divide(sums, counts))[:, None]
    own = select(logprobs, mask)
    ratio = jnp.exp(sequence + own - jax.lax.stop_gradient(own))
    plain, clipped = -advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = reduce_loss(
        jnp.maximum(plain, clipped),
        mask,
        agg=agg,
        max_len=max_len,
        rollout_ids=rollout_ids,
        weights=weights,
        denominator=denominator,
    )
    return loss, _ratio_metrics(log_ratio, ratio, mask, clipped > plain)


def cispo_loss(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Tokens,
    mask: TokenMask,
    *,
    clip_low: float | None = None,
    clip_high: float = 4.0,
    agg: Aggregation = "token",
    max_len: int | None = None,
    rollout_ids: Int[Array, "B"] | None = None,
    weights: Tokens | None = None,
    denominator: Denominator = None,
) -> tuple[Float[Array, ""], Metrics]:
    """`-stop_gradient(w) * A * logprobs`, w the ratio bounded to `[1 - clip_low, 1 + clip_high]` (MiniMax-M1, 2025, eq.
    4).

    REINFORCE with a clipped importance weight: a token outside the bounds keeps a gradient. By default only the upper
    bound holds, at a weight of 5 (TRL's choice; the paper publishes no number). `clip_fraction`: tokens whose weight is
    bounded.
    """
    _check(logprobs, old_logprobs, advantages, mask)
    check_range("clip_low", clip_low, 0, 1, open_high=True)
    check_range("clip_high", clip_high, 0)
    log_ratio, advantage = _log_ratio(logprobs, old_logprobs, mask), _constant(advantages, mask)
    ratio = jnp.exp(log_ratio)
    bounded = jax.lax.stop_gradient(jnp.clip(ratio, None if clip_low is None else 1 - clip_low, 1 + clip_high))
    loss = reduce_loss(
        -bounded * advantage * select(logprobs, mask),
        mask,
        agg=agg,
        max_len=max_len,
        rollout_ids=rollout_ids,
        weights=weights,
        denominator=denominator,
    )
    return loss, _ratio_metrics(log_ratio, ratio, mask, bounded != ratio)


def reinforce_loss(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Tokens,
    mask: TokenMask,
    *,
    agg: Aggregation = "token",
    max_len: int | None = None,
    rollout_ids: Int[Array, "B"] | None = None,
    weights: Tokens | None = None,
    denominator: Denominator = None,
) -> tuple[Float[Array, ""], Metrics]:
    """`-A * logprobs` (Williams 1992). `old_logprobs` serve the metrics only: on-policy, or weighted by `weights`."""
    _check(logprobs, old_logprobs, advantages, mask)
    loss = reduce_loss(
        -_constant(advantages, mask) * select(logprobs, mask),
        mask,
        agg=agg,
        max_len=max_len,
        rollout_ids=rollout_ids,
        weights=weights,
        denominator=denominator,
    )
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    return loss, _ratio_metrics(log_ratio, jnp.exp(log_ratio), mask, jnp.zeros_like(mask))


def importance_weights(
    logprobs: Tokens,
    old_logprobs: Tokens,
    mask: TokenMask,
    *,
    level: Level = "token",
    cap: float | None = 2.0,
    floor: float | None = None,
    outside: Outside = "clip",
    normalize: bool = False,
) -> Tokens:
    """Bounded ratio `exp(logprobs - old_logprobs)` without gradient, to be given to a loss as `weights`.

    For samples of another policy: the trainer's log-probs against the sampler's (truncated importance sampling), or a
    proximal policy's against the behavior's (decoupled PPO, Hilton et al. 2022).

    Args:
      level: "token", or "sequence": one weight for all tokens of a row, from the summed log-ratio, which is clamped to
        [-20, 20] only after the sum, in log space, so that thousands of tokens neither overflow nor lose their product.
      cap, floor: bounds of the weight; None for none.
      outside: "clip" brings a weight to the bound; "zero" drops it (a weight equal to the bound stays).
      normalize: divide by the mean weight, over tokens or (level "sequence") over rows with a token.

    Returns:
      [B, T], 0 outside the mask.
    """
    check_shapes(logprobs=(logprobs, "B T"), old_logprobs=(old_logprobs, "B T"), mask=(mask, "B T"))
    check_choice("level", level, Level)
    check_choice("outside", outside, Outside)
    check_range("cap", cap, 0, open_low=True)
    check_range("floor", floor, 0, float("inf") if cap is None else cap)
    log_ratio = select(logprobs, mask) - select(old_logprobs, mask)
    counted = mask
    if level == "sequence":
        log_ratio, counted = jnp.sum(log_ratio, axis=1, keepdims=True), jnp.any(mask, axis=1, keepdims=True)
    ratio = jnp.exp(jnp.clip(log_ratio, -20, 20))
    bounded = jnp.clip(ratio, floor, cap)
    weights = bounded if outside == "clip" else select(ratio, bounded == ratio)
    if normalize:
        weights = safe_divide(weights, masked_mean(weights, counted))
    return jax.lax.stop_gradient(select(jnp.broadcast_to(weights, mask.shape), mask))


def shape_ratio(
    ratio: Tokens,
    mask: TokenMask,
    *,
    strategy: RatioShape = "percentile",
    value: float = 0.9,
    count_padding: bool = False,
) -> Tokens:
    """A bounded concave map of the ratio in place of a clip, for samples of another context (Guide-GRPO, 2025).

    `ratio / (ratio + g)`, whose slope times the ratio is at most 1/4. g has no gradient and is
    - "percentile": the `value` quantile (linear between order statistics) of the ratios of the sequence's policy
      tokens, at least 1e-4. `count_padding=True` counts the false entries in, as ratios of 1, as the released code
      does;
    - "constant": `value`.
    "power" is `ratio ^ value` instead.

    Args:
      ratio: [B, T], positive at true entries.

    Returns:
      [B, T], 0 outside the mask.
    """
    check_shapes(ratio=(ratio, "B T"), mask=(mask, "B T"))
    check_choice("strategy", strategy, RatioShape)
    check_range("value", value, 0, 1 if strategy == "percentile" else float("inf"), open_low=strategy != "percentile")
    ratio = select(ratio, mask, 1.0)
    if strategy == "power":
        return select(ratio**value, mask)
    offset: Float[Array, "B 1"] | float = value
    if strategy == "percentile":
        counted = jnp.ones_like(mask) if count_padding else mask
        offset = jnp.maximum(jax.lax.stop_gradient(_row_quantile(ratio, counted, value)), 1e-4)
    return select(ratio / (ratio + offset), mask)


def mirror_descent_loss(
    seq_logprobs: Float[Array, "B"],
    ref_seq_logprobs: Float[Array, "B"],
    rewards: Float[Array, "B"],
    group_ids: Int[Array, "B"],
    *,
    tau: float,
    form: MirrorForm = "surrogate",
    baseline: MirrorBaseline = "mean",
    valid: Bool[Array, "B"] | None = None,
    denominator: Denominator = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Online mirror descent (Kimi k1.5, 2025, section 2.3.2), with `d = seq_logprobs - ref_seq_logprobs`:

    "squared": `(r - base - tau * d)^2`. "surrogate": `-(r - base) * seq_logprobs + tau / 2 * d^2`, whose gradient is
    the squared form's over `2 * tau`.

    Args:
      seq_logprobs, ref_seq_logprobs: [B] SUMS over policy tokens, under the policy and under the one of the iteration's
        start, at the temperature of sampling.
      rewards, group_ids: [B]
      tau: strength of the regularizer, reward per nat.
      baseline: stands in for `tau * log Z` of a prompt: the mean reward of its samples, or `tau * log mean exp(r /
        tau)`.
      valid: [B], samples that have a reward.
      denominator: number of samples of the whole batch, if this is a micro-batch (groups must stay together).

    Raises:
      ValueError: `tau <= 0`; a prompt with one sample, where only the regularizer is left (under jit it is left out).
    """
    check_shapes(
        seq_logprobs=(seq_logprobs, "B"),
        ref_seq_logprobs=(ref_seq_logprobs, "B"),
        rewards=(rewards, "B"),
        group_ids=(group_ids, "B"),
        valid=(valid, "B"),
    )
    check_range("tau", tau, 0, open_low=True)
    check_choice("form", form, MirrorForm)
    check_choice("baseline", baseline, MirrorBaseline)
    check_group_sizes(group_ids, "mirror descent")
    valid = jnp.ones(rewards.shape, bool) if valid is None else valid
    reward = _constant(rewards, valid)
    mean, _, count = group_stats(reward, group_ids, valid)
    keep = valid & (count > 1)
    if baseline == "logsumexp":
        slots = dense_ids(group_ids)
        largest = jax.ops.segment_max(select(reward, valid, -jnp.inf), slots, num_segments=rewards.size)[slots]
        scaled = jnp.exp(jnp.where(keep, reward - largest, 0) / tau)
        mean = select(largest, keep) + tau * jnp.log(jnp.where(keep, group_stats(scaled, group_ids, valid)[0], 1))
    seq_logprobs = select(seq_logprobs, keep)
    log_ratio = seq_logprobs - _constant(ref_seq_logprobs, keep)
    centered = select(reward - mean, keep)
    if form == "squared":
        losses = (centered - tau * log_ratio) ** 2
    else:
        losses = tau / 2 * log_ratio**2 - centered * seq_logprobs
    number = jnp.sum(keep, dtype=jnp.float32) if denominator is None else denominator
    metrics = {
        "log_ratio_mean": masked_mean(log_ratio, keep),
        "residual": jnp.sqrt(masked_mean((centered - tau * log_ratio) ** 2, keep)),
    }
    return safe_divide(jnp.sum(select(losses, keep)), number), jax.lax.stop_gradient(metrics)


def _check(logprobs: Tokens, old_logprobs: Tokens, advantages: Tokens, mask: TokenMask) -> None:
    check_shapes(
        logprobs=(logprobs, "B T"),
        old_logprobs=(old_logprobs, "B T"),
        advantages=(advantages, "B T"),
        mask=(mask, "B T"),
    )


def _constant(x: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, "..."]:
    return jax.lax.stop_gradient(select(x, mask))


def _log_ratio(logprobs: Tokens, old_logprobs: Tokens, mask: TokenMask) -> Tokens:
    return jnp.clip(select(logprobs, mask) - _constant(old_logprobs, mask), -20, 20)


def _ratio_metrics(log_ratio: Tokens, ratio: Tokens, mask: TokenMask, clipped: TokenMask) -> Metrics:
    empty = ~jnp.any(mask)
    metrics = {
        "ratio_mean": masked_mean(ratio, mask),
        "ratio_min": jnp.where(empty, 0, jnp.min(select(ratio, mask, jnp.inf), initial=jnp.inf)),
        "ratio_max": jnp.where(empty, 0, jnp.max(select(ratio, mask, -jnp.inf), initial=-jnp.inf)),
        "clip_fraction": masked_mean(clipped.astype(jnp.float32), mask),
        "approx_kl_k1": masked_mean(-log_ratio, mask),
        "approx_kl_k3": masked_mean(jnp.expm1(log_ratio) - log_ratio, mask),
    }
    return jax.lax.stop_gradient(metrics)


def _row_quantile(x: Tokens, mask: TokenMask, q: float) -> Float[Array, "B 1"]:
    """The q quantile of the true entries of each row, linear between order statistics; 1 for an empty row."""
    ordered = jnp.sort(select(x, mask, jnp.inf), axis=1)
    last = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True) - 1, 0)
    place = q * last.astype(jnp.float32)
    below = jnp.floor(place).astype(jnp.int32)
    low, high = (jnp.take_along_axis(ordered, jnp.minimum(index, last), axis=1) for index in (below, below + 1))
    return jnp.where(jnp.any(mask, axis=1, keepdims=True), low + (place - below) * (high - low), 1)
