"""The masked recurrence against a float64 loop, its gradients, and what is built on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from jaxrl_kernels import scan_hopper
from jaxrl_kernels.dispatch import export_for
from jaxrl_kernels.scan import _pallas_tpu, discounted_scan
from jaxrl_llm import ops

HERE = ["xla", "associative", "reference", "interpret_tpu", "interpret_gpu", "interpret_mosaic"]
# Float32 against float64: discounts of at most 1 over at most 300 terms of order 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def oracle(values, discount, mask, segment_ids, reverse=True):
    """The definition in float64, entry by entry."""
    result = np.zeros(values.shape)
    discount = np.broadcast_to(np.float64(discount), values.shape)
    for b, (row, factor, counts, ids) in enumerate(zip(values, discount, mask, segment_ids, strict=True)):
        state, current = 0.0, None
        for t in reversed(range(len(row))) if reverse else range(len(row)):
            if ids[t] != current:
                state, current = 0.0, ids[t]
            if counts[t]:
                state = result[b, t] = row[t] + factor[t] * state
    return result


def make(rows, length, seed=0, density=0.6):
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, length)) < density
    segments = np.cumsum(rng.random((rows, length)) < 0.1, axis=1)
    values = np.where(mask, rng.normal(size=mask.shape), np.nan).astype(np.float32)
    discount = np.where(mask, rng.uniform(0.5, 1, mask.shape), np.nan).astype(np.float32)
    return values, discount, mask, segments


@functools.partial(jax.jit, static_argnames=("reverse", "implementation"))
def scan(values, discount, mask, segments, reverse=True, implementation="xla"):
    return discounted_scan(
        values, discount, mask=mask, segment_ids=segments, reverse=reverse, implementation=implementation
    )


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("implementation", HERE)
def test_masks_and_segments(implementation, reverse, monkeypatch):
    """Rows and lengths that fill no block; one row without a true entry, one with all. NaN stands where none may look.
    The plain definition is unrolled, so it gets a short row."""
    monkeypatch.setattr(scan_hopper, "CHUNK", 256)
    length = 9 if implementation == "reference" else 300
    values, discount, mask, segments = make(5, length)
    mask[3], mask[4] = False, True
    values[4], discount[4] = 1.0, 0.9
    result = scan(values, discount, mask, segments, reverse, implementation)
    np.testing.assert_allclose(result, oracle(values, discount, mask, segments, reverse), **CLOSE)
    assert not np.any(np.asarray(result)[~mask])


@pytest.mark.parametrize("implementation", ["xla", "interpret_tpu", "interpret_gpu"])
def test_several_blocks_and_a_number_as_discount(implementation):
    """More rows and entries than one block of any version; bfloat16 is summed in float32; no mask, no segments."""
    values = jnp.asarray(np.random.default_rng(1).normal(size=(33, 1100)), jnp.bfloat16)
    everywhere = np.ones(values.shape, bool)
    result = scan(values, 0.97, None, None, True, implementation)
    assert result.dtype == jnp.float32
    exact = np.asarray(values.astype(jnp.float32), np.float64)
    # one row is enough for an oracle in plain Python, the first and the last one cover both row blocks
    for row in (0, 32):
        expected = oracle(exact[row : row + 1], 0.97, everywhere[:1], np.zeros((1, 1100)))
        np.testing.assert_allclose(result[row : row + 1], expected, **CLOSE)


@given(seed=st.integers(0, 2**31 - 1), density=st.sampled_from([0.0, 0.2, 1.0]), reverse=st.booleans())
@settings(max_examples=10)
def test_random_patterns(seed, density, reverse):
    values, discount, mask, segments = make(3, 37, seed, density)
    expected = oracle(values, discount, mask, segments, reverse)
    for implementation in ("xla", "interpret_gpu"):
        np.testing.assert_allclose(scan(values, discount, mask, segments, reverse, implementation), expected, **CLOSE)


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("implementation", ["xla", "interpret_tpu", "interpret_gpu", "interpret_mosaic"])
def test_gradients(implementation, reverse):
    """Both gradients are those of a linear function of values and a polynomial in discounts: central differences of the
    float64 oracle are exact but for their own rounding. And exactly 0 under the mask."""
    values, discount, mask, segments = make(2, 12)
    weights = np.random.default_rng(2).normal(size=mask.shape).astype(np.float32)

    @jax.jit
    def both(values, discount):
        def loss(values, discount):
            return jnp.sum(weights * scan(values, discount, mask, segments, reverse, implementation))

        return jax.grad(loss, argnums=(0, 1))(values, discount)

    clean = [np.where(mask, x, 0).astype(np.float64) for x in (values, discount)]
    for which, gradient in enumerate(both(values, discount)):
        expected = np.zeros(mask.shape)
        for place in np.ndindex(mask.shape):
            sides = []
            for change in (1e-3, -1e-3):
                moved = [x.copy() for x in clean]
                moved[which][place] += change
                sides.append(np.sum(weights * oracle(*moved, mask, segments, reverse)))
            expected[place] = (sides[0] - sides[1]) / 2e-3
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)
        assert not np.any(np.asarray(gradient)[~mask])


def test_gradient_of_a_number():
    values, _, mask, segments = make(2, 12)
    gradient = jax.grad(lambda d: jnp.sum(scan(values, d, mask, segments)))(0.9)
    clean = np.where(mask, values, 0).astype(np.float64)
    sides = [np.sum(oracle(clean, d, mask, segments)) for d in (0.9 + 1e-4, 0.9 - 1e-4)]
    np.testing.assert_allclose(gradient, (sides[0] - sides[1]) / 2e-4, rtol=1e-4)


def test_serves_returns_and_advantages():
    """`ops.reverse_discounted_sum` and generalized advantages are this scan."""
    values, discount, mask, _ = make(4, 50)
    np.testing.assert_allclose(
        scan(values, discount, mask, None), ops.reverse_discounted_sum(values, mask, discount), **CLOSE
    )
    critic = np.random.default_rng(3).normal(size=mask.shape).astype(np.float32)
    deltas = ops.gae_advantages(values, critic, mask, gamma=0.9, lam=0.0)
    advantages = ops.gae_advantages(values, critic, mask, gamma=0.9, lam=0.8)
    np.testing.assert_allclose(scan(deltas, 0.72, mask, None), advantages, **CLOSE)


def test_tpu_kernel_has_no_races():
    """Two row blocks of three blocks each, under the interpreter that watches every access to memory."""
    values, discount, mask, _ = make(33, 1100)
    run = functools.partial(_pallas_tpu, reverse=True, keep_state=False)
    inputs = jnp.asarray(values), jnp.asarray(discount), jnp.asarray(mask, jnp.int8)
    # the block that reaches beyond the array starts as NaN, so that reading there would show
    watched = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    np.testing.assert_allclose(
        run(*inputs, interpret=watched), scan(values, discount, mask, None), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_with_the_kernel_of_the_platform(platform):
    values = jax.ShapeDtypeStruct((64, 8192), jnp.float32)
    text = export_for(platform, jax.grad(lambda x: jnp.sum(discounted_scan(x, 0.9))), values).mlir_module()
    assert "@tpu_custom_call" in text if platform == "tpu" else "__gpu$xla.gpu.triton" in text


def test_lowers_the_hopper_kernel_by_name():
    values, mask = (jax.ShapeDtypeStruct((64, 1000), dtype) for dtype in (jnp.bfloat16, bool))

    def loss(values, discount, mask):
        return jnp.sum(discounted_scan(values, discount, mask=mask, implementation="mosaic_gpu"))

    text = export_for("cuda", jax.grad(loss, (0, 1)), values, values, mask).mlir_module()
    assert "@mosaic_gpu_v2(" in text and "triton" not in text


def test_empty():
    assert discounted_scan(jnp.zeros((0, 3)), 0.9).shape == (0, 3)
    assert discounted_scan(jnp.zeros((3, 0)), 0.9).shape == (3, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": jnp.zeros(3)}, r"values must be floating point of shape \[B, T\], got float32 \[3\]"),
        ({"discount": jnp.zeros((2, 4))}, r"discount must have the shape of values, \[2, 3\], got \[2, 4\]"),
        ({"mask": jnp.zeros((2, 3))}, "mask must be boolean, got float32"),
        ({"segment_ids": jnp.zeros((2, 4), int)}, r"segment_ids must have the shape of values, \[2, 3\], got \[2, 4\]"),
        ({"segment_ids": jnp.zeros((2, 3))}, "segment_ids must be integers"),
        ({"implementation": "cuda"}, 'implementation must be None or one of "xla"'),
    ],
)
def test_says_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        discounted_scan(**{"values": jnp.zeros((2, 3)), "discount": 0.9, **change})
