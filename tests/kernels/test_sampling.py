"""Filters and the inverse CDF."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_kernels import filter_logits, sample_tokens

V = 300  # two whole blocks and a part


@given(seed=st.integers(0, 2**31 - 1), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_inverts_the_cdf(seed, scale):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=(16, V))).astype(np.float32)
    logits[rng.random((16, V)) < 0.3] = -np.inf
    uniform = rng.random(16).astype(np.float32)
    tokens, logprobs = jax.jit(sample_tokens)(logits, uniform)
    probs = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    ends = np.cumsum(probs, -1)
    picked = probs[np.arange(16), tokens]
    assert np.all(picked > 0)
    np.testing.assert_allclose(logprobs, np.log(picked), atol=1e-5)
    # the uniform number lies in the token's piece of the CDF, up to the rounding of a float32 sum
    end = ends[np.arange(16), tokens]
    assert np.all((uniform < end + 1e-5) & (uniform > end - picked - 1e-5))


def test_frequencies():
    """One draw a row over 20,000 rows: counts within five standard errors of the exact probabilities."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=V) * 2, jnp.float32)
    num = 20_000
    tokens, _ = jax.jit(sample_tokens)(
        jnp.broadcast_to(logits, (num, V)), jax.random.uniform(jax.random.key(0), (num,))
    )
    probs = np.asarray(jax.nn.softmax(logits))
    counts = np.bincount(tokens, minlength=V) / num
    assert np.all(np.abs(counts - probs) < 5 * np.sqrt(probs / num) + 1 / num)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_ends_of_the_unit_interval(uniform):
    logits = jnp.full((1, V), -jnp.inf).at[0, jnp.array([7, 130, 290])].set(0.0)
    token, _ = sample_tokens(logits, jnp.array([uniform]))
    assert token[0] == (7 if uniform == 0 else 290)


def test_filters_keep_what_they_say():
    probs = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    logits = jnp.log(jnp.asarray(probs))[None]
    kept = lambda **options: np.flatnonzero(np.isfinite(np.asarray(filter_logits(logits, **options))[0])).tolist()  # noqa: E731
    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_k=50) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.65) == [0, 1]  # 0.4 is less than 0.65, 0.7 is not
    assert kept(top_p=0.75) == [0, 1, 2]
    assert kept(top_p=0.3) == [0]  # at least one
    assert kept(min_p=0.3) == [0, 1, 2]  # 0.12 and more
    assert kept(top_k=3, top_p=0.5) == [0, 1]  # of what top-k left, 0.47 and 0.35
    assert kept(top_k=1, keep=jnp.array([4])) == [0, 4]
    np.testing.assert_allclose(filter_logits(logits, temperature=2.0), logits / 2, rtol=1e-6)
