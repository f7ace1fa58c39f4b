import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm.data import span_mask

OPEN, CLOSE = 8, 9
ROWS = [  # tokens, and what lies between the tags
    ([1, 8, 2, 9, 3, 8, 9, 4], [0, 1, 1, 1, 0, 1, 1, 0]),
    ([1, 8, 2, 2, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1]),  # never closed
    ([9, 1, 9, 8, 2, 9, 1, 9], [0, 0, 0, 1, 1, 1, 0, 0]),  # nothing to close
    ([8, 8, 2, 9, 2, 9, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]),  # one in another
    ([8, 8, 2, 9, 2, 2, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]),
    ([1, 1, 1, 1, 1, 1, 1, 1], [0] * 8),
]


def test_spans():
    tokens, expected = (jnp.array(column) for column in zip(*ROWS, strict=True))
    assert jnp.array_equal(jax.jit(span_mask, static_argnums=(1, 2))(tokens, OPEN, CLOSE), expected.astype(bool))
    assert jnp.array_equal(span_mask(tokens[0], OPEN, CLOSE), expected[0].astype(bool))
    with pytest.raises(ValueError, match="must differ, got 8 for both"):
        span_mask(tokens, OPEN, OPEN)
