"""How a rubric changes by the rule that stands for the meta judge."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.policy_optimization.meta_policy_optimization import (
    MetaRewardSchedule,
    meta_update_rubric,
    rubric_reward,
)

FEATURES = jnp.array([[1.0, 1, 0], [1, 0, 1], [0, 1, 0], [1, 0, 1]])
QUALITY = jnp.array([0.0, 1, 0, 1])
WEIGHTS = jnp.array([1.0, 1, 0])
LIMITS = {"max_items": 2, "tau": 0.3, "total_points": 2.0}


def test_worked_example():
    assert rubric_reward(FEATURES, WEIGHTS).tolist() == [2, 1, 1, 1]
    revised = meta_update_rubric(FEATURES, QUALITY, WEIGHTS, **LIMITS)
    np.testing.assert_allclose(revised, [1, 0, 1], rtol=1e-6)  # correlations 0.577350, -1 and 1
    np.testing.assert_allclose(rubric_reward(FEATURES, revised), [1, 2, 0, 2], rtol=1e-6)


def test_edges():
    def update(weights=WEIGHTS, quality=QUALITY, **changes):
        return meta_update_rubric(FEATURES, quality, jnp.asarray(weights), **(LIMITS | changes)).tolist()

    assert update(max_items=1) == [2, 0, 0]  # no room for another
    assert update(tau=1.0) == [2, 0, 0]  # none is good enough
    assert update([0.0, 3, 0]) == [0, 0, 2]  # none is kept: the new one weighs 1, scaled
    assert update(quality=jnp.ones(4)) == [1, 1, 0]  # nothing can be told, and nothing left: as before
    constant = meta_update_rubric(jnp.ones((4, 2)), QUALITY, jnp.array([1.0, 0]), **LIMITS)
    assert constant.tolist() == [1, 0]
    assert update([3.0, 1, 0], total_points=3.0) == [1.5, 0, 1.5]


def test_schedule():
    schedule = MetaRewardSchedule(20, 16, 128)
    assert [step for step in range(50) if schedule.due(jnp.int32(step))] == [20, 40]
    with pytest.raises(ValueError, match="interval must be at least 1, got 0"):
        MetaRewardSchedule(0, 16, 128)
    with pytest.raises(ValueError, match="num_samples=129 must be 2 to the 128 rollouts"):
        MetaRewardSchedule(20, 129, 128)
