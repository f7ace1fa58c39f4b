"""What only the page of Kimi k1.5 has."""

import jax
import jax.numpy as jnp
import pytest

from configs.policy_optimization.kimi_k1_5 import get_config
from experiments.policy_optimization import kimi_k1_5
from jaxrl_llm import train


def test_pairs_for_short_answers():
    """The card's four responses, then a prompt with right ones of three lengths, and one that nobody solves."""
    lengths = jnp.array([[100, 200, 300, 150], [90, 60, 91, 60], [5, 6, 7, 8]])
    correct = jnp.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
    chosen, rejected = kimi_k1_5.long2short_pairs(lengths, correct)
    assert chosen.tolist() == [0, 1, -1]
    assert rejected.tolist() == [[False, True, True, True], [False, False, True, False], [False] * 4]
    with pytest.raises(ValueError, match="ratio=0.5 must be at least 1"):
        kimi_k1_5.long2short_pairs(lengths, correct, ratio=0.5)


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


@pytest.mark.parametrize("way", ["rl", "dpo", "rejection"])
def test_ways_to_a_short_model_trace(way):
    config = get_config("tiny")
    with config.unlocked():
        config.long2short = way
    parts = kimi_k1_5.shorten(config, kimi_k1_5.build(config))

    def start_and_iterate(key):
        state = parts.init(parts.model.init(key), 0)
        return state, parts.iteration(state)

    before, (after, metrics) = jax.eval_shape(start_and_iterate, jax.random.key(0))
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
    assert metrics["loss"].shape == () and (after.ref_params is None) == (way == "rl")


@pytest.mark.slow
def test_a_short_model_is_made_of_the_long_one(tmp_path):
    config = get_config("tiny")
    config.update({"long2short": "merge", "short_steps": 2})
    summary = train.run_page(kimi_k1_5, config, tmp_path, quiet=True)
    assert 0 < summary["short"]["response_tokens"] and 0 <= summary["short"]["success_per_token"] <= 1
