"""The only reductions of the library: over what a mask leaves, in float32, 0 where it leaves nothing.

Values under a false mask are replaced before any arithmetic touches them, so that a NaN or an infinity there reaches
neither the result nor a gradient, and the gradient under the mask is exactly 0.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.ops._checks import check_choice, check_range, check_shapes

Axis = int | tuple[int, ...] | None
Aggregation = Literal["token", "seq", "seq_sum", "const", "rollout"]


def select(x: Float[Array, "..."], mask: Bool[Array, "..."], other: float = 0.0) -> Float[Array, "..."]:
    """`x` in float32 where `mask` is true, `other` elsewhere: the first step of every masked computation."""
    return jnp.where(mask, x, other).astype(jnp.float32)


def all_if_none(valid: Bool[Array, "..."] | None, x: Array) -> Bool[Array, "..."]:
    """`valid`, or true everywhere in the shape of `x`."""
    return jnp.ones(x.shape, bool) if valid is None else valid


def safe_divide(numerator: Float[Array, "..."], denominator: Float[Array, "..."] | float) -> Float[Array, "..."]:
    """`numerator / denominator`, 0 with a zero gradient where the denominator (a count) is not positive."""
    positive = jnp.asarray(denominator) > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1), 0)


def masked_sum(
    x: Float[Array, "..."], mask: Bool[Array, "..."], *, axis: Axis = None, weights: Float[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """Sum of `weights * x` over the true entries of `mask` along `axis` (None: all). Empty gives 0.

    All arguments have one shape. Weights, here and below, are constants: no gradient goes into them.
    """
    check_shapes(x=(x, "..."), mask=(mask, "..."), weights=(weights, "..."))
    return jnp.sum(_weighted(x, mask, weights), axis=axis)


def masked_mean(
    x: Float[Array, "..."], mask: Bool[Array, "..."], *, axis: Axis = None, weights: Float[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """`sum(weights * x) / sum(weights)` over the true entries of `mask` along `axis` (None: all). Empty gives 0."""
    check_shapes(x=(x, "..."), mask=(mask, "..."), weights=(weights, "..."))
    total = jnp.sum(_weighted(jnp.ones(mask.shape), mask, weights), axis=axis)
    return safe_divide(jnp.sum(_weighted(x, mask, weights), axis=axis), total)


def masked_var(
    x: Float[Array, "..."],
    mask: Bool[Array, "..."],
    *,
    axis: Axis = None,
    weights: Float[Array, "..."] | None = None,
    ddof: int = 1,
) -> Float[Array, "..."]:
    """`sum(weights * (x - mean)^2) / (sum(weights) - ddof)` over the true entries of `mask` along `axis` (None: all).

    Weights count as frequencies. 0 where they sum to `ddof` or less: a variance of one value is not NaN here.
    """
    check_shapes(x=(x, "..."), mask=(mask, "..."), weights=(weights, "..."))
    total = jnp.sum(_weighted(jnp.ones(mask.shape), mask, weights), axis=axis, keepdims=True)
    mean = safe_divide(jnp.sum(_weighted(x, mask, weights), axis=axis, keepdims=True), total)
    squares = jnp.sum(_weighted((select(x, mask) - mean) ** 2, mask, weights), axis=axis, keepdims=True)
    return jnp.squeeze(safe_divide(squares, total - ddof), axis=axis)


def masked_softmax(
    x: Float[Array, "... N"], valid: Bool[Array, "... N"], *, temperature: float = 1.0
) -> Float[Array, "... N"]:
    """Softmax of `x / temperature` over the valid entries of the last axis, 0 elsewhere. Empty gives a row of 0."""
    check_shapes(x=(x, "... N"), valid=(valid, "... N"))
    check_range("temperature", temperature, 0, open_low=True)
    scores = select(x, valid, -jnp.inf) / temperature
    largest = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
    shift = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0))
    weights = select(jnp.exp(jnp.where(valid, scores - shift, 0)), valid)
    return safe_divide(weights, jnp.sum(weights, axis=-1, keepdims=True))


def sequence_logprob(
    logprobs: Float[Array, "... T"], mask: Bool[Array, "... T"], *, length_power: float = 0.0
) -> Float[Array, "..."]:
    """`sum_t logprobs / n^length_power` with n true tokens: 0 is the log-prob of the sequence, 1 the mean per token.

    Empty gives 0. A perplexity is `exp(-sequence_logprob(..., length_power=1))`.
    """
    check_shapes(logprobs=(logprobs, "... T"), mask=(mask, "... T"))
    length = jnp.sum(mask, axis=-1, dtype=jnp.float32)
    return safe_divide(jnp.sum(select(logprobs, mask), axis=-1), length**length_power)


def sequence_log_ratio(
    logprobs: Float[Array, "... T"],
    ref_logprobs: Float[Array, "... T"],
    mask: Bool[Array, "... T"],
    *,
    length_power: float = 0.0,
) -> Float[Array, "..."]:
    """`sum_t (logprobs - ref_logprobs) / n^length_power`, DPO's implicit reward but for its beta. Empty gives 0."""
    check_shapes(logprobs=(logprobs, "... T"), ref_logprobs=(ref_logprobs, "... T"), mask=(mask, "... T"))
    return sequence_logprob(select(logprobs, mask) - select(ref_logprobs, mask), mask, length_power=length_power)


