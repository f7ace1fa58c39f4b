"""The perplexity-aware scaling law: its values, its fit and what it selects."""

import numpy as np
import pytest

from experiments.policy_optimization._scaling_law import (
    Law,
    best_landscape,
    distance_to_optimum_select,
    fit_scaling_law,
    predict_loss,
)

THETA = Law(e=1.8, d_c=40, alpha=0.25, a0=0.3, a1=-0.01, b0=0.2, b1=-0.005)
PPL, LENGTHS = np.array([5.0, 18, 22, 60]), np.full(4, 16)


def test_worked_example():
    found = predict_loss(THETA, [5, 10, 20, 40], [2, 4, 8, 16], 1e6)
    np.testing.assert_allclose(found, [2.513951, 2.364613, 2.331526, 2.554695], atol=1e-6)
    mu, sigma = np.meshgrid(np.arange(1, 61), np.arange(1, 31))
    corner = predict_loss(THETA, mu, sigma, 1e6)
    np.testing.assert_allclose([corner.min(), corner[0, 59]], 2.185830, atol=1e-6)
    chosen = distance_to_optimum_select(PPL, LENGTHS, 20, 8, budget=32)
    assert chosen.tolist() == [False, True, True, False]


def test_the_fit_finds_the_law_that_made_the_data():
    rng = np.random.default_rng(0)
    mu, sigma, tokens = rng.uniform(3, 40, 30), rng.uniform(1, 12, 30), 10 ** rng.uniform(4, 6, 30)
    loss, grid = predict_loss(THETA, mu, sigma, tokens), {"e_grid": np.linspace(0.1, 3, 30)}
    # 1.8 is on the grid, and without noise least squares are exact up to float64
    np.testing.assert_allclose(fit_scaling_law(mu, sigma, tokens, loss, **grid), THETA, rtol=1e-6)
    classical = fit_scaling_law(mu, sigma, tokens, loss, classical=True, **grid)
    assert classical[3:] == (0, 0, 0, 0) and classical.alpha > 0
    errors = [np.sum((predict_loss(law, mu, sigma, tokens) - loss) ** 2) for law in (THETA, classical)]
    assert errors[0] < errors[1]


def test_more_tokens_never_hurt_a_fitted_law():
    rng = np.random.default_rng(0)
    mu, sigma, tokens = rng.uniform(3, 40, 20), rng.uniform(1, 12, 20), 10 ** rng.uniform(4, 6, 20)
    law = fit_scaling_law(mu, sigma, tokens, 3 + 0.1 * np.log10(tokens), e_grid=np.array([1.0, 2]))
    assert law.alpha == pytest.approx(1e-3) and law.d_c > 0


def test_the_best_window_can_be_had():
    ppl = np.concatenate([np.linspace(2, 3, 50), np.linspace(18, 22, 50), np.linspace(150, 250, 50)])
    law = Law(e=1.0, d_c=5, alpha=0.2, a0=0.5, a1=-0.02, b0=0.0, b1=0.0)
    mu, sigma = best_landscape(law, ppl, 1e5, windows=np.array([(0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1)]))
    assert (mu, sigma) == pytest.approx((20, np.linspace(18, 22, 50).std()))


def test_a_matched_spread():
    ppl = np.linspace(1, 101, 4000)
    options = {"budget": 16 * 400, "rng": np.random.default_rng(0)}
    near = ppl[distance_to_optimum_select(ppl, np.full(4000, 16), 50, 8, **options)]
    spread = ppl[distance_to_optimum_select(ppl, np.full(4000, 16), 50, 8, match_spread=True, **options)]
    assert len(near) == len(spread) == 400 and near.std() < 3
    # of 400 draws without replacement from 700 chunks or so within the bell, which widens it somewhat
    assert 8 < spread.std() < 11 and abs(spread.mean() - 50) < 2


def test_bad_input():
    good = {"mu": np.full(7, 5.0), "sigma": np.full(7, 2.0), "tokens": np.full(7, 1e4), "loss": np.full(7, 2.0)}
    for name, value, grid in [("loss", np.full(6, 2.0), 1), ("sigma", np.zeros(7), 1), ("loss", good["loss"], 2)]:
        runs = {key: x[: len(value)] for key, x in good.items()} | {name: value}
        with pytest.raises(ValueError, match="at least 7 runs, got .*sigma above 0.*below the least loss 2"):
            fit_scaling_law(**runs, e_grid=np.array([float(grid)]))
