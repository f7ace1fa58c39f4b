"""Advantages, [B, T]: how much better than expected a policy token did; 0 outside the mask."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.ops._checks import check_choice, check_ids_below, check_range, check_shapes, is_concrete
from jaxrl_llm.ops.groups import Scale, Singleton, group_normalize, masked_whiten, whiten
from jaxrl_llm.ops.masked import dense_ids, masked_mean, masked_sum, safe_divide, select
from jaxrl_llm.ops.returns import OnMasked, discounted_returns, reverse_discounted_sum
from jaxrl_llm.ops.turns import broadcast_values, last_turn_mask

LeaveOneOut = Literal["paper", "code"]


def group_relative_advantages(
    rewards: Float[Array, "R"],
    group_ids: Int[Array, "R"],
    mask: Bool[Array, "B T"],
    *,
    rollout_ids: Int[Array, "B"] | None = None,
    valid: Bool[Array, "R"] | None = None,
    **normalize: Any,
) -> Float[Array, "B T"]:
    """`group_normalize` of the rewards, the same on every policy token of the sequence.

    Args:
      rewards, group_ids: [R], one per rollout; R = B unless `rollout_ids` is given.
      mask: [B, T]
      rollout_ids: [B], the rollout in 0..R-1 that a sequence is a piece of: the group is one of rollouts, never of
        pieces, which would weigh a rollout by their number.
      valid: [R], the rollouts that have a reward; the others are in no mean or std and get 0.
      normalize: options of `group_normalize`; its defaults are those of GRPO.
    """
    rows = "B" if rollout_ids is None else "R"
    check_shapes(
        mask=(mask, "B T"),
        rewards=(rewards, rows),
        group_ids=(group_ids, rows),
        valid=(valid, rows),
        rollout_ids=(rollout_ids, "B"),
    )
    if rollout_ids is not None:
        check_ids_below("rollout_ids", rollout_ids, rewards.shape[0])
    advantages = group_normalize(rewards, group_ids, valid, **normalize)
    if rollout_ids is None:
        return broadcast_values(advantages, mask)
    return broadcast_values(advantages, jnp.where(mask, rollout_ids[:, None], -1))


def grpo_advantages(
    rewards: Float[Array, "R"],
    group_ids: Int[Array, "R"],
    mask: Bool[Array, "B T"],
    *,
    scale: Scale = "group",
    eps: float = 1e-6,
    singleton: Singleton = "zero",
    rollout_ids: Int[Array, "B"] | None = None,
    valid: Bool[Array, "R"] | None = None,
) -> Float[Array, "B T"]:
    """`(r - mean_g) / (std_g + eps)`, std with ddof 1, on every policy token (Shao et al. 2024, section 4.1.2).

    `scale="none"` is Dr. GRPO (Liu et al. 2025), `"batch"` Lite PPO (Liu et al. 2025). A group whose rewards are all
    equal, and by default a lone member, gets 0. Arguments as in `group_relative_advantages`.
    """
    return group_relative_advantages(
        rewards, group_ids, mask, rollout_ids=rollout_ids, valid=valid, scale=scale, eps=eps, singleton=singleton
    )


def rloo_advantages(
    rewards: Float[Array, "R"],
    group_ids: Int[Array, "R"],
    mask: Bool[Array, "B T"],
    *,
    singleton: Singleton = "zero",
    rollout_ids: Int[Array, "B"] | None = None,
    valid: Bool[Array, "R"] | None = None,
) -> Float[Array, "B T"]:
    """`r_i` minus the mean of the other members of its group, on every policy token (Ahmadian et al. 2024, eq. 8).

    Arguments as in `group_relative_advantages`.
    """
    return group_relative_advantages(
        rewards,
        group_ids,
        mask,
        rollout_ids=rollout_ids,
        valid=valid,
        center="leave_one_out",
        scale="none",
        singleton=singleton,
    )


def remax_advantages(
    rewards: Float[Array, "B"], greedy_rewards: Float[Array, "B"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """`r - r_greedy` on every policy token, r_greedy [B] the reward of the prompt's greedy rollout (Li et al. 2024)."""
    check_shapes(rewards=(rewards, "B"), greedy_rewards=(greedy_rewards, "B"), mask=(mask, "B T"))
    return select(rewards.astype(jnp.float32)[:, None] - greedy_rewards.astype(jnp.float32)[:, None], mask)


def reinforce_pp_advantages(
    token_rewards: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    gamma: float = 1.0,
    on_masked: OnMasked = "skip",
    eps: float = 1e-8,
) -> Float[Array, "B T"]:
    """REINFORCE++ (Hu 2025): discounted returns of token rewards, whitened over all policy tokens of the batch.

    verl resets the return at every false entry, so that policy tokens before an observation get 0; `on_masked="reset"`
    reproduces that. Without observations the two agree.

    Raises:
      ValueError: fewer than two policy tokens (zeros under jit).
    """
    return masked_whiten(discounted_returns(token_rewards, mask, gamma=gamma, on_masked=on_masked), mask, eps=eps)


def turn_advantages(
    turn_rewards: Float[Array, "B K"], turn_mask: Bool[Array, "B K"], turn_ids: Int[Array, "B T"], *, gamma: float = 1.0
) -> Float[Array, "B T"]:
    """`A_k = r_k + gamma * A_(k+1)` over the turns that took place, on every policy token of turn k."""
    check_shapes(turn_rewards=(turn_rewards, "B K"), turn_mask=(turn_mask, "B K"), turn_ids=(turn_ids, "B T"))
    return broadcast_values(discounted_returns(turn_rewards, turn_mask, gamma=gamma), turn_ids)


