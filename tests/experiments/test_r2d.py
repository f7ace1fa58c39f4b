"""R2D's contrast, decisions and rates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.policy_optimization.r2d import (
    attack_success_rate,
    contrastive_pivot_loss,
    over_refusal_rate,
    pivot_decision,
    pivot_margins,
)
from jaxrl_llm.models import DecoderConfig, Model
from jaxrl_llm.models.decoder import output_logits

IDS = {"safe_id": 3, "unsafe_id": 4}
MARGINS = jnp.array([[1.5 - 0.2, 7.0, jnp.nan]])


def loss(*labels):
    return contrastive_pivot_loss(MARGINS, jnp.array([labels]), **IDS)[0]


def test_worked_example():
    np.testing.assert_allclose(loss(3, -100, -100), 0.241008, atol=1e-6)
    np.testing.assert_allclose(loss(4, -100, -100), 1.541008, atol=1e-6)
    assert loss(5, 2, -100) == 0  # RETHINK and a word: only the cross entropy is left
    # each class by itself: a second SAFE halves the weight of the first, and not that of UNSAFE
    both = contrastive_pivot_loss(jnp.array([[1.3, 1.3, 1.3]]), jnp.array([[3, 3, 4]]), **IDS)[0]
    np.testing.assert_allclose(both, 0.241008 + 1.541008, atol=2e-6)
    grads = jax.grad(lambda margins: contrastive_pivot_loss(margins, jnp.array([[3, 5, -100]]), **IDS)[0])(MARGINS)
    np.testing.assert_allclose(grads, [[-1 / (1 + np.exp(1.3)), 0, 0]], rtol=1e-6)


def test_margins_are_differences_of_logits():
    model = Model(DecoderConfig(6, 8, logit_softcap=0.5), init=None, apply=None)
    params = {"embedding": jax.random.normal(jax.random.key(0), (6, 8))}
    hidden = jax.random.normal(jax.random.key(1), (1, 3, 8))
    found, logits = pivot_margins(model, params, hidden, **IDS), output_logits(model, params, hidden)
    np.testing.assert_allclose(found, logits[..., 3] - logits[..., 4], atol=1e-6)  # float32 sums of eight products
    for ids in ({"safe_id": 3, "unsafe_id": 3}, {"safe_id": 3, "unsafe_id": 6}):
        with pytest.raises(ValueError, match="must be two tokens below 6"):
            pivot_margins(model, params, hidden, **ids)


def test_the_last_pivot_decides():
    tokens = jnp.array([[3, 1, 4, 2], [4, 1, 5, 3], [1, 2, 1, 2]])
    assert pivot_decision(tokens, (3, 4, 5)).tolist() == [4, 3, -1]


def test_rates():
    refused, harmful = jnp.array([True, False, False, True]), jnp.array([True, True, False, False])
    assert attack_success_rate(refused, harmful) == 0.5
    assert over_refusal_rate(refused, ~harmful) == 0.5
    assert over_refusal_rate(refused, jnp.zeros(4, bool)) == 0
