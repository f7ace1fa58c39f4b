"""Returns and advantages over time, along the last axis. Time is counted in true entries of the mask.

Between two policy tokens there may be an observation of any length: it is no action, so nothing is discounted,
bootstrapped or paid there. Every op passes over false entries (or, on request, resets at them) and gives 0 there.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.ops._checks import check_choice, check_range, check_shapes
from jaxrl_llm.ops.masked import select
from jaxrl_llm.ops.turns import last_turn_mask

OnMasked = Literal["skip", "reset"]


def reverse_discounted_sum(
    x: Float[Array, "... T"],
    mask: Bool[Array, "... T"],
    decay: Float[Array, "... T"] | Float[Array, ""] | float,
    *,
    on_masked: OnMasked = "skip",
) -> Float[Array, "... T"]:
    """`y_t = x_t + decay_t * y_next` over the true entries of `mask`, the recurrence behind every return below.

    Args:
      x: [..., T] values to sum, read at true entries only.
      mask: [..., T]
      decay: a number, or [..., T] with the factor between entry t and the true entry that follows it.
      on_masked: "skip" passes over false entries; "reset" starts again at each, so that what lies before an observation
        sees nothing of what comes after (verl's REINFORCE++).

    Returns:
      [..., T], 0 at false entries.
    """
    check_shapes(x=(x, "... T"), mask=(mask, "... T"), decay=(decay if jnp.ndim(decay) else None, "... T"))
    check_choice("on_masked", on_masked, OnMasked)
    slope = select(jnp.broadcast_to(jnp.asarray(decay), mask.shape), mask, 1.0 if on_masked == "skip" else 0.0)
    return select(_affine_suffixes(slope, select(x, mask))[1], mask)


def discounted_returns(
    rewards: Float[Array, "... T"], mask: Bool[Array, "... T"], *, gamma: float = 1.0, on_masked: OnMasked = "skip"
) -> Float[Array, "... T"]:
    """`R_t = r_t + gamma * R_next`, over tokens or turns: gamma discounts per true entry. A reward at a false entry is
    not
    seen: put rewards on policy tokens (`place_turn_rewards`, `kl_shaped_rewards`)."""
    check_range("gamma", gamma, 0, 1)
    return reverse_discounted_sum(rewards, mask, gamma, on_masked=on_masked)


def next_values(
    values: Float[Array, "... T"], mask: Bool[Array, "... T"], final: Float[Array, "..."] | float = 0.0
) -> Float[Array, "... T"]:
    """The value at the next true entry, `final` (a number or one per row) after the last; 0 at false entries."""
    check_shapes(values=(values, "... T"), mask=(mask, "... T"), final=(final if jnp.ndim(final) else None, "..."))
    # The first true value at or after t, as a function of what comes after the row: slope * final + offset.
    slope, offset = _affine_suffixes(1.0 - mask.astype(jnp.float32), select(values, mask))
    final = jnp.broadcast_to(jnp.asarray(final, jnp.float32), mask.shape[:-1])[..., None]
    first = jnp.concatenate([slope * final + offset, final], axis=-1)
    return select(first[..., 1:], mask)


def gae_advantages(
    rewards: Float[Array, "... T"],
    values: Float[Array, "... T"],
    mask: Bool[Array, "... T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    discounts: Float[Array, "... T"] | None = None,
    bootstrap: Float[Array, "..."] | float = 0.0,
) -> Float[Array, "... T"]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16), over the policy's tokens only.

    `delta_t = r_t + gamma * V_next - V_t`, `A_t = delta_t + gamma * lam * A_next`, where next is the next true entry.

    Args:
      rewards, values, mask: [..., T]; a value at a false entry is never used.
      gamma, lam: per true entry.
      discounts: [..., T], multiplies gamma; 0 at the last entry of an episode cuts the row there (several episodes in
        one).
      bootstrap: the value behind the last true entry, a number or one per row: 0 after an end, V of the state that was
        reached where a limit cut the rollout off.

    Returns:
      [..., T] advantages, not whitened. The critic's targets are `advantages + values`, before any whitening.
    """
    check_shapes(
        rewards=(rewards, "... T"), values=(values, "... T"), mask=(mask, "... T"), discounts=(discounts, "... T")
    )
    check_range("gamma", gamma, 0, 1)
    check_range("lam", lam, 0, 1)
    discount = _discount(gamma, discounts, mask)
    deltas = select(rewards, mask) + discount * next_values(values, mask, bootstrap) - select(values, mask)
    return reverse_discounted_sum(deltas, mask, discount * lam)


def vtrace_targets(
    rewards: Float[Array, "... T"],
    values: Float[Array, "... T"],
    discounts: Float[Array, "... T"],
    ratios: Float[Array, "... T"],
    *,
    rho_max: float = 1.0,
    c_max: float = 1.0,
    mask: Bool[Array, "... T"] | None = None,
    bootstrap: Float[Array, "..."] | float = 0.0,
) -> Float[Array, "... T"]:
    """V-trace targets of the critic (Espeholt et al. 2018, eq. 1), with `rho = min(rho_max, ratio)`, `c = min(c_max,
    ratio)`:

    `v_t = V_t + y_t`, `y_t = rho_t * (r_t + discount_t * V_next - V_t) + discount_t * c_t * y_next`.

    Args:
      rewards, values: [..., T]
      discounts: [..., T] gamma, and 0 where an episode ends.
      ratios: [..., T] probability of the action under the policy over that under the behavior.
      mask: [..., T] entries that are actions, default all; the others are passed over.
      bootstrap: value behind the last entry.

    Returns:
      [..., T], 0 at false entries.
    """
    check_shapes(
        rewards=(rewards, "... T"),
        values=(values, "... T"),
        discounts=(discounts, "... T"),
        ratios=(ratios, "... T"),
        mask=(mask, "... T"),
    )
    check_range("rho_max", rho_max, 0, open_low=True)
    check_range("c_max", c_max, 0, open_low=True)
    mask = jnp.ones(rewards.shape, bool) if mask is None else mask
    value, ratio, discount = select(values, mask), select(ratios, mask), select(discounts, mask)
    errors = select(rewards, mask) + discount * next_values(values, mask, bootstrap) - value
    deltas = jnp.minimum(rho_max, ratio) * errors
    return value + reverse_discounted_sum(deltas, mask, discount * jnp.minimum(c_max, ratio))


def vtrace_advantages(
    rewards: Float[Array, "... T"],
    values: Float[Array, "... T"],
    discounts: Float[Array, "... T"],
    ratios: Float[Array, "... T"],
    *,
    rho_max: float = 1.0,
    c_max: float = 1.0,
    mask: Bool[Array, "... T"] | None = None,
    bootstrap: Float[Array, "..."] | float = 0.0,
) -> Float[Array, "... T"]:
    """The policy's off-policy advantages, `rho_t * (r_t + discount_t * v_next - V_t)` with v the targets of
    `vtrace_targets` (Espeholt et al. 2018, section 4.2), whose arguments these are. [..., T], 0 at false entries."""
    targets = vtrace_targets(
        rewards, values, discounts, ratios, rho_max=rho_max, c_max=c_max, mask=mask, bootstrap=bootstrap
    )
    mask = jnp.ones(rewards.shape, bool) if mask is None else mask
    lookahead = select(rewards, mask) + select(discounts, mask) * next_values(targets, mask, bootstrap)
    return jnp.minimum(rho_max, select(ratios, mask)) * (lookahead - select(values, mask))


def kl_shaped_rewards(
    rewards: Float[Array, "B"],
    logprobs: Float[Array, "B T"],
    ref_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    beta: float | Float[Array, ""],
) -> Float[Array, "B T"]:
    """`-beta * (logprobs - ref_logprobs)` on every policy token, plus the outcome on the last one of the row.

    Args:
      rewards: [B] outcome; a row without policy tokens has no place for it.
      logprobs: [B, T] of the policy that sampled: this is a reward, not a loss, so give no log-probs under training.
      beta: coefficient in reward per nat, possibly moving (`update_kl_coefficient`).

    Returns:
      [B, T], 0 outside the mask. The penalty is the k1 estimate and may be negative at a token (Ziegler et al. 2019).
    """
    check_shapes(
        rewards=(rewards, "B"), logprobs=(logprobs, "B T"), ref_logprobs=(ref_logprobs, "B T"), mask=(mask, "B T")
    )
    check_range("beta", beta, 0)
    penalty = beta * (select(logprobs, mask) - select(ref_logprobs, mask))
    return select(rewards[:, None], last_turn_mask(mask)) - penalty


def _discount(
    gamma: float, discounts: Float[Array, "... T"] | None, mask: Bool[Array, "... T"]
) -> Float[Array, "... T"]:
    return gamma * (mask.astype(jnp.float32) if discounts is None else select(discounts, mask))


def _affine_suffixes(
    slope: Float[Array, "... T"], offset: Float[Array, "... T"]
) -> tuple[Float[Array, "... T"], Float[Array, "... T"]]:
    """Composes the maps `y -> slope_t * y + offset_t` from the end back to each t: one scan of logarithmic depth."""

    def compose(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]

    if slope.shape[-1] == 0:
        return slope, offset
    return jax.lax.associative_scan(compose, (slope, offset), reverse=True, axis=slope.ndim - 1)
