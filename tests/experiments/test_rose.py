"""Credit in ROSE's trees, in the columns of the tokens."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from configs.policy_optimization.rose import get_config
from experiments.policy_optimization.rose import describe_tree, tree_advantages
from jaxrl_llm.sampling import as_rollout
from jaxrl_llm.train.config import override

LENGTHS = jnp.array([6, 8, 5, 6])
ROWS = as_rollout(jnp.ones((4, 3), jnp.int32), jnp.array([3, 3, 3, 3]), jnp.ones((4, 8), jnp.int32), LENGTHS)
TREE = dataclasses.replace(
    ROWS,
    group_ids=jnp.zeros(4, jnp.int32),
    rewards=jnp.array([1.0, 1, 0, 0]),
    parent=jnp.array([-1, 0, -1, 0]),
    fork_position=jnp.array([0, 3 + 2, 0, 3 + 4]),
)


def test_worked_example():
    config = get_config("tiny")
    advantages = np.asarray(tree_advantages(config, TREE))
    np.testing.assert_array_equal(advantages[:, :3], 0)
    expected = [[1 / 6, 1 / 6, -1 / 6, -1 / 6, 0.5, 0.5], [1 / 6] * 2 + [1 / 3] * 6, [-0.5] * 5]
    expected.append([1 / 6, 1 / 6, -1 / 6, -1 / 6, -0.5, -0.5])
    for row, values in enumerate(expected):
        np.testing.assert_allclose(advantages[row, 3 : 3 + len(values)], values, atol=1e-6)  # float32 means of 4
        np.testing.assert_array_equal(advantages[row, 3 + len(values) :], 0)
    override(config, "length_exponent", 1.0)
    np.testing.assert_allclose(tree_advantages(config, TREE)[1, 5:], 0.222222, atol=1e-6)


def test_a_shared_prefix_is_generated_once():
    config = get_config("tiny")
    override(config, "prompts", 1)
    found = describe_tree(config, TREE)
    assert found["generated"] == 6 + 6 + 5 + 2
    assert found["distinct"] == 3  # rows of ones of lengths 6, 8, 5 and 6
    np.testing.assert_allclose(found["distinct_per_100"], 300 / 19, rtol=1e-6)
