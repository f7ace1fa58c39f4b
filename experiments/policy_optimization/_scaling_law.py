"""The law of `cpt_scaling_law`, on the host: its values, its fit, its best landscape, and the chunks next to that."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


class Law(NamedTuple):
    """The parameters of the law."""

    e: float
    d_c: float
    alpha: float
    a0: float = 0.0
    a1: float = 0.0
    b0: float = 0.0
    b1: float = 0.0


def predict_loss(theta: Law, mu: Any, sigma: Any, tokens: Any) -> Float[np.ndarray, "..."]:
    """The law's loss in nats per token."""
    mu, sigma, tokens = (np.asarray(x, np.float64) for x in (mu, sigma, tokens))
    exponents = (theta.a0 + theta.a1 * sigma) * np.log(mu) + (theta.b0 + theta.b1 * mu) * np.log(sigma)
    return theta.e + theta.d_c * np.exp(-exponents - theta.alpha * np.log(tokens))


def fit_scaling_law(
    mu: Float[np.ndarray, "R"],
    sigma: Float[np.ndarray, "R"],
    tokens: Float[np.ndarray, "R"],
    loss: Float[np.ndarray, "R"],
    *,
    e_grid: Float[np.ndarray, "M"],
    classical: bool = False,
) -> Law:
    """The law, or the classical one, that fits R runs best; with `alpha` at least 1e-3.

    Raises:
      ValueError: fewer than 7 runs, a `sigma` that is not positive, or no E of the grid that is positive and below the
        least loss.
    """
    mu, sigma, tokens, loss = (np.asarray(x, np.float64) for x in (mu, sigma, tokens, loss))
    grid = [e for e in np.asarray(e_grid, np.float64) if 0 < e < loss.min()]
    if len(loss) < 7 or sigma.min() <= 0 or not grid:
        raise ValueError(
            f"a fit needs at least 7 runs, got {len(loss)}; sigma above 0, the least is {sigma.min():g}; and some E of "
            f"e_grid above 0 and below the least loss {loss.min():g}, the grid's least is {np.min(e_grid):g}"
        )
    landscape = [np.log(mu), sigma * np.log(mu), np.log(sigma), mu * np.log(sigma)]
    columns = np.column_stack([np.ones_like(mu), np.log(tokens), *([] if classical else landscape)])
    best, least = None, np.inf
    for e in grid:
        found = np.linalg.lstsq(columns, np.log(loss - e), rcond=None)[0]
        if found[1] > -1e-3:  # more tokens must not hurt: fixed there, and the rest fitted again
            rest = np.delete(columns, 1, axis=1)
            others = np.linalg.lstsq(rest, np.log(loss - e) + 1e-3 * columns[:, 1], rcond=None)[0]
            found = np.insert(others, 1, -1e-3)
        law = Law(float(e), float(np.exp(found[0])), *(-found[1:]).tolist())
        if (error := np.sum((predict_loss(law, mu, sigma, tokens) - loss) ** 2)) < least:
            best, least = law, error
    assert best is not None  # the errors are finite
    return best


def best_landscape(
    theta: Law, ppl: Float[np.ndarray, "N"], budget: float, *, windows: Float[np.ndarray, "W 2"]
) -> tuple[float, float]:
    """Mean and standard deviation of that window, between two quantiles of the pool, of which the law expects the least
    loss after `budget` tokens."""
    inside = [window_chunks(ppl, window) for window in windows]
    pairs = np.array([[ppl[chunks].mean(), ppl[chunks].std()] for chunks in inside])
    mu, sigma = pairs[np.argmin(predict_loss(theta, pairs[:, 0], pairs[:, 1], budget))]
    return float(mu), float(sigma)


def window_chunks(ppl: Float[np.ndarray, "N"], window: Float[np.ndarray, "2"]) -> Int[np.ndarray, "M"]:
    """The chunks between two quantiles of perplexity, by rank."""
    low, high = np.round(np.asarray(window) * len(ppl)).astype(int)
    return np.argsort(ppl, kind="stable")[low:high]


def distance_to_optimum_select(
    ppl: Float[np.ndarray, "N"],
    lengths: Int[np.ndarray, "N"],
    mu: float,
    sigma: float,
    *,
    budget: int,
    match_spread: bool = False,
    rng: np.random.Generator | None = None,
) -> Bool[np.ndarray, "N"]:
    """Chunks by rising `|ppl - mu| / sigma` until they hold `budget` tokens; or, with `match_spread`, drawn so that
    their perplexities are normal with that mean and spread as far as the pool allows."""
    order = np.argsort(np.abs(ppl - mu) / sigma, kind="stable")
    if match_spread:
        edges = np.unique(np.quantile(ppl, np.linspace(0, 1, 65)))
        density = np.histogram(ppl, edges, density=True)[0]
        own = density[np.clip(np.searchsorted(edges, ppl, side="right") - 1, 0, len(density) - 1)]
        draws = (rng or np.random.default_rng(0)).gumbel(size=len(ppl))  # the largest sums: draws without replacement
        order = np.argsort(((ppl - mu) / sigma) ** 2 / 2 + np.log(own) - draws, kind="stable")
    chosen = np.zeros(len(ppl), bool)
    chosen[order] = np.cumsum(lengths[order]) - lengths[order] < budget
    return chosen