def dual_level_advantages(
    turn_rewards: Float[Array, "B K"],
    turn_mask: Bool[Array, "B K"],
    turn_ids: Int[Array, "B T"],
    group_ids: Int[Array, "B"],
    *,
    gamma: float = 0.9,
    weight: float = 0.5,
    scale: Scale = "group",
    eps: float = 1e-6,
    singleton: Singleton = "raw",
    valid: Bool[Array, "B"] | None = None,
) -> Float[Array, "B T"]:
    """`weight * trajectory term + (1 - weight) * turn term` on the tokens of a turn (MatchTIR, 2026).

    The trajectory term is the group-normalized plain sum of a rollout's turn rewards. The turn term is the return
    `G_k = r_k + gamma * G_(k+1)`, normalized over the rollouts of the group that have a turn k; it always divides by
    the std, whatever `scale` says of the first. Options as in `group_normalize`; the released code keeps a lone member
    raw.
    """
    check_shapes(
        turn_rewards=(turn_rewards, "B K"),
        turn_mask=(turn_mask, "B K"),
        turn_ids=(turn_ids, "B T"),
        group_ids=(group_ids, "B"),
        valid=(valid, "B"),
    )
    check_range("weight", weight, 0, 1)
    valid = jnp.ones(group_ids.shape, bool) if valid is None else valid
    turn_mask = turn_mask & valid[:, None]
    num_turns = turn_mask.shape[1]
    trajectory = group_normalize(
        masked_sum(turn_rewards, turn_mask, axis=1), group_ids, valid, scale=scale, eps=eps, singleton=singleton
    )
    turn = group_normalize(
        discounted_returns(turn_rewards, turn_mask, gamma=gamma),
        dense_ids(group_ids)[:, None] * num_turns + jnp.arange(num_turns),
        turn_mask,
        eps=eps,
        singleton=singleton,
    )
    return broadcast_values(select(weight * trajectory[:, None] + (1 - weight) * turn, turn_mask), turn_ids)


def prime_advantages(
    process_rewards: Float[Array, "B T"],
    rewards: Float[Array, "B"],
    mask: Bool[Array, "B T"],
    group_ids: Int[Array, "B"],
    *,
    gamma_process: float = 1.0,
    gamma_outcome: float = 1.0,
    process_weight: float = 1.0,
    outcome_weight: float = 1.0,
    loo: LeaveOneOut = "paper",
    valid: Bool[Array, "B"] | None = None,
) -> Float[Array, "B T"]:
    """Leave-one-out per source, discounted returns, sum of the sources, whitening over the batch (PRIME, Cui et al.
    2025).

    The outcome is the leave-one-out reward on the row's last policy token. The process source, per token:
    - `loo="paper"`: `x - mean of the other rollouts' token means`.
    - `loo="code"`: the release, `x * n / (n - 1) - sum over the group of the token means / (n - 1)`: the paper's form
      plus a term within the rollout that sums to zero over it.

    Args:
      process_rewards: [B, T]
      rewards: [B] outcomes.
      valid: [B], rollouts that were scored; the others are in no baseline and get 0.

    Raises:
      ValueError: a group of one rollout, which has no others (0 under jit, and where only one of a group is valid).
    """
    check_shapes(
        process_rewards=(process_rewards, "B T"),
        rewards=(rewards, "B"),
        mask=(mask, "B T"),
        group_ids=(group_ids, "B"),
        valid=(valid, "B"),
    )
    check_choice("loo", loo, LeaveOneOut)
    check_group_sizes(group_ids, "PRIME's leave-one-out baseline")
    valid = jnp.ones(rewards.shape, bool) if valid is None else valid
    slots, num = dense_ids(group_ids), rewards.shape[0]
    own_mean = select(masked_mean(process_rewards, mask, axis=1), valid)
    members = valid.astype(jnp.float32)
    total, count = (jax.ops.segment_sum(y, slots, num_segments=num)[slots] for y in (own_mean, members))
    keep = mask & (valid & (count > 1))[:, None]
    x = select(process_rewards, keep)
    if loo == "paper":
        x = x - safe_divide(total - own_mean, count - 1)[:, None]
    else:
        x = x * safe_divide(count, count - 1)[:, None] - safe_divide(total, count - 1)[:, None]
    outcome = group_normalize(rewards, group_ids, valid, center="leave_one_out", scale="none")
    outcome_tokens = select(outcome[:, None], last_turn_mask(keep))
    returns = process_weight * reverse_discounted_sum(x, keep, gamma_process) + outcome_weight * reverse_discounted_sum(
        outcome_tokens, keep, gamma_outcome
    )
    return whiten(returns, keep)


def check_group_sizes(group_ids: Int[Array, "B"], what: str) -> None:
    """Raises ValueError where a group has one member; outside jit only, since it looks at the ids."""
    if group_ids.shape[0] == 1:
        raise ValueError(f"{what} needs at least 2 samples per prompt, got one sample")
    if is_concrete(group_ids):
        names, counts = np.unique(np.asarray(group_ids), return_counts=True)
        if np.any(counts == 1):
            raise ValueError(f"{what} needs at least 2 samples per prompt, got one in group {names[counts == 1][0]}")
