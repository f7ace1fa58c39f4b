"""Several rankings of the same documents made into one: by ranks, or by scores that were first brought to one scale.

A ranking is a row. `present` is false where it lacks a document: such a document gets nothing from that row, and one
that no row has comes last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

How = Literal["sum", "max", "min"]
Normalization = Literal["none", "min_max", "z"]


def reciprocal_rank_fusion(
    ranks: Int[Array, "R N"],
    present: Bool[Array, "R N"],
    *,
    k: float = 60,
    first_rank: int = 1,
    weights: Sequence[float] | None = None,
) -> Float[Array, "N"]:
    """Sum over rankings of `1 / (k + rank)` (Cormack, Clarke and Buettcher 2009); higher is better.

    Args:
      ranks: place of each document, 1 the best; what stands where `present` is false does not matter.
      k: the larger, the less the first places count.
      first_rank: what the best place counts as: 1 in the paper, 0 in some toolkits.
      weights: one for each ranking; None for 1 each.

    Raises:
      ValueError: shapes that do not fit, or `k + first_rank` is not positive.
    """
    _check_rows("ranks", ranks, present, weights)
    if k + first_rank <= 0:
        raise ValueError(f"k + first_rank must be positive, got {k} + {first_rank}")
    places = jnp.where(present, ranks, 1) - 1 + first_rank
    terms = jnp.where(present, 1 / (k + places.astype(jnp.float32)), 0)
    return _weighted(terms, weights).sum(axis=0)


def score_fusion(
    scores: Float[Array, "R N"],
    present: Bool[Array, "R N"],
    *,
    how: How = "sum",
    normalize: Normalization = "none",
    weights: Sequence[float] | None = None,
) -> Float[Array, "N"]:
    """One score for each document out of those of several rankings; higher is better (CombSUM, CombMAX and CombMIN of
    Fox and Shaw 1994).

    Args:
      how: the sum, the largest or the smallest over rankings.
      normalize: done for each ranking over its own documents. A document that it lacks then counts as its worst one;
        without normalization as 0.
      weights: one for each ranking, on the normalized scores; None for 1 each.

    Raises:
      ValueError: shapes that do not fit, or an unknown `how` or `normalize`.
    """
    _check_rows("scores", scores, present, weights)
    for name, value, known in (("how", how, get_args(How)), ("normalize", normalize, get_args(Normalization))):
        if value not in known:
            raise ValueError(f"{name} must be one of {list(known)}, got {value!r}")
    values = jnp.where(present, scores, 0).astype(jnp.float32)
    if normalize != "none":
        values = min_max_normalize(values, present) if normalize == "min_max" else z_normalize(values, present)
        worst = jnp.min(jnp.where(present, values, jnp.inf), axis=1, keepdims=True, initial=jnp.inf)
        values = jnp.where(present, values, jnp.where(jnp.isfinite(worst), worst, 0))  # 0 where a ranking is empty
    values = _weighted(values, weights)
    if how == "sum":
        return values.sum(axis=0)
    return values.max(axis=0) if how == "max" else values.min(axis=0)


def min_max_normalize(x: Float[Array, "*S N"], valid: Bool[Array, "*S N"]) -> Float[Array, "*S N"]:
    """Each row mapped linearly so that its lowest valid value is 0 and its highest 1; all 0 if they are equal, and 0
    where `valid` is false."""
    x = x.astype(jnp.float32)
    low = jnp.min(jnp.where(valid, x, jnp.inf), axis=-1, keepdims=True)
    high = jnp.max(jnp.where(valid, x, -jnp.inf), axis=-1, keepdims=True)
    spread = jnp.where(high > low, high - low, 1)
    return jnp.where(valid, jnp.where(valid, x - low, 0) / spread, 0)


def z_normalize(x: Float[Array, "*S N"], valid: Bool[Array, "*S N"]) -> Float[Array, "*S N"]:
    """Each row less the mean of its valid values, over their standard deviation (of the population: ddof 0); all 0 if
    they are equal, and 0 where `valid` is false."""
    x = jnp.where(valid, x, 0).astype(jnp.float32)
    count = jnp.maximum(valid.sum(axis=-1, keepdims=True), 1)
    centered = jnp.where(valid, x - x.sum(axis=-1, keepdims=True) / count, 0)
    deviation = jnp.sqrt((centered**2).sum(axis=-1, keepdims=True) / count)
    # equal values differ from their mean by rounding alone, which must not be blown up to 1
    rounding = 1e-6 * jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    return jnp.where(deviation > rounding, centered / jnp.where(deviation > 0, deviation, 1), 0)


def rankings_as_rows(
    rankings: Sequence[Sequence[int] | Int[np.ndarray, "K"]],
    scores: Sequence[Sequence[float] | Float[np.ndarray, "K"]] | None = None,
    *,
    size: int,
) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "R N"], Float[np.ndarray, "R N"], Bool[np.ndarray, "R N"]]:
    """What the functions above want, from lists of document ids, best first: `(ids, ranks, scores, present)`.

    Args:
      rankings: ids, which may differ in number; a negative one is skipped.
      scores: of the same documents; None for zeros.
      size: `N`. The documents found come first, in the order in which they are met, then ids of -1. The same for every
        call lets what follows be compiled once.

    Raises:
      ValueError: a document occurs twice in a ranking, more documents than `size`, or scores of another length.
    """
    places: dict[int, int] = {}
    ranks = np.zeros((len(rankings), size), np.int32)
    values = np.zeros((len(rankings), size), np.float32)
    present = np.zeros((len(rankings), size), bool)
    for row, ranking in enumerate(rankings):
        row_scores = [0.0] * len(ranking) if scores is None else scores[row]
        if len(row_scores) != len(ranking):
            raise ValueError(f"ranking {row} has {len(ranking)} documents and {len(row_scores)} scores")
        found = [(int(document), score) for document, score in zip(ranking, row_scores, strict=True) if document >= 0]
        for rank, (document, score) in enumerate(found, 1):
            place = places.setdefault(document, len(places))
            if place >= size:
                raise ValueError(f"the rankings hold more than size={size} different documents; raise size")
            if present[row, place]:
                raise ValueError(f"ranking {row} names document {document} twice")
            ranks[row, place], values[row, place], present[row, place] = rank, score, True
    ids = np.full(size, -1, np.int32)
    ids[: len(places)] = list(places)
    return ids, ranks, values, present


def _weighted(values: Float[Array, "R N"], weights: Sequence[float] | None) -> Float[Array, "R N"]:
    return values if weights is None else values * jnp.asarray(weights, jnp.float32)[:, None]


def _check_rows(name: str, rows: Array, present: Array, weights: Sequence[float] | None) -> None:
    if rows.ndim != 2 or rows.shape != present.shape:
        raise ValueError(f"{name} and present must both be [R, N], got {rows.shape} and {present.shape}")
    if weights is not None and len(weights) != rows.shape[0]:
        raise ValueError(f"weights must be one for each of the {rows.shape[0]} rankings, got {len(weights)}")
