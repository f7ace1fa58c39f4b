"""Statistics over groups of samples: a prompt's rollouts, the turns with one number, the children of a tree node.

A group is the set of entries with one id; ids are any integers, of the same shape as the values. Entries that are not
valid (an unscorable reward, a turn that did not happen) are in no statistic and get 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.ops._checks import check_choice, check_range, check_shapes, is_concrete
from jaxrl_llm.ops.masked import all_if_none, dense_ids, safe_divide, select

Center = Literal["none", "group", "batch", "leave_one_out"]
Scale = Literal["none", "group", "batch"]
StdOf = Literal["raw", "centered"]
Singleton = Literal["zero", "raw"]
Reduction = Literal["mean", "sum", "max", "min"]
EpsIn = Literal["var", "std"]


def segment_reduce(
    x: Float[Array, "M"],
    ids: Int[Array, "M"],
    num: int,
    *,
    how: Reduction = "mean",
    valid: Bool[Array, "M"] | None = None,
) -> Float[Array, "num"]:
    """Mean, sum, max or min of the valid entries with id k, in slot k of `num`. An empty slot is 0; an id outside
    `0..num-1` (such as -1 for none) is left out."""
    check_shapes(x=(x, "M"), ids=(ids, "M"), valid=(valid, "M"))
    check_choice("how", how, Reduction)
    check_range("num", num, 1)
    inside = (ids >= 0) & (ids < num)
    valid = inside if valid is None else inside & valid
    slots = jnp.where(valid, ids, 0)
    count = jax.ops.segment_sum(valid.astype(jnp.float32), slots, num_segments=num)
    if how in ("max", "min"):
        reduce, empty = (jax.ops.segment_max, -jnp.inf) if how == "max" else (jax.ops.segment_min, jnp.inf)
        return select(reduce(select(x, valid, empty), slots, num_segments=num), count > 0)
    total = jax.ops.segment_sum(select(x, valid), slots, num_segments=num)
    return total if how == "sum" else safe_divide(total, count)


def group_stats(
    x: Float[Array, "..."], ids: Int[Array, "..."], valid: Bool[Array, "..."] | None = None, *, ddof: int = 1
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """(mean, std, count) of the valid members of a group, handed back to every member, valid or not.

    The std divides by `count - ddof` and is 0 where that is not positive.
    """
    check_shapes(x=(x, "..."), ids=(ids, "..."), valid=(valid, "..."))
    stats = _stats(x, dense_ids(ids), all_if_none(valid, x), ddof)
    return stats.mean, _safe_sqrt(stats.var), stats.number


def group_normalize(
    x: Float[Array, "..."],
    ids: Int[Array, "..."],
    valid: Bool[Array, "..."] | None = None,
    *,
    center: Center = "group",
    scale: Scale = "group",
    std_of: StdOf = "raw",
    ddof: int = 1,
    eps: float = 1e-6,
    var_eps: float = 0.0,
    singleton: Singleton = "zero",
) -> Float[Array, "..."]:
    """The baseline of the group methods: `(x - mean) / (sqrt(var + var_eps) + eps)`, each level chosen apart.

    Args:
      x: values, any shape, e.g. rewards [B].
      ids: group of each value, any integers, the same shape.
      valid: the values that exist; default all. The others get 0 and are in no mean, std or count.
      center: subtract nothing, the mean of the group, of the batch, or of the other members ("leave_one_out").
      scale: divide by nothing, by the std of the group, or of the batch.
      std_of: the std is that of the values ("raw") or of the centered values ("centered"), which differ for the batch.
      ddof: the std divides by count - ddof.
      eps, var_eps: added to the std; added to the variance under the root.
      singleton: a lone member of a group gets 0 ("zero"), or its group has mean 0 and std 1 ("raw", as verl).

    A group (or batch) without any spread gives exactly 0 at that level, never rounding noise over eps; the rule looks
    at the set that the mean or std is taken over. GRPO (Shao et al. 2024): the defaults. Dr. GRPO (Liu et al. 2025):
    scale "none". RLOO (Ahmadian et al. 2024): center "leave_one_out", scale "none". Lite PPO (Liu et al. 2025): scale
    "batch".

    Raises:
      ValueError: unknown option, negative eps, or one value with scale "batch", whose std is undefined.
    """
    check_shapes(x=(x, "..."), ids=(ids, "..."), valid=(valid, "..."))
    check_choice("center", center, Center)
    check_choice("scale", scale, Scale)
    check_choice("std_of", std_of, StdOf)
    check_choice("singleton", singleton, Singleton)
    check_range("eps", eps, 0)
    check_range("var_eps", var_eps, 0)
    if scale == "batch" and x.size == 1:
        raise ValueError(f'scale="batch" needs at least 2 values for a std, got x of shape {list(x.shape)}')
    valid = all_if_none(valid, x)
    groups = dense_ids(ids)
    slots = {"group": groups, "leave_one_out": groups, "batch": None}
    x, keep = select(x, valid), valid

    centered = x
    if center != "none":
        stats = _stats(x, slots[center], valid, ddof)
        raw = (stats.number == 1) if singleton == "raw" and center != "batch" else jnp.zeros_like(valid)
        keep &= stats.spread | raw
        centered = x - jnp.where(raw, 0, stats.mean)
        if center == "leave_one_out":  # x - mean of the others = n / (n - 1) * (x - mean)
            centered *= jnp.where(stats.number > 1, safe_divide(stats.number, stats.number - 1), 1)
        centered = select(centered, keep)

    if scale != "none":
        stats = _stats(x if std_of == "raw" else centered, slots[scale], valid, ddof)
        raw = (stats.number == 1) if singleton == "raw" and scale != "batch" else jnp.zeros_like(valid)
        keep &= stats.spread | raw
        std = jnp.where(raw, 1, _safe_sqrt(stats.var + var_eps))
        centered = safe_divide(centered, std + eps)
    return select(centered, keep)


def masked_whiten(
    x: Float[Array, "B *rest"],
    mask: Bool[Array, "B *rest"],
    *,
    ids: Int[Array, "B"] | None = None,
    ddof: int = 1,
    eps: float = 1e-8,
    eps_in: EpsIn = "var",
) -> Float[Array, "B *rest"]:
    """`(x - mean) / sqrt(var + eps)` over ALL true entries of the batch, or over those with one id; 0 outside the mask.

    Args:
      x, mask: values and the entries that count, one shape. A long sequence weighs by its entries.
      ids: [B] of the leading axis, or of the shape of `x`; each id is whitened apart (a role, a source).
      eps_in: "var" adds eps under the root (verl), "std" to the std (AReaL, with ddof 0 and eps 1e-5).

    Without spread the result is exactly 0.

    Raises:
      ValueError: fewer than two true entries, which have no variance. Under jit, where values cannot be looked at, the
        result is zeros.
    """
    check_shapes(x=(x, "..."), mask=(mask, "..."))
    check_choice("eps_in", eps_in, EpsIn)
    check_range("eps", eps, 0)
    if ids is None and is_concrete(mask) and (count := int(np.sum(np.asarray(mask)))) < 2:
        raise ValueError(
            f"whitening needs at least 2 true entries of mask, got {count}; "
            "a batch this small has no variance: collect more samples"
        )
    return whiten(x, mask, ids=ids, ddof=ddof, eps=eps, eps_in=eps_in)


def whiten(
    x: Float[Array, "..."],
    mask: Bool[Array, "..."],
    *,
    ids: Int[Array, "..."] | None = None,
    ddof: int = 1,
    eps: float = 1e-8,
    eps_in: EpsIn = "var",
) -> Float[Array, "..."]:
    """`masked_whiten` for ops that define fewer than two entries as 0."""
    if ids is not None and ids.shape != x.shape[: ids.ndim]:
        raise ValueError(f"ids must have the leading shape of x, {list(x.shape)}, got {list(ids.shape)}")
    stats = _stats(x, None if ids is None else dense_ids(ids), mask, ddof)
    std = jnp.sqrt(stats.var + eps) if eps_in == "var" else _safe_sqrt(stats.var) + eps
    return select(safe_divide(select(x, mask) - stats.mean, std), mask & stats.spread)


def informative_group_scale(
    rewards: Float[Array, "B"], ids: Int[Array, "B"], valid: Bool[Array, "B"] | None = None
) -> Float[Array, ""]:
    """Groups over groups with any spread: keeps the size of a batch's gradient when few groups carry signal.

    Groups without a valid member do not count. If no group has spread (every advantage is 0), the number of groups.
    """
    check_shapes(rewards=(rewards, "B"), ids=(ids, "B"), valid=(valid, "B"))
    valid = all_if_none(valid, rewards)
    stats = _stats(rewards, dense_ids(ids), valid, 1)
    share = safe_divide(valid.astype(jnp.float32), stats.number)  # the shares of a group's members sum to 1
    return jnp.sum(share) / jnp.maximum(jnp.sum(select(share, stats.spread)), 1)


def first_occurrence_mask(ids: Int[Array, "... N"], valid: Bool[Array, "... N"] | None = None) -> Bool[Array, "... N"]:
    """True at the first of equal ids along the last axis, among the valid ones; for lists, as it compares all pairs."""
    check_shapes(ids=(ids, "... N"), valid=(valid, "... N"))
    valid = all_if_none(valid, ids)
    earlier = jnp.tril(jnp.ones((ids.shape[-1],) * 2, bool), -1)
    same = (ids[..., :, None] == ids[..., None, :]) & valid[..., None, :]
    return valid & ~jnp.any(same & earlier, axis=-1)


def group_spread_mask(
    x: Float[Array, "..."], ids: Int[Array, "..."], valid: Bool[Array, "..."] | None = None
) -> Bool[Array, "..."]:
    """True for the valid members of a group in which two valid values differ."""
    valid = all_if_none(valid, x)
    return valid & _stats(x, dense_ids(ids), valid, 1).spread


class _Stats(NamedTuple):
    mean: Float[Array, "..."]
    var: Float[Array, "..."]
    number: Float[Array, "..."]
    spread: Bool[Array, "..."]  # whether two valid members differ; a variance cannot say, since it rounds


def _stats(x: Float[Array, "..."], slots: Int[Array, "..."] | None, valid: Bool[Array, "..."], ddof: int) -> _Stats:
    """Statistics of each slot, handed back to every entry in it; one slot of all entries if `slots` is None.

    `slots`, below their number, have the leading shape of `x`, whose other axes are summed first: thousands of tokens
    are added up by a tree and not one after the other into a slot, which is slow on accelerators and loses digits.
    """

    def per_slot(reduce: Callable[..., Array], segment: Callable[..., Array], y: Array) -> Array:
        if slots is None:
            return jnp.broadcast_to(reduce(y), x.shape)
        reduced = reduce(y.reshape(slots.size, -1), axis=1)
        handed_back = segment(reduced, slots.ravel(), num_segments=slots.size)[slots]
        return jnp.broadcast_to(handed_back.reshape(slots.shape + (1,) * (x.ndim - slots.ndim)), x.shape)

    def total(y: Float[Array, "..."]) -> Float[Array, "..."]:
        return per_slot(jnp.sum, jax.ops.segment_sum, y)

    values, members = select(x, valid), valid.astype(jnp.float32)
    count = total(members)
    mean = safe_divide(total(values), count)
    var = safe_divide(total(select((values - mean) ** 2, valid)), count - ddof)
    fixed = jax.lax.stop_gradient(values)
    largest = per_slot(partial(jnp.max, initial=-jnp.inf), jax.ops.segment_max, select(fixed, valid, -jnp.inf))
    smallest = per_slot(partial(jnp.min, initial=jnp.inf), jax.ops.segment_min, select(fixed, valid, jnp.inf))
    return _Stats(mean, var, count, largest > smallest)


def _safe_sqrt(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The root with gradient 0 instead of infinity at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)
