"""Pooling by hand, with padding on either side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.pooling import pool_hidden

NAN = float("nan")
# padding, full of NaN, on the right, on the left and on both sides; a row of nothing else
HIDDEN = jnp.array(
    [
        [[1.0, 8.0], [3.0, -4.0], [NAN, NAN]],
        [[NAN, NAN], [5.0, 0.0], [-1.0, 2.0]],
        [[NAN, NAN], [7.0, -7.0], [NAN, NAN]],
        [[NAN, NAN], [NAN, NAN], [NAN, NAN]],
    ]
)
MASK = jnp.array([[1, 1, 0], [0, 1, 1], [0, 1, 0], [0, 0, 0]], bool)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [[2, 2], [2, 1], [7, -7], [0, 0]]),
        ("cls", [[1, 8], [5, 0], [7, -7], [0, 0]]),
        ("last", [[3, -4], [-1, 2], [7, -7], [0, 0]]),
        ("max", [[3, 8], [5, 2], [7, -7], [0, 0]]),
    ],
)
def test_by_hand(how, expected):
    pooled = jax.jit(pool_hidden, static_argnums=2)(HIDDEN, MASK, how)
    assert pooled.dtype == jnp.float32 and np.array_equal(pooled, expected)


def test_bfloat16_states_are_averaged_in_float32():
    """257 ones sum to 256 in bfloat16."""
    hidden = jnp.ones((1, 257, 1), jnp.bfloat16)
    assert pool_hidden(hidden, jnp.ones((1, 257), bool))[0, 0] == 1.0


@pytest.mark.parametrize("how", ["mean", "cls", "last", "max"])
def test_padding_gets_no_gradient(how):
    grads = jax.grad(lambda h: pool_hidden(h, MASK, how).sum())(jnp.nan_to_num(HIDDEN))
    assert np.all(grads[~MASK] == 0) and np.all(grads[:3].sum((1, 2)) == 2.0)


def test_unknown_way():
    with pytest.raises(ValueError, match="how must be one of .*'mean'.*, got 'median'"):
        pool_hidden(HIDDEN, MASK, "median")
