"""Filters, the inverse CDF, and that every version draws the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from jaxrl_kernels import filter_logits, sample_tokens
from jaxrl_kernels.dispatch import export_for
from jaxrl_kernels.sampling import draw
from jaxrl_kernels.sampling_pallas import on_tpu
from jaxrl_kernels.sampling_search import Filters

V = 300  # two whole blocks and a part
ALL = Filters(temperature=0.7, top_k=40, top_p=0.9, min_p=0.02)
KERNELS = ["interpret_tpu", "interpret_gpu", "interpret_mosaic"]

draw_jit = functools.partial(jax.jit, static_argnums=(2, 3))(draw)
filter_jit = functools.partial(jax.jit, static_argnames=("temperature", "top_k", "top_p", "min_p"))(filter_logits)


def oracle_kept(logits, filters):
    """What the filters keep, by sorting, and the probabilities of all, in float64; then how far each token is from
    the border of top-p and of min-p."""
    scaled = (logits / np.float32(filters.temperature)).astype(np.float32)
    kept = np.ones(scaled.shape, bool)
    if filters.top_k is not None:
        kept = scaled >= np.sort(scaled, axis=-1)[:, -filters.top_k, None]
    weights = np.exp(scaled.astype(np.float64) - scaled.max(-1, keepdims=True))
    probs = np.where(kept, weights, 0) / np.sum(np.where(kept, weights, 0), axis=-1, keepdims=True)
    larger = np.sum(np.where(scaled[:, None, :] > scaled[:, :, None], probs[:, None, :], 0), axis=-1)
    if filters.top_p < 1:
        kept &= larger < filters.top_p
    kept &= weights >= filters.min_p
    near = np.abs(larger - filters.top_p) < 1e-5
    near |= np.abs(weights / max(filters.min_p, 1e-30) - 1) < 1e-5
    return kept & (weights > 0), weights, near


def make(seed, scale, num_rows=16, vocab=V):
    """Rows with banned tokens; every other one in steps of a half, so that there are ties."""
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=(num_rows, vocab))).astype(np.float32)
    logits[::2] = np.round(2 * logits[::2]) / 2
    logits[rng.random(logits.shape) < 0.3] = -np.inf
    return logits, rng.random(num_rows).astype(np.float32)


@given(seed=st.integers(0, 2**31 - 1), scale=st.sampled_from([0.1, 1.0, 10.0]))
@pytest.mark.parametrize("filters", [Filters(), ALL, Filters(top_p=0.6), Filters(top_k=7)], ids=str)
def test_inverts_the_cdf_of_what_is_kept(filters, seed, scale):
    logits, uniform = make(seed, scale)
    kept, weights, near = oracle_kept(logits, filters)
    options = {name: value for name, value in filters._asdict().items() if name != "greedy"}
    finite = np.isfinite(np.asarray(filter_jit(logits, **options)))
    assert np.all((finite == kept) | near | (weights == 0))
    probs = np.where(finite, weights, 0) / np.sum(np.where(finite, weights, 0), axis=-1, keepdims=True)
    tokens, logprobs = draw_jit(logits, uniform, filters, "xla")
    picked = probs[np.arange(16), tokens]
    assert np.all(picked > 0)
    np.testing.assert_allclose(logprobs, np.log(picked), atol=1e-5)
    # the uniform number lies in the token's piece of the CDF, up to the rounding of a float32 sum
    end = np.cumsum(probs, -1)[np.arange(16), tokens]
    assert np.all((uniform < end + 1e-5) & (uniform > end - picked - 1e-5))


def test_frequencies():
    """Chi-square of 20,000 draws of one row, at most four standard deviations above its mean."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=V), jnp.float32)
    num = 20_000
    tokens, _ = jax.jit(sample_tokens)(jnp.broadcast_to(logits, (num, V)), jax.random.key(0))
    expected = num * np.asarray(jax.nn.softmax(logits), np.float64)
    chi_square = np.sum((np.bincount(tokens, minlength=V) - expected) ** 2 / expected)
    assert chi_square < V - 1 + 4 * np.sqrt(2 * (V - 1))


@pytest.mark.parametrize("vocab", [V, 4200])  # one piece, or two or three of them
@pytest.mark.parametrize("filters", [Filters(), ALL, ALL._replace(greedy=True)], ids=["none", "all", "greedy"])
@pytest.mark.parametrize("implementation", ["reference", *KERNELS])
def test_versions_agree(implementation, filters, vocab):
    """More rows than a block, rows without a distribution among them. The uniform numbers lie on no border."""
    logits, uniform = make(3, 3.0, num_rows=9, vocab=vocab)
    logits[2], logits[3, 7], logits[4, 5] = -np.inf, np.nan, np.inf
    tokens, logprobs = draw_jit(logits, uniform, filters, "xla")
    assert np.all(tokens[2:5] == -1) and np.all(np.isnan(logprobs[2:5]))
    assert np.all(tokens[5:] >= 0) and np.all(np.isfinite(logprobs[5:]))
    others = draw_jit(logits, uniform, filters, implementation)
    np.testing.assert_array_equal(others[0], tokens)
    np.testing.assert_allclose(others[1], logprobs, atol=1e-5)  # rounding of a sum of 4200 weights


