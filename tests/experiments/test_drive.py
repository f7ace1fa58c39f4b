"""Which problems DRIVE goes on with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.policy_optimization.drive import get_config
from experiments.policy_optimization.drive import PhaseSchedule, arena_filter, build, duplicate_hard, hard_focus
from jaxrl_llm import ops
from jaxrl_llm.train.config import override

RATES, ALL = jnp.array([0.9, 0.1, 0.0, 0.5]), jnp.ones(4, bool)


def test_worked_example():
    assert hard_focus(RATES, ALL, keep=2).tolist() == [False, True, True, False]
    assert jax.jit(lambda *x: hard_focus(*x, keep=2))(RATES, ALL).tolist() == [False, True, True, False]
    active = jnp.array([True, False, False, True])
    assert hard_focus(RATES, active, keep=1).tolist() == [False, False, False, True]
    assert hard_focus(jnp.zeros(4), ALL, keep=2).tolist() == [True, True, False, False]  # ties by index
    # float32 powers of 64 factors
    np.testing.assert_allclose(ops.signal_probability(jnp.array(0.02), 8), 0.149237, atol=1e-6)
    np.testing.assert_allclose(ops.signal_probability(jnp.array(0.02), 64), 0.725546, atol=1e-6)


def test_phases():
    assert PhaseSchedule((72, 50, 25), (64, 32, 32)).starts(32) == [(32, 72), (96, 50), (128, 25)]
    assert PhaseSchedule((), ()).starts(5) == []


def test_fine_tuning_data():
    assert duplicate_hard(np.array([False, True, False])).tolist() == [0, 1, 1, 2]
    folds = [np.array([0, 3]), np.array([1, 4]), np.array([2, 5])]
    trained = []

    def train_fn(fold):
        trained.append(fold.tolist())
        return set(fold.tolist())

    kept = arena_filter(folds, train_fn, lambda model, fold: np.array([index - 1 in model for index in fold]))
    assert trained == [[2, 5], [0, 3], [1, 4]] and kept.tolist() == [0]  # 3 after 2, 1 after 0 and so on are solved


def test_bad_input():
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        hard_focus(RATES, ALL, keep=0)
    with pytest.raises(ValueError, match="keep=3 is more than the 2 active"):
        hard_focus(RATES, jnp.array([True, True, False, False]), keep=3)
    with pytest.raises(ValueError, match="pass rate of problem 2 is NaN"):
        hard_focus(RATES.at[2].set(jnp.nan), ALL, keep=1)
    for keep, steps in (((5,), (1, 2)), ((5, 0), (1, 1)), ((5, 6), (1, 1))):
        with pytest.raises(ValueError, match="phase"):
            PhaseSchedule(keep, steps)
    with pytest.raises(ValueError, match="at least 2 folds"):
        arena_filter([np.arange(3)], lambda fold: None, lambda model, fold: fold > 0)
    config = get_config("tiny")
    override(config, "focus_prompts", 5)
    with pytest.raises(ValueError, match="focus_prompts=5 must divide prompts=16"):
        build(config)
