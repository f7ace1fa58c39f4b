"""Rewards of turns and the division of a budget."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.policy_optimization.meow_tea_taro import budget_split, split_win_rewards
from jaxrl_llm import ops


def split(gains, won, highest=4.0, mask=None, **options):
    mask = jnp.ones((1, len(gains)), bool) if mask is None else jnp.array([mask])
    return split_win_rewards(jnp.array([gains]), mask, jnp.array([won]), jnp.array([highest]), **options)[0].tolist()


def test_worked_example():
    assert split([0.0, 1, 0, 1], True) == [0, 0.5, 0, 0.5]
    assert split([1.0, 0, 0], False) == [0.25, 0, 0]
    assert split([0.0, 0], True) == [0, 0] and split([0.0, 0], True, win_bonus=True) == [0, 1]


def test_losses_of_score_and_turns_that_did_not_take_place():
    assert split([1.0, -1, 1], True) == [0.5, -0.5, 0.5]
    assert split([0.0, 2], True) == [0, 2]
    assert split([0.0, 0, 7], True, mask=[True, True, False], win_bonus=True) == [0, 1, 0]
    with pytest.raises(ValueError, match="turn_mask has no turn"):
        split([1.0, 0], True, mask=[False, False])


def test_rewards_lie_on_the_last_token_of_their_turn():
    turn_ids = jnp.array([[-1, 0, 0, -1, 1, 1, -1]])
    placed = ops.place_turn_rewards(jnp.array([[0.25, 0.5]]), turn_ids)
    np.testing.assert_array_equal(placed, [[0, 0, 0.25, 0, 0, 0.5, 0]])


def test_budget():
    assert budget_split(1000, demo_cost=10, ratio=0.0) == (0, 1000)
    assert budget_split(1000, demo_cost=10, ratio=0.255) == (25, 750)
    assert budget_split(1000, demo_cost=10, ratio=1.0) == (100, 0)
    with pytest.raises(ValueError, match="ratio=1.5"):
        budget_split(1000, demo_cost=10, ratio=1.5)
