"""What only the page of Facial-R1 has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.policy_optimization.facial_r1 import get_config
from experiments.policy_optimization._stages import stage_programs
from experiments.policy_optimization.facial_r1 import confident_labels, make_pipeline, unit_rewards


def units(*named):
    return jnp.zeros(24, bool).at[jnp.array(named, int)].set(True)


def test_worked_example():
    named = jnp.stack([units(4, 9), units(6, 12), units(), units(4), units()])
    gold = jnp.stack([units(4, 7, 9), units(6, 12), units(6, 12), units(), units()])
    np.testing.assert_allclose(unit_rewards(named, gold), [0.6, 1, -1, 0, 0], rtol=1e-6)  # float32
    precise = unit_rewards(named[:1], gold[:1], beta=0.5)  # 1.25 * 2/3 / (0.25 + 2/3) = 10 / 11
    np.testing.assert_allclose(precise, [9 / 11], rtol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="shape"):
        unit_rewards(units(1)[None], units(1)[None, :5])
    with pytest.raises(ValueError, match="beta"):
        unit_rewards(units(1), units(1), beta=0.0)


def test_labels_that_are_learnt_from():
    emotions = jnp.array([[1, 1, 1, 2], [1, 1, 2, 2], [3, 3, 3, 3]])
    fine = jnp.array([[1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]], bool)
    kept = confident_labels(emotions, fine, share=0.5)
    assert kept.tolist() == [[True, False, True, False], [True] * 4, [True, True, True, False]]
    assert not confident_labels(emotions, fine, share=0.75)[:2].any()


def test_the_synthesis_traces_with_the_papers_settings():
    config = get_config("paper")
    program = stage_programs(config, make_pipeline(config), "synthesis")["train"]
    after, metrics = jax.eval_shape(program.function, **program.arguments)
    assert jax.tree.map(jnp.shape, program.arguments["state"]) == jax.tree.map(jnp.shape, after)
    assert metrics["kept"].shape == ()
