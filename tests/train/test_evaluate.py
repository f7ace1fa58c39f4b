"""Scores of several tasks."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.train import forgetting


def test_forgetting():
    before, after = jnp.array([[0.9, 0.5], [0.1, 0.2]]), jnp.array([[0.6, 0.7], [0.1, 0.3]])
    np.testing.assert_allclose(forgetting(before, after), [0.15, 0], rtol=1e-6)  # float32
    with pytest.raises(ValueError, match="the same tasks"):
        forgetting(before, after[:, :1])