def aggregate_loss(
    x: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    agg: Aggregation = "token",
    max_len: int | None = None,
    rollout_ids: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """A mean of per-token values by its name, as (numerator, denominator); their quotient is the loss.

    With n_b true tokens in sequence b:

    | `agg`       | numerator                    | denominator                   | as a policy gradient      |
    | ----------- | ---------------------------- | ----------------------------- | ------------------------- |
    | `"token"`   | `sum x`                      | true tokens                   | biased in a small batch   |
    | `"seq"`     | `sum_b (sum_t x) / n_b`      | sequences with a true token   | BIASED                    |
    | `"seq_sum"` | `sum x`                      | sequences with a true token   | unbiased                  |
    | `"const"`   | `sum x`                      | `B * max_len`, empty rows too | unbiased, times 1/max_len |
    | `"rollout"` | `sum_r (mean of r's tokens)` | rollouts with a true token    | BIASED                    |

    "seq" and "rollout" give a token of a long sequence less weight, so that wrong answers drift longer and right ones
    shorter; no batch size cures that. The divisor of "token" is random: its bias falls as 1/B, the direction is right.

    `"rollout"` averages over all pieces of a rollout that was cut into several sequences (`rollout_ids`, any integers),
    so that a rollout of many pieces weighs no more than another.

    Numerators and denominators of micro-batches and devices add up to those of the whole batch exactly (for `"rollout"`
    as long as the pieces of a rollout stay together). A sequence without true tokens changes neither, except under
    `"const"`, where it counts as a sequence: drop it from the batch if it should not.

    GRPO (Shao et al. 2024) is "seq"; DAPO (Yu et al. 2025) "token" over the global batch; Dr. GRPO (Liu et al. 2025)
    "const".

    Raises:
      ValueError: unknown `agg`, "const" without `max_len`, "rollout" without `rollout_ids`.
    """
    check_shapes(x=(x, "B T"), mask=(mask, "B T"), rollout_ids=(rollout_ids, "B"))
    denominator = loss_denominator(mask, agg=agg, max_len=max_len, rollout_ids=rollout_ids)
    sums, counts = jnp.sum(select(x, mask), axis=1), jnp.sum(mask, axis=1, dtype=jnp.float32)
    if agg == "seq":
        return jnp.sum(safe_divide(sums, counts)), denominator
    if agg == "rollout" and rollout_ids is not None:
        pieces = dense_ids(rollout_ids)
        sums, counts = (jax.ops.segment_sum(y, pieces, num_segments=len(y)) for y in (sums, counts))
        return jnp.sum(safe_divide(sums, counts)), denominator
    return jnp.sum(sums), denominator


def loss_denominator(
    mask: Bool[Array, "B T"],
    *,
    agg: Aggregation = "token",
    max_len: int | None = None,
    rollout_ids: Int[Array, "B"] | None = None,
) -> Float[Array, ""]:
    """The denominator of `aggregate_loss`. Taken over a whole batch and handed to a loss as `denominator=`, it makes
    the losses (and gradients) of the micro-batches add up to those of the batch."""
    check_shapes(mask=(mask, "B T"), rollout_ids=(rollout_ids, "B"))
    check_choice("agg", agg, Aggregation)
    if agg == "token":
        return jnp.sum(mask, dtype=jnp.float32)
    if agg == "const":
        if max_len is None:
            raise ValueError('agg="const" needs max_len, the constant that a sequence is divided by; got None')
        check_range("max_len", max_len, 1)
        return jnp.float32(mask.shape[0] * max_len)
    rows = jnp.any(mask, axis=1)
    if agg == "rollout":
        if rollout_ids is None:
            raise ValueError('agg="rollout" needs rollout_ids, the rollout that each sequence is a piece of; got None')
        rows = jax.ops.segment_max(rows.astype(jnp.int32), dense_ids(rollout_ids), num_segments=len(rows)) > 0
    return jnp.sum(rows, dtype=jnp.float32)


def reduce_loss(
    x: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    agg: Aggregation = "token",
    max_len: int | None = None,
    rollout_ids: Int[Array, "B"] | None = None,
    weights: Float[Array, "B T"] | None = None,
    denominator: Float[Array, ""] | float | None = None,
) -> Float[Array, ""]:
    """`aggregate_loss` of `weights * x` as one number: how every loss ends, and how a KL or entropy term is added.

    `weights` (no gradient) multiply the values only, the denominator stays. `denominator` replaces that of this batch,
    e.g. by the whole batch's when this is one of its micro-batches. A denominator of 0 gives 0.
    """
    check_shapes(x=(x, "B T"), mask=(mask, "B T"), weights=(weights, "B T"))
    values = _weighted(x, mask, weights)
    numerator, own = aggregate_loss(values, mask, agg=agg, max_len=max_len, rollout_ids=rollout_ids)
    return safe_divide(numerator, own if denominator is None else denominator)


class Moments(NamedTuple):
    """Running mean, population variance and number of values; by default a weak prior of mean 0 and variance 1."""

    mean: Float[Array, ""] | np.floating = np.float32(0)
    var: Float[Array, ""] | np.floating = np.float32(1)
    number: Float[Array, ""] | np.floating = np.float32(1e-4)


def update_moments(
    state: Moments, x: Float[Array, "..."], valid: Bool[Array, "..."]
) -> tuple[Moments, Float[Array, "..."]]:
    """Pools the valid entries of `x` into running moments, then standardizes them: `(x - mean) / sqrt(max(var, 1e-8))`.

    The batch is pooled first, so it is scaled with its own help; entries that are not valid get 0. Start with
    `Moments()`. Pooling of two sets' moments after Chan et al. 1979.
    """
    check_shapes(x=(x, "..."), valid=(valid, "..."))
    number, mean = jnp.sum(valid, dtype=jnp.float32), masked_mean(x, valid)
    gap, total = mean - state.mean, state.number + number
    squares = state.var * state.number + masked_var(x, valid, ddof=0) * number + gap**2 * state.number * number / total
    new = Moments(state.mean + gap * number / total, squares / total, total)
    return new, select((select(x, valid) - new.mean) / jnp.sqrt(jnp.maximum(new.var, 1e-8)), valid)


def dense_ids(ids: Int[Array, "..."]) -> Int[Array, "..."]:
    """The same partition with ids in 0..size-1, so that any integers may name groups at static shapes.

    The new id is the place that the old one first takes among all in order.
    """
    flat = jnp.ravel(ids)
    return jnp.searchsorted(jnp.sort(flat), flat, method="scan_unrolled").reshape(ids.shape)


def _weighted(
    x: Float[Array, "..."], mask: Bool[Array, "..."], weights: Float[Array, "..."] | None
) -> Float[Array, "..."]:
    values = select(x, mask)
    return values if weights is None else values * jax.lax.stop_gradient(select(weights, mask))
