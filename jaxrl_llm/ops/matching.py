"""Overlap of sets, answers and boxes, as scores in [0, 1]. On text: `jaxrl_llm.rewards`."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.ops._checks import check_range, check_shapes
from jaxrl_llm.ops.masked import safe_divide, select


def fbeta(precision: Float[Array, "..."], recall: Float[Array, "..."], *, beta: float = 1.0) -> Float[Array, "..."]:
    """`(1 + beta^2) * P * R / (beta^2 * P + R)`, 0 where both are 0; recall weighs `beta` times as much."""
    check_shapes(precision=(precision, "..."), recall=(recall, "..."))
    check_range("beta", beta, 0, open_low=True)
    precision, recall = precision.astype(jnp.float32), recall.astype(jnp.float32)
    return safe_divide((1 + beta**2) * precision * recall, beta**2 * precision + recall)


def set_fscore(
    pred: Bool[Array, "... A"], gold: Bool[Array, "... A"], *, beta: float = 1.0, empty: float = 0.0
) -> Float[Array, "..."]:
    """F-beta of two sets, each a row that says which of A elements are in it: labels, or the tokens of a span.

    `empty` is the score where neither has an element; where one alone has none it is 0. Facial-R1's reward is
    `2 * F - 1`.
    """
    check_shapes(pred_mask=(pred, "... A"), gold_mask=(gold, "... A"))
    both, named, wanted = (jnp.sum(x, axis=-1, dtype=jnp.float32) for x in (pred & gold, pred, gold))
    score = fbeta(safe_divide(both, named), safe_divide(both, wanted), beta=beta)
    return jnp.where(named + wanted > 0, score, empty)


def box_iou(a: Float[Array, "... 4"], b: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """Intersection over union of boxes (x1, y1, x2, y2); 0 where both are empty. Leading axes broadcast, so that
    `box_iou(a[:, None], b)` compares all pairs. A box whose second corner lies before its first is empty."""
    if a.shape[-1:] != (4,) or b.shape[-1:] != (4,):
        raise ValueError(f"boxes must have 4 coordinates on the last axis, got {list(a.shape)} and {list(b.shape)}")
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)

    def area(low: Float[Array, "... 2"], high: Float[Array, "... 2"]) -> Float[Array, "..."]:
        return jnp.prod(jnp.maximum(high - low, 0), axis=-1)

    shared = area(jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:]))
    return safe_divide(shared, area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - shared)


def exact_match_ids(
    pred: Int[Array, "B L"], pred_mask: Bool[Array, "B L"], gold: Int[Array, "B G M"], gold_mask: Bool[Array, "B G M"]
) -> Float[Array, "B"]:
    """1 where the true tokens of `pred`, in order, are those of one of the G golds; a gold without tokens is none."""
    _check_answers(pred, pred_mask, gold, gold_mask)
    place, gold_place = (jnp.cumsum(mask, axis=-1) for mask in (pred_mask, gold_mask))
    there = pred_mask[:, None, :, None] & gold_mask[..., None, :]
    aligned = there & (place[:, None, :, None] == gold_place[..., None, :])
    differs = jnp.any(aligned & (pred[:, None, :, None] != gold[..., None, :]), axis=(-2, -1))
    length = jnp.sum(gold_mask, axis=-1)
    same = ~differs & (length == jnp.sum(pred_mask, axis=-1)[:, None]) & (length > 0)
    return jnp.any(same, axis=-1).astype(jnp.float32)


def token_f1_ids(
    pred: Int[Array, "B L"], pred_mask: Bool[Array, "B L"], gold: Int[Array, "B G M"], gold_mask: Bool[Array, "B G M"]
) -> Float[Array, "B"]:
    """Largest F1 of the tokens of `pred` with those of a gold, as multisets; 0 without tokens on either side."""
    _check_answers(pred, pred_mask, gold, gold_mask)
    same = (pred[:, :, None] == pred[:, None, :]) & pred_mask[:, None, :]
    # the n-th of equal tokens counts if the gold has n of them
    number = jnp.sum(jnp.tril(same), axis=-1)
    in_gold = jnp.sum((pred[:, None, :, None] == gold[..., None, :]) & gold_mask[..., None, :], axis=-1)
    shared = jnp.sum(pred_mask[:, None] & (number[:, None] <= in_gold), axis=-1, dtype=jnp.float32)
    sizes = jnp.sum(pred_mask, axis=-1)[:, None] + jnp.sum(gold_mask, axis=-1)
    return jnp.max(select(safe_divide(2 * shared, sizes), shared > 0), axis=-1, initial=0.0)


def _check_answers(pred: Array, pred_mask: Array, gold: Array, gold_mask: Array) -> None:
    check_shapes(
        pred_ids=(pred, "B L"),
        pred_mask=(pred_mask, "B L"),
        gold_ids=(gold, "B G M"),
        gold_mask=(gold_mask, "B G M"),
    )
