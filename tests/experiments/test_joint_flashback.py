"""Latent tasks and their increments; what Joint Flashback Adaptation does without flashbacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.policy_optimization.joint_flashback import get_config
from experiments.policy_optimization.joint_flashback import apply_increment, build, latent_task_weights

KEYS = jnp.array([[1.0, 0], [0, 2], [3, 0]])


def test_worked_example():
    w = latent_task_weights(jnp.zeros((1, 2)), KEYS, k=2, tau=2.0)
    np.testing.assert_allclose(w, [[0.817574, 0.182426, 0]], atol=1e-6)
    a = jnp.array([[[1.0, 0]], [[0, 1]], [[5, 5]]])
    b = jnp.array([[[1.0], [2]], [[1], [0]], [[5], [5]]])
    down, up = apply_increment(w, a, b)
    np.testing.assert_allclose((down @ up[0]).T, [[0.817574, 0.182426], [1.635149, 0]], atol=2e-6)


def test_increments_are_sums_of_products():
    keys = jax.random.split(jax.random.key(0), 3)
    w, a = jax.random.uniform(keys[0], (2, 3)), jax.random.normal(keys[1], (3, 2, 5))
    b = jax.random.normal(keys[2], (3, 4, 2))
    down, up = apply_increment(w, a, b)
    expected = np.einsum("bz,zor,zri->bio", w, b, a, optimize=False)
    np.testing.assert_allclose(down @ up, expected, atol=1e-5)  # float32 sums of six products


def test_weights_at_their_edges():
    tied = latent_task_weights(jnp.zeros((1, 1)), jnp.array([[1.0], [-1], [1]]), k=1, tau=1.0)
    assert tied.tolist() == [[1, 0, 0]]
    gradient = jax.grad(lambda keys: latent_task_weights(jnp.zeros((1, 2)), keys, k=2, tau=2.0)[0, 0])(KEYS)
    assert np.isfinite(gradient).all() and (gradient[2] == 0).all()
    for k in (0, 4):
        with pytest.raises(ValueError, match="between 1 and 3"):
            latent_task_weights(jnp.zeros((1, 2)), KEYS, k=k, tau=2.0)


def test_without_flashbacks_it_is_fine_tuning():
    config = get_config("tiny")
    config.world.flashbacks = 0
    with pytest.warns(UserWarning, match="no flashbacks"):
        parts = build(config)
    state = jax.eval_shape(lambda key: parts.init(parts.model.init(key), 0), jax.random.key(0))
    assert "old_loss" not in jax.eval_shape(parts.iteration, state)[1]
