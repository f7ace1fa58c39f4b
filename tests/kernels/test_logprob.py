"""The fused head against the plain one in float64: values, gradients, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_kernels import filter_logits, fused_logprob

N, D, V, CHUNK = 37, 16, 211, 8  # neither the rows nor the vocabulary divide into chunks


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(N, D)).astype(np.float32),
        rng.normal(size=(V, D)).astype(np.float32),
        rng.integers(0, V, N).astype(np.int32),
        rng.random(N) < 0.6,
    )


def plain(hidden, head, targets, temperature=1.0, softcap=None):
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    logits = (logits if softcap is None else softcap * np.tanh(logits / softcap)) / temperature
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logprobs[np.arange(len(targets)), targets], -(np.exp(logprobs) * logprobs).sum(-1)


@pytest.mark.parametrize(("temperature", "softcap"), [(0.3, None), (1.0, None), (1.7, None), (0.5, 4.0)])
def test_equals_the_plain_head(inputs, temperature, softcap):
    hidden, head, targets, _ = inputs
    options = dict(temperature=temperature, softcap=softcap)
    logprobs, entropy = fused_logprob(hidden, head, targets, chunk=CHUNK, **options)
    expected, expected_entropy = plain(hidden, head, targets, **options)
    # float32 logits of size 10 to 40 carry a rounding error of a few 1e-6
    np.testing.assert_allclose(logprobs, expected, atol=2e-5)
    np.testing.assert_allclose(entropy, expected_entropy, atol=2e-5)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_gradients_equal_finite_differences(inputs, softcap):
    hidden, head, targets, needed = inputs
    weights, mix = np.random.default_rng(1).normal(size=(2, N)) * needed

    def loss(hidden, head):
        logprobs, entropy = fused_logprob(
            hidden, head, targets, softcap=softcap, needed=needed, entropy_gradient=True, chunk=CHUNK
        )
        return jnp.sum(weights * logprobs + mix * entropy)

    def exact(hidden, head):
        logprobs, entropy = plain(hidden, head, targets, softcap=softcap)
        return np.sum(weights * logprobs + mix * entropy)

    grads = jax.grad(loss, argnums=(0, 1))(hidden, head)
    rng = np.random.default_rng(2)
    for argument, grad in enumerate(grads):
        direction = rng.normal(size=grad.shape)
        points = [np.asarray(x, np.float64) for x in (hidden, head)]
        ends = []
        for sign in (1, -1):
            moved = list(points)
            moved[argument] = points[argument] + sign * 1e-5 * direction
            ends.append(exact(*moved))
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(np.sum(np.asarray(grad, np.float64) * direction), slope, rtol=1e-5)


def test_rows_that_are_not_needed_are_never_read(inputs):
    hidden, head, targets, needed = inputs
    poisoned = np.where(needed[:, None], hidden, np.nan)

    def loss(hidden):
        logprobs, entropy = fused_logprob(hidden, head, targets, needed=needed, chunk=CHUNK)
        return jnp.sum(logprobs), (logprobs, entropy)

    grad, (logprobs, entropy) = jax.grad(loss, has_aux=True)(poisoned)
    expected, _ = plain(hidden, head, targets)
    np.testing.assert_allclose(logprobs, np.where(needed, expected, 0), atol=2e-5)
    assert np.all(np.asarray(entropy)[~needed] == 0)
    assert np.all(np.asarray(grad)[~needed] == 0) and np.all(np.isfinite(np.asarray(grad)[needed]))


@pytest.mark.parametrize(
    "filters", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}]
)
def test_filtered_logprobs_are_renormalized(inputs, filters):
    hidden, head, targets, _ = inputs
    logits = 0.3 * hidden @ head.T
    filtered = np.asarray(filter_logits(jnp.asarray(logits), keep=targets, **filters), np.float64)
    expected = filtered - np.log(np.exp(filtered).sum(-1, keepdims=True))
    logprobs, _ = fused_logprob(0.3 * hidden, head, targets, chunk=CHUNK, **filters)
    np.testing.assert_allclose(logprobs, expected[np.arange(N), targets], atol=2e-5)


def test_all_logits_never_exist():
    """The compiled forward and backward pass together hold far less than one [N, V] array."""
    rows, width, vocab = 16384, 8, 2048

    def loss(hidden, head, targets):
        return jnp.sum(fused_logprob(hidden, head, targets, chunk=64)[0])

    compiled = (
        jax.jit(jax.grad(loss, argnums=(0, 1)))
        .lower(
            jax.ShapeDtypeStruct((rows, width), jnp.float32),
            jax.ShapeDtypeStruct((vocab, width), jnp.float32),
            jax.ShapeDtypeStruct((rows,), jnp.int32),
        )
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < rows * vocab * 4 / 8
