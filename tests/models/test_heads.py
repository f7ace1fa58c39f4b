"""Heads on hidden states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.heads import hidden_at, make_classifier_head, make_projection_head, make_scalar_head

HIDDEN = jax.random.normal(jax.random.key(1), (2, 5, 8))


def drawn(init):
    """Parameters without zeros, so that every one of them matters."""
    leaves, tree = jax.tree.flatten(init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(tree, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def test_two_layer_reward_head_is_base_rewards_formula():
    init, apply = make_scalar_head(8, layers=2, activation=jax.nn.silu)
    head = drawn(init)
    first, last = head["hidden"]["0"], head["out"]
    inner = HIDDEN @ first["kernel"] + first["bias"]
    expected = (inner / (1 + jnp.exp(-inner))) @ last["kernel"][:, 0] + last["bias"][0]
    assert apply(head, HIDDEN).shape == (2, 5) and jnp.abs(expected).max() > 1
    np.testing.assert_allclose(apply(head, HIDDEN), expected, rtol=1e-5, atol=1e-5)  # sums of eight products


def test_heads_start_neutral_and_learn():
    for init, apply in (make_scalar_head(8, layers=2), make_classifier_head(8, 3)):
        head = init(jax.random.key(0))
        assert np.all(apply(head, HIDDEN) == 0)
        grads = jax.grad(lambda p, apply=apply: jnp.sum((apply(p, HIDDEN) - 1) ** 2))(head)
        assert np.any(grads["out"]["kernel"] != 0)


def test_scores_are_float32_whatever_the_states_are():
    init, apply = make_scalar_head(8)
    head = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init(jax.random.key(0)))
    assert apply(head, HIDDEN.astype(jnp.bfloat16)).dtype == jnp.float32


def test_process_rewards_at_steps_equal_those_of_all_tokens():
    init, apply = make_scalar_head(8)
    head = drawn(init)
    ends = jnp.array([[1, 4, -1], [0, -1, -1]])
    scores, everywhere = apply(head, hidden_at(HIDDEN, ends)), apply(head, HIDDEN)
    np.testing.assert_allclose(scores[0, :2], everywhere[0, jnp.array([1, 4])], rtol=1e-6)
    np.testing.assert_allclose(scores[1, 0], everywhere[1, 0], rtol=1e-6)
    moved = jax.grad(lambda hidden: hidden_at(hidden, ends).sum())(HIDDEN)
    np.testing.assert_array_equal(moved[..., 0], [[0, 1, 0, 0, 1], [1, 0, 0, 0, 0]])
    with pytest.raises(ValueError, match=r"positions must lie in \[0, 5\), or be -1 for none, got -1 to 5"):
        hidden_at(HIDDEN, ends.at[0, 0].set(5))


def test_classifier_has_logits_per_class():
    init, apply = make_classifier_head(8, 3, layers=2)
    head = drawn(init)
    inner = jnp.tanh(HIDDEN @ head["hidden"]["0"]["kernel"] + head["hidden"]["0"]["bias"])
    np.testing.assert_allclose(
        apply(head, HIDDEN), inner @ head["out"]["kernel"] + head["out"]["bias"], rtol=1e-5, atol=1e-5
    )


def test_projection_and_its_norm():
    init, plain = make_projection_head(8, 4)
    _, apply = make_projection_head(8, 4, normalize=True)
    head = init(jax.random.key(0))
    assert set(head["out"]) == {"kernel"}
    projected = plain(head, HIDDEN)
    np.testing.assert_allclose(projected, HIDDEN @ head["out"]["kernel"], rtol=1e-5, atol=1e-6)
    unit = apply(head, HIDDEN)
    np.testing.assert_allclose(jnp.sum(unit**2, -1), 1, rtol=1e-5)
    np.testing.assert_allclose(unit * jnp.linalg.norm(projected, axis=-1, keepdims=True), projected, atol=1e-5)
    # a zero vector, as an empty text gives it, stays zero and sends no NaN back
    value, slope = jax.value_and_grad(lambda hidden: apply(head, hidden).sum())(jnp.zeros(8))
    assert value == 0 and np.all(slope == 0)


def test_bad_sizes():
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        make_scalar_head(8, layers=0)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        make_classifier_head(8, 0)
    with pytest.raises(ValueError, match="out_width must be at least 1, got -2"):
        make_projection_head(8, -2)
