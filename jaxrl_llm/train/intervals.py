"""Bootstrap intervals for a mean over seeds, and over held-out questions where their outcomes are known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

RESAMPLES = 10_000
CHUNK = 1_000  # resamples at a time, to bound memory


class Interval(NamedTuple):
    """A mean with the ends of its interval; these are None where nothing could be resampled (one seed, no
    questions)."""

    mean: float
    low: float | None
    high: float | None


def bootstrap_mean(values: Float[np.ndarray, "S"] | Float[np.ndarray, "S N"], level: float = 0.95) -> Interval:
    """Percentile interval of the mean (Efron & Tibshirani 1993, ch. 13), the same for the same numbers at each call.

    With `[S]`, seeds are drawn with replacement. With `[S, N]` (outcome of question n under seed s), seeds and
    questions are each drawn with replacement, the same questions for all seeds: the bootstrap of a two-way table (Owen
    2007, "The pigeonhole bootstrap"), which errs on the wide side. With one seed the questions alone are drawn.

    For a paired comparison pass the differences: pairs then stay together.

    Raises:
      ValueError: no values, more than two axes, or values that are not finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim not in (1, 2) or values.size == 0 or not np.all(np.isfinite(values)):
        raise ValueError(f"expected finite values [S] or [S, N], got shape {values.shape}: {values}")
    table = values.reshape(len(values), -1)
    num_seeds, num_questions = table.shape
    mean = float(table.mean())
    if num_seeds == 1 and num_questions == 1:
        return Interval(mean, None, None)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES // CHUNK):
        seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=CHUNK) / num_seeds
        questions = rng.multinomial(num_questions, np.full(num_questions, 1 / num_questions), size=CHUNK)
        means.append(np.sum((seeds @ table) * questions, axis=1) / num_questions)
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    # The quantiles of equal numbers can differ from them by rounding.
    return Interval(mean, min(float(low), mean), max(float(high), mean))


def judge(difference: Interval, by: float = 0.0) -> str:
    """Whether a mean difference is above `by`: "holds", "does not hold" (it is at most `by`) or "undecided"."""
    if difference.low is None or difference.high is None:
        return "undecided"
    if difference.low > by:
        return "holds"
    return "does not hold" if difference.high <= by else "undecided"


def describe(num_seeds: int, num_questions: int | None) -> str:
    """What an interval of `bootstrap_mean` covers, and what it does not, in a sentence or two for a table's foot."""
    if num_questions is not None:
        if num_seeds == 1:
            return (
                f"Intervals: 95% bootstrap over {num_questions} held-out questions of one seed. "
                "They say nothing about another seed."
            )
        return (
            f"Intervals: 95% bootstrap over {num_seeds} seeds and {num_questions} held-out questions, "
            "drawn independently." + _few(num_seeds)
        )
    if num_seeds == 1:
        return "One seed and no outcomes of single questions: no interval, and no claim is decided."
    return f"Intervals: 95% bootstrap over {num_seeds} seeds.{_few(num_seeds)}"


def _few(num_seeds: int) -> str:
    if num_seeds > 9:
        return ""
    # Range of n draws: it misses the median when all fall on one side of it, with probability 2 * 2^-n.
    coverage = 1 - 2 * 0.5**num_seeds
    return (
        f" With so few seeds no interval over seeds can be wider than from the smallest to the largest of the "
        f"{num_seeds} values, which holds the median of all seeds with probability {coverage:.0%}: read 95% with that "
        "in mind."
    )
