"""Advantages and loss of GRAO."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.policy_optimization.grao import grao_advantages, grao_loss

REWARDS, REF = jnp.array([[1.0, 0, 0.5]]), jnp.array([1.0])
LOGPS, REF_LOGP = jnp.array([[-2.0, -4, -3]]), jnp.array([-5.0])


def test_worked_example():
    own, theirs = grao_advantages(REWARDS, REF)
    np.testing.assert_allclose(own, [[1.224745, -1.224745, 0]], atol=1e-6)
    np.testing.assert_allclose(theirs, [1.224745], atol=1e-6)
    (loss, terms), grads = jax.value_and_grad(grao_loss, (0, 1), has_aux=True)(LOGPS, REF_LOGP, own, theirs)
    # printed to six places, of terms up to 6
    np.testing.assert_allclose(loss, 1.755468, atol=2e-6)
    found = [terms[name] for name in ("explore", "imitate", "align")]
    np.testing.assert_allclose(found, [0.816497, -6.123724, 0.816497], atol=2e-6)
    np.testing.assert_allclose(grads[0], [[-0.653197, 0.653197, 0]], atol=1e-6)
    np.testing.assert_allclose(grads[1], [-0.612372], atol=1e-6)


def test_alignment_is_exploration_unless_the_reference_is_counted():
    rewards, ref = jnp.array([[0.1, 0.9, 0.4, 0.4], [0, 0, 1, 0]]), jnp.array([0.7, 0.2])
    logps, ref_logp = -jnp.array([[1.0, 2, 3, 4], [2, 1, 5, 3]]), jnp.array([-2.0, -3])
    for include_reference in (False, True):
        advantages = grao_advantages(rewards, ref, include_reference=include_reference)
        terms = grao_loss(logps, ref_logp, *advantages)[1]
        # float32 sums of eight terms
        assert np.isclose(terms["align"], terms["explore"], atol=1e-5) != include_reference


def test_the_reference_teaches_where_all_samples_are_equal():
    own, theirs = grao_advantages(jnp.zeros((1, 3)), jnp.array([0.8]))
    assert own.tolist() == [[0, 0, 0]] and theirs.tolist() == [5]


def test_bad_input():
    with pytest.raises(ValueError, match="at least 2 samples per prompt, got 1"):
        grao_advantages(jnp.zeros((2, 1)), jnp.zeros(2))
    with pytest.raises(ValueError, match="beta=-1"):
        grao_loss(LOGPS, REF_LOGP, jnp.zeros((1, 3)), jnp.zeros(1), beta=-1.0)
