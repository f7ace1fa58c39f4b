"""Which samples to train on: masks, weights, draws and pairs, by their scores.

Candidates lie on the last axis, `[..., N]` with `valid[..., N]`, or are flat with `group_ids`. Nothing here has a
gradient.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm.ops._checks import check_choice, check_range, check_shapes
from jaxrl_llm.ops.groups import group_spread_mask
from jaxrl_llm.ops.masked import all_if_none, dense_ids, masked_softmax, safe_divide, select

FilterStrategy = Literal["best_random", "best_worst", "best", "power", "all"]
DrawMethod = Literal["multinomial", "systematic"]
Transform = Literal["softmax", "proportional", "rank"]
Rejected = Literal["worst", "second", "random"]


def dynamic_sampling_mask(
    rewards: Float[Array, "B"], group_ids: Int[Array, "B"], valid: Bool[Array, "B"] | None = None
) -> Bool[Array, "B"]:
    """DAPO's dynamic sampling (Yu et al. 2025, section 3.2): true for the members of a group whose rewards are not all
    equal, the others having no gradient to give. A sample that is not valid decides nothing and is not kept."""
    check_shapes(rewards=(rewards, "B"), group_ids=(group_ids, "B"), valid=(valid, "B"))
    return group_spread_mask(rewards, group_ids, valid)


def pass_rate_mask(
    rates: Float[Array, "..."],
    valid: Bool[Array, "..."] | None = None,
    *,
    low: float = 0.0,
    high: float = 1.0,
    closed: bool = False,
) -> Bool[Array, "..."]:
    """Problems whose rate of success lies inside a band: `low < rate < high`, or with `closed` `low <= rate <= high`.

    The default keeps what is neither always nor never solved; `low=-1` keeps what is never solved too; `high=0.001,
    closed=True` asks for that alone. NaN, the rate of a problem that was never tried, is in no band.
    """
    check_shapes(rates=(rates, "..."), valid=(valid, "..."))
    if not low <= high:
        raise ValueError(f"low must be at most high, got low={low} and high={high}")
    inside = (rates >= low) & (rates <= high) if closed else (rates > low) & (rates < high)
    return inside if valid is None else inside & valid


def top_k_select(
    scores: Float[Array, "... N"], valid: Bool[Array, "... N"] | None = None, *, k: int
) -> tuple[Int[Array, "... k"], Float[Array, "... k"]]:
    """(ids, weight) of the `k` highest scores, the best first, of equal ones the first.

    Fewer than k valid: the ids go on with entries that are not, at weight 0 instead of 1. No id comes twice. For the
    hardest problems score by minus the pass rate.

    Raises:
      ValueError: `k` outside 1..N.
    """
    check_shapes(scores=(scores, "... N"), valid=(valid, "... N"))
    check_range("k", k, 1, scores.shape[-1])
    valid = all_if_none(valid, scores)
    ids = _best_first(scores, valid)[..., :k]
    return ids, jnp.take_along_axis(valid, ids, axis=-1).astype(jnp.float32)


def top_fraction_mask(
    scores: Float[Array, "... N"], valid: Bool[Array, "... N"] | None = None, *, fraction: float, min_keep: int = 0
) -> Bool[Array, "... N"]:
    """True for the `max(min_keep, ceil(fraction * n))` highest of n valid scores, of equal ones the first."""
    check_shapes(scores=(scores, "... N"), valid=(valid, "... N"))
    check_range("fraction", fraction, 0, 1)
    check_range("min_keep", min_keep, 0)
    valid = all_if_none(valid, scores)
    # Counted in float64 for every n there may be: in float32 0.2 * 5 may come out above 1.
    kept = np.maximum(np.ceil(fraction * np.arange(scores.shape[-1] + 1) - 1e-9).astype(np.int32), min_keep)
    count = jnp.asarray(kept)[jnp.sum(valid, axis=-1, keepdims=True)]
    return valid & (_ranks(scores, valid) < count)


def score_probs(
    scores: Float[Array, "... N"],
    valid: Bool[Array, "... N"] | None = None,
    *,
    transform: Transform = "softmax",
    temperature: float = 1.0,
) -> Float[Array, "... N"]:
    """With which probability each candidate is drawn: `softmax(score / temperature)`, `score^(1 / temperature)`
    ("proportional", for scores from 0 on) or `rank^(-1 / temperature)` ("rank", the highest score first, as prioritized
    level replay), over what is valid.

    Scores that are all 0 are drawn evenly under "proportional"; a row with nothing valid is 0. Kimi k1.5 draws in
    proportion to `1 - success`, QwenLong-L1 to the inverse of the mean reward.
    """
    check_shapes(scores=(scores, "... N"), valid=(valid, "... N"))
    check_choice("transform", transform, Transform)
    check_range("temperature", temperature, 0, open_low=True)
    valid = all_if_none(valid, scores)
    if transform == "softmax":
        return jax.lax.stop_gradient(masked_softmax(scores, valid, temperature=temperature))
    base = jnp.maximum(select(scores, valid), 0) if transform == "proportional" else 1 / (1.0 + _ranks(scores, valid))
    weights = select(base ** (1 / temperature), valid)
    weights = jnp.where(jnp.sum(weights, axis=-1, keepdims=True) > 0, weights, valid.astype(jnp.float32))
    return jax.lax.stop_gradient(safe_divide(weights, jnp.sum(weights, axis=-1, keepdims=True)))


def resample_indices(
    key: Key[Array, ""],
    weights: Float[Array, "... N"],
    num: int,
    *,
    method: DrawMethod = "multinomial",
    valid: Bool[Array, "... N"] | None = None,
) -> Int[Array, "... num"]:
    """`num` draws with replacement from each row, in proportion to weights from 0 on; -1 where a row has none above 0.

    "systematic" cuts the row's distribution at a comb of evenly spaced places with one random offset, so that an entry
    of probability p comes `num * p` times, rounded up or down, and in order.
    """
    check_shapes(weights=(weights, "... N"), valid=(valid, "... N"))
    check_range("num", num, 1)
    check_choice("method", method, DrawMethod)
    weights = jnp.maximum(select(weights, all_if_none(valid, weights)), 0)
    rows = weights.shape[:-1]
    if method == "systematic":
        places = (jax.random.uniform(key, (*rows, 1)) + jnp.arange(num)) / num
    else:
        places = jax.random.uniform(key, (*rows, num))
    ends = jnp.cumsum(weights, axis=-1)
    # An entry of weight 0 ends where the one before it does, so that no place falls into it.
    drawn = jnp.sum(ends[..., None, :] <= (places * ends[..., -1:])[..., None], axis=-1)
    last = weights.shape[-1] - 1 - jnp.argmax(jnp.flip(weights, -1) > 0, axis=-1, keepdims=True)
    return jnp.where(ends[..., -1:] > 0, jnp.minimum(drawn, last), -1)  # a place may round up to the very end


def reward_filter_weights(
    rewards: Float[Array, "B"],
    group_ids: Int[Array, "B"],
    valid: Bool[Array, "B"] | None = None,
    *,
    strategy: FilterStrategy = "best_random",
    power: float = 2.0,
) -> Float[Array, "B"]:
    """Weights of a group's samples by how far their rewards can be trusted, summing to 1 in each group (PF-PPO, 2024).

    | `strategy`      | in proportion to                                |
    | --------------- | ----------------------------------------------- |
    | `"best_random"` | 0.4 for the best sample, 0.1 for every other    |
    | `"best_worst"`  | 1 for the best and the worst, 0 for the others  |
    | `"best"`        | 1 for the best                                  |
    | `"power"`       | `|reward| ** power`; all alike if all are 0     |
    | `"all"`         | 1                                               |

    Of equal rewards the last is best and the first is worst, so that even a group of equals has a pair. A lone sample
    has weight 1.
    """
    check_shapes(rewards=(rewards, "B"), group_ids=(group_ids, "B"), valid=(valid, "B"))
    check_choice("strategy", strategy, FilterStrategy)
    valid = all_if_none(valid, rewards)
    rows, members = jnp.arange(rewards.shape[0]), valid.astype(jnp.float32)
    best = (extreme_row(rewards, group_ids, valid, largest=True, last=True) == rows).astype(jnp.float32)
    if strategy == "best_random":
        weights = 0.1 + 0.3 * best
    elif strategy == "best_worst":
        weights = best + (extreme_row(rewards, group_ids, valid) == rows)
    elif strategy == "best":
        weights = best
    else:
        weights = jnp.abs(select(rewards, valid)) ** power if strategy == "power" else members
    slots, weights = dense_ids(group_ids), jax.lax.stop_gradient(select(weights, valid))
    total, count = (jax.ops.segment_sum(y, slots, num_segments=len(rows))[slots] for y in (weights, members))
    return jnp.where(total > 0, safe_divide(weights, total), safe_divide(members, count))


def shortest_correct(
    lengths: Int[Array, "B"], correct: Bool[Array, "B"], group_ids: Int[Array, "B"]
) -> Int[Array, "B"]:
    """The row of the shortest right answer of a group, of equal ones the first, handed to every member of the group; -1
    where none is right. The rows to train on are those where it is the row itself."""
    check_shapes(lengths=(lengths, "B"), correct=(correct, "B"), group_ids=(group_ids, "B"))
    return extreme_row(lengths, group_ids, correct)


def best_worst_pairs(
    scores: Float[Array, "... N"],
    valid: Bool[Array, "... N"] | None = None,
    *,
    key: Key[Array, ""] | None = None,
    rejected: Rejected = "worst",
    min_gap: float = 0.0,
    baseline: Float[Array, "..."] | float | None = None,
) -> tuple[Int[Array, "..."], Int[Array, "..."], Bool[Array, "..."]]:
    """(chosen, rejected, keep): the best candidate of each row, of equal ones the first, against another one.

    Args:
      key: for `rejected="random"`.
      rejected: the "worst" (of equal ones the first), the "second" best, or a "random" one of the others.
      min_gap: `keep` is false unless the scores differ by more than this.
      baseline: `keep` is false unless the best score is above this, a number or one per row.

    Raises:
      ValueError: fewer than 2 candidates, or "random" without a key.
    """
    check_shapes(scores=(scores, "... N"), valid=(valid, "... N"))
    check_choice("rejected", rejected, Rejected)
    check_range("min_gap", min_gap, 0)
    if scores.shape[-1] < 2:
        raise ValueError(f"a pair needs at least 2 candidates, got scores of shape {list(scores.shape)}")
    valid = all_if_none(valid, scores)
    order = _best_first(scores, valid)
    chosen = order[..., 0]
    if rejected == "worst":
        other = jnp.argmin(jnp.where(valid, scores, jnp.inf), axis=-1)
    elif rejected == "second":
        other = order[..., 1]
    elif key is None:
        raise ValueError('rejected="random" needs a key, got None')
    else:
        rivals = valid & (jnp.arange(scores.shape[-1]) != chosen[..., None])
        other = jnp.argmax(jnp.where(rivals, jax.random.uniform(key, scores.shape), -1.0), axis=-1)
    high, low = (jnp.take_along_axis(select(scores, valid), ids[..., None], -1)[..., 0] for ids in (chosen, other))
    keep = (jnp.sum(valid, axis=-1) >= 2) & (high - low > min_gap)
    return chosen, other, keep if baseline is None else keep & (high > baseline)


def extreme_row(
    x: Float[Array, "B"] | Int[Array, "B"],
    group_ids: Int[Array, "B"],
    valid: Bool[Array, "B"],
    *,
    largest: bool = False,
    last: bool = False,
) -> Int[Array, "B"]:
    """The row of a group's smallest (or `largest`) valid value, the first (or `last`) of equal ones, handed to every
    member; -1 where nothing is valid."""
    slots, rows = dense_ids(group_ids), jnp.arange(x.shape[0])
    values = select(-x if largest else x, valid, jnp.inf)
    least = jax.ops.segment_min(values, slots, num_segments=len(rows))[slots]
    reduce, none = (jax.ops.segment_max, -1) if last else (jax.ops.segment_min, len(rows))
    found = reduce(jnp.where(valid & (values == least), rows, none), slots, num_segments=len(rows))[slots]
    return jnp.where(found < len(rows), found, -1)


def _best_first(scores: Float[Array, "... N"], valid: Bool[Array, "... N"]) -> Int[Array, "... N"]:
    """Places by falling score, equal ones in order, what is not valid at the end."""
    return jnp.lexsort((-select(scores, valid), ~valid), axis=-1)


def _ranks(scores: Float[Array, "... N"], valid: Bool[Array, "... N"]) -> Int[Array, "... N"]:
    """0 for the best."""
    return jnp.argsort(_best_first(scores, valid), axis=-1)
