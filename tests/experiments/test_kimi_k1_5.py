"""What only the page of Kimi k1.5 has."""

import jax
import jax.numpy as jnp

from configs.policy_optimization.kimi_k1_5 import get_config
from experiments.policy_optimization import kimi_k1_5


def test_the_optimizer_starts_anew_with_its_averages_in_float32():
    """Also beside weights in bfloat16, where a state of other types could be neither carried on nor saved."""
    parts = kimi_k1_5.build(get_config("tiny"))

    def start_and_iterate(key):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), parts.model.init(key))
        state = parts.init(params, 0)
        return state, parts.iteration(state)[0]

    before, after = jax.eval_shape(start_and_iterate, jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.dtype, before) == jax.tree.map(lambda leaf: leaf.dtype, after)
    assert {leaf.dtype for leaf in jax.tree.leaves(before.params)} == {jnp.dtype(jnp.bfloat16)}
