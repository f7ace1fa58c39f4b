"""Log-probs under a filter: renormalized over what `filter_logits` keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxrl_kernels.logprob_filtered import filtered_logprob
from jaxrl_kernels.sampling import filter_logits

N, D, V, CHUNK = 37, 16, 211, 8  # the rows do not divide into chunks


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    hidden, head = 0.3 * rng.normal(size=(N, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32)
    return hidden, head, rng.integers(0, V, N).astype(np.int32), rng.random(N) < 0.6


def rows_of(table, states):
    return table[states]


def plain(logits, targets):
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    with np.errstate(invalid="ignore"):
        entropy = -np.nansum(np.exp(logprobs) * logprobs, axis=-1)
    return logprobs[np.arange(len(targets)), targets], entropy


@pytest.mark.parametrize(
    "filters", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}]
)
def test_are_renormalized(inputs, filters):
    """The log-prob of the filtered distribution, the entropy of the unfiltered one; NaN where nobody may look."""
    hidden, head, targets, needed = inputs
    kept = np.asarray(filter_logits(jnp.asarray(hidden @ head.T), keep=targets, **filters), np.float64)
    expected, _ = plain(kept, targets)
    _, expected_entropy = plain(np.asarray(hidden, np.float64) @ head.T, targets)
    poisoned = np.where(needed[:, None], hidden, np.nan)
    logprobs, entropy = filtered_logprob(poisoned, head, targets, needed=needed, chunk=CHUNK, **filters)
    # float32 logits of size 5 carry a rounding error of some 1e-6
    np.testing.assert_allclose(logprobs, np.where(needed, expected, 0), atol=2e-5)
    np.testing.assert_allclose(entropy, np.where(needed, expected_entropy, 0), atol=2e-5)


@pytest.mark.parametrize("filters", [{}, {"top_k": 5, "min_p": 0.1}])
def test_only_allowed_tokens(inputs, filters):
    """Renormalized over what a row's state allows, before the filters; NaN for a target that it does not allow."""
    hidden, head, targets, needed = inputs
    table = np.random.default_rng(1).random((3, V)) < 0.5
    states = np.arange(N) % 3
    within = table[states, targets]
    masked = jnp.where(table[states], hidden @ head.T, -jnp.inf)
    expected, _ = plain(np.asarray(filter_logits(masked, keep=targets, **filters), np.float64), targets)
    _, expected_entropy = plain(np.asarray(masked, np.float64), targets)
    logprobs, entropy = filtered_logprob(
        *(hidden, head, targets),
        needed=needed,
        chunk=CHUNK,
        allowed=Partial(rows_of, table),
        states=states,
        **filters,
    )
    np.testing.assert_allclose(logprobs, np.where(needed, np.where(within, expected, np.nan), 0), atol=2e-5)
    np.testing.assert_allclose(entropy, np.where(needed, expected_entropy, 0), atol=2e-5)
    with pytest.raises(ValueError, match="allowed needs states: one for each of the 37 rows"):
        filtered_logprob(hidden, head, targets, allowed=Partial(rows_of, table))


def test_gradient_is_that_of_the_kept_tokens(inputs):
    hidden, head, targets, needed = inputs

    def loss(hidden, head):
        return jnp.sum(filtered_logprob(hidden, head, targets, top_k=7, softcap=4.0, needed=needed, chunk=CHUNK)[0])

    def all_at_once(hidden, head):
        logits = 4 * jnp.tanh(hidden @ head.T / 4)
        kept = jnp.isfinite(filter_logits(jax.lax.stop_gradient(logits), top_k=7, keep=targets))
        logprobs = jax.nn.log_softmax(jnp.where(kept, logits, -1e30))
        return jnp.sum(jnp.where(needed, logprobs[jnp.arange(N), targets], 0))

    grads = jax.jit(jax.grad(loss, (0, 1)))(hidden, head)
    for got, expected in zip(grads, jax.jit(jax.grad(all_at_once, (0, 1)))(hidden, head), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"got \[2, 3\], \[5, 4\] and \[2\]"):
        filtered_logprob(jnp.zeros((2, 3)), jnp.zeros((5, 4)), jnp.zeros(2, int), top_k=1)