@pytest.mark.parametrize("implementation", ["xla", "reference", *KERNELS])
def test_ends_of_the_unit_interval(implementation):
    logits = jnp.full((2, V), -jnp.inf).at[:, jnp.array([7, 130, 290])].set(0.0)
    tokens, _ = draw_jit(logits, jnp.array([0.0, 1 - 2**-24]), Filters(), implementation)
    assert tokens.tolist() == [7, 290]


def test_half_precision_and_groups_of_rows():
    """A CPU takes 109 rows of 300 at a time; bfloat16 logits are worked on in float32."""
    logits, uniform = make(5, 2.0, num_rows=250)
    logits = jnp.asarray(logits, jnp.bfloat16)
    whole = draw_jit(logits.astype(jnp.float32), uniform, ALL, "reference")
    tokens, logprobs = draw_jit(logits, uniform, ALL, "xla")
    np.testing.assert_array_equal(tokens, whole[0])
    np.testing.assert_allclose(logprobs, whole[1], atol=1e-5)


def test_temperature_zero_and_greedy():
    logits = jnp.asarray([[0.0, 2.0, 2.0, -jnp.inf], [-1.0, -3.0, -2.0, -jnp.inf]])
    tokens, logprobs = sample_tokens(logits, jax.random.key(0), temperature=0, top_p=0.5)
    assert tokens.tolist() == [1, 0] and logprobs.tolist() == [0, 0]
    tokens, logprobs = sample_tokens(logits, jax.random.key(0), temperature=2.0, greedy=True)
    assert tokens.tolist() == [1, 0]
    np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits / 2)[jnp.arange(2), tokens], atol=1e-6)


def test_keys():
    """Typed or raw, one or a key per row: the same uniform numbers, and a row depends on its own key alone."""
    logits, _ = make(1, 1.0)
    key = jax.random.key(3)
    keys = jax.random.split(key, 16)
    tokens, _ = sample_tokens(logits, key)
    for other in (keys, jax.random.key_data(key), jax.random.key_data(keys)):
        np.testing.assert_array_equal(sample_tokens(logits, other)[0], tokens)
    np.testing.assert_array_equal(sample_tokens(logits[5:7], keys[5:7])[0], tokens[5:7])
    uniform = jax.vmap(jax.random.uniform)(keys)
    np.testing.assert_array_equal(draw(logits, uniform, Filters())[0], tokens)
    assert sample_tokens(jnp.zeros((0, V)), key)[0].shape == (0,)


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


def test_tpu_kernel_has_no_races():
    """Two blocks of rows of two pieces, under the interpreter that watches every access to memory."""
    logits, uniform = make(7, 3.0, num_rows=9, vocab=2100)
    # what lies beyond the array starts as NaN, so that reading there would show
    watched = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    filters = Filters(top_k=40)
    tokens, logprobs = on_tpu(jnp.asarray(logits), jnp.asarray(uniform), filters=filters, interpret=watched)
    expected = draw_jit(logits, uniform, filters, "xla")
    np.testing.assert_array_equal(tokens, expected[0])
    np.testing.assert_allclose(logprobs, expected[1], atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_with_the_kernel_of_the_platform(platform, dtype):
    logits = jax.ShapeDtypeStruct((64, 152064), dtype)
    keys = jax.ShapeDtypeStruct((64, 2), jnp.uint32)
    sample = functools.partial(sample_tokens, temperature=0.7, top_k=50, top_p=0.9, min_p=0.05)
    text = export_for(platform, sample, logits, keys).mlir_module()
    assert "@tpu_custom_call" in text if platform == "tpu" else "__gpu$xla.gpu.triton" in text
    if platform == "cuda":
        text = export_for(platform, functools.partial(sample, implementation="mosaic_gpu"), logits, keys).mlir_module()
        assert "@mosaic_gpu_v2(" in text and "triton" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": jnp.zeros(3)}, r"logits must be floating point of shape \[N, V\], V at least 1, got float32 \[3\]"),
        ({"logits": jnp.zeros((2, 3), int)}, "logits must be floating point"),
        ({"logits": jnp.zeros((2, 0))}, "V at least 1"),
        ({"temperature": -1.0}, "temperature must be 0 or positive and finite, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be 0 or positive"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1, or None to keep all, got 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, "top_p must lie in"),
        ({"min_p": 1.0}, r"min_p must lie in \[0, 1\), got 1.0"),
        ({"key": jax.random.split(jax.random.key(0), 3)}, r"a key for each of the 2 rows, got keys of shape \(3,\)"),
        ({"key": jnp.zeros(2)}, "key must be a jax.random key, or raw as uint32 with a last axis of 2, got float32"),
        ({"implementation": "cuda"}, 'implementation must be None or one of "xla"'),
        ({"logits": jnp.zeros((8, 10**6)), "key": jax.random.split(jax.random.key(0), 8)}, "needs a vocabulary"),
    ],
)
def test_says_what_does_not_fit(change, message):
    arguments = {"logits": jnp.zeros((2, 3)), "key": jax.random.key(0), **change}
    if "needs" in message:
        arguments["implementation"] = "pallas_tpu"
    with pytest.raises(ValueError, match=message):
        sample_tokens(**arguments)


def test_filter_logits_needs_a_temperature():
    with pytest.raises(ValueError, match="temperature must be positive to give logits, got 0"):
        filter_logits(jnp.zeros((2, 3)), temperature=0)
