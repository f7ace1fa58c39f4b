"""One pass against the ops that it stands in for, and against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxrl_kernels import policy_loss, policy_loss_hopper
from jaxrl_kernels.dispatch import export_for
from jaxrl_kernels.policy_loss import fused_policy_loss
from jaxrl_llm import ops

HERE = ["xla", "reference", "interpret_tpu", "interpret_gpu", "interpret_mosaic"]
# Sums of float32 taken in another order.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def make(rows=5, length=70, seed=0):
    """Log-probs (own, old, reference), advantages, mask, entropy and weights; NaN where no one may look."""
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, length)) < 0.6
    mask[rows // 2] = False
    own, noise, other, advantages, entropy, weights = rng.normal(size=(6, rows, length))
    arrays = own, own + 0.3 * noise, advantages, own + 0.5 * other, entropy**2, weights**2
    own, old, advantages, ref, entropy, weights = (np.where(mask, x, np.nan).astype(np.float32) for x in arrays)
    return own, old, advantages, mask, ref, entropy, weights


def ours(own, entropy, rest, implementation, kl_kind="k3", dual_clip=3.0, **reduction):
    old, advantages, mask, ref, weights = rest
    return fused_policy_loss(
        own,
        old,
        advantages,
        mask,
        clip_high=0.28,
        dual_clip=dual_clip,
        ref_logprobs=ref,
        kl_coefficient=0.1,
        kl_kind=kl_kind,
        entropy=entropy,
        entropy_coefficient=0.01,
        weights=weights,
        implementation=implementation,
        **reduction,
    )


def theirs(own, entropy, rest, kl_kind="k3", dual_clip=3.0, **reduction):
    old, advantages, mask, ref, weights = rest
    reduction["weights"] = weights
    loss, metrics = ops.ppo_clip_loss(own, old, advantages, mask, clip_high=0.28, dual_clip=dual_clip, **reduction)
    kl = ops.kl_estimate(own, ref, kind=kl_kind, mask=mask)
    loss += 0.1 * ops.reduce_loss(kl, mask, **reduction) - 0.01 * ops.reduce_loss(entropy, mask, **reduction)
    return loss, metrics | {"kl": ops.masked_mean(kl, mask), "entropy": ops.masked_mean(entropy, mask)}


def compare(implementations, **options):
    own, old, advantages, mask, ref, entropy, weights = make()
    rest = old, advantages, mask, ref, weights
    differentiate = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    (loss, metrics), gradients = jax.jit(differentiate(lambda *x: theirs(*x, rest, **options)))(own, entropy)
    for implementation in implementations:
        run = jax.jit(differentiate(functools.partial(ours, rest=rest, implementation=implementation, **options)))
        (value, found), grads = run(own, entropy)
        np.testing.assert_allclose(value, loss, **CLOSE)
        assert set(found) == set(metrics)
        for name, number in metrics.items():
            np.testing.assert_allclose(found[name], number, err_msg=name, **CLOSE)
        for gradient, expected in zip(grads, gradients, strict=True):
            np.testing.assert_allclose(gradient, expected, **CLOSE)
            assert not np.any(np.asarray(gradient)[~mask])


@pytest.mark.parametrize(
    "reduction",
    [
        {"agg": "token"},
        {"agg": "seq"},
        {"agg": "seq_sum"},
        {"agg": "const", "max_len": 9},
        {"agg": "rollout", "rollout_ids": jnp.array([7, 1, 7, -1, 1])},
        {"agg": "seq", "denominator": 11.0},
    ],
    ids=lambda reduction: " ".join(key for key in (reduction["agg"], *reduction) if key != "agg"),
)
def test_every_reduction_as_in_ops(reduction):
    compare(["xla"], **reduction)


@pytest.mark.parametrize("kl_kind", ["k1", "k2", "abs", "k1+", "k3+"])
def test_every_estimate_of_kl_as_in_ops(kl_kind):
    compare(["xla"], kl_kind=kl_kind, dual_clip=None)


def test_every_implementation_as_in_ops(monkeypatch):
    """With blocks so small that a row takes several, the last of them in part."""
    monkeypatch.setattr(policy_loss, "GPU_CHUNK", 32)
    monkeypatch.setattr(policy_loss_hopper, "CHUNK", 32)
    compare(HERE, agg="seq")


def test_tpu_kernel_over_several_blocks_has_no_races():
    """Two row blocks of two blocks each, under the interpreter that watches every access to memory."""
    own, old, advantages, mask, ref, entropy, weights = (jnp.asarray(x) for x in make(33, 600))
    inputs = policy_loss.Inputs(old, advantages, mask, jnp.full((1, 1), 0.1), ref, entropy, weights)
    terms = policy_loss.Terms(0.2, 0.2, None, "k3")
    watched = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    found = policy_loss._pallas_tpu(own, inputs, terms=terms, interpret=watched)
    for x, expected in zip(found, policy_loss._xla(own, inputs, terms=terms), strict=True):
        np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)


def test_against_float64():
    """Value and derivative written out: the ratio where it is not clipped, and the slope of k3."""
    own, old, advantages, mask, ref, *_ = make()
    x, o, a, r = (np.where(mask, y, 0).astype(np.float64) for y in (own, old, advantages, ref))
    ratio, number = np.exp(x - o), mask.sum()
    clipped = -a * np.clip(ratio, 0.8, 1.2)
    terms = np.maximum(-a * ratio, clipped) + 0.1 * (np.exp(r - x) - 1 + x - r)
    slopes = np.where(clipped > -a * ratio, 0, -a * ratio) + 0.1 * (1 - np.exp(r - x))
    run = jax.value_and_grad(
        lambda own: fused_policy_loss(own, old, advantages, mask, ref_logprobs=ref, kl_coefficient=0.1)[0]
    )
    value, gradient = jax.jit(run)(own)
    np.testing.assert_allclose(value, np.sum(terms * mask) / number, **CLOSE)
    np.testing.assert_allclose(gradient, slopes * mask / number, **CLOSE)


@pytest.mark.parametrize("implementation", HERE)
def test_empty_mask_gives_zero(implementation):
    zeros = jnp.full((2, 3), jnp.nan)
    run = jax.value_and_grad(functools.partial(fused_policy_loss, implementation=implementation), has_aux=True)
    (loss, metrics), gradient = jax.jit(run)(zeros, zeros, zeros, jnp.zeros((2, 3), bool))
    assert loss == 0 and not np.any(gradient) and not any(np.asarray(list(metrics.values())))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_with_the_kernel_of_the_platform(platform):
    own, *_ = arrays = [jax.ShapeDtypeStruct((64, 8192), dtype) for dtype in (jnp.bfloat16, jnp.float32)]
    mask = jax.ShapeDtypeStruct(own.shape, bool)
    run = jax.value_and_grad(fused_policy_loss, has_aux=True)
    text = export_for(platform, run, own, own, arrays[1], mask).mlir_module()
    assert "@tpu_custom_call" in text if platform == "tpu" else "__gpu$xla.gpu.triton" in text


@pytest.mark.parametrize("kl_kind", ["k1+", "k3"])
def test_lowers_the_hopper_kernel_by_name(kl_kind):
    tokens, mask = (jax.ShapeDtypeStruct((64, 1000), dtype) for dtype in (jnp.bfloat16, bool))

    def loss(own, entropy, rest):
        return ours(own, entropy, rest, "mosaic_gpu", kl_kind)

    run, rest = jax.value_and_grad(loss, (0, 1), has_aux=True), (tokens, tokens, mask, tokens, tokens)
    text = export_for("cuda", run, tokens, tokens, rest).mlir_module()
    assert "@mosaic_gpu_v2(" in text and "triton" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": jnp.zeros(3)}, r"logprobs must be floating point of shape \[B, T\]"),
        ({"advantages": jnp.zeros((2, 1))}, r"advantages must have the shape of logprobs, \[2, 3\], got \[2, 1\]"),
        ({"mask": jnp.zeros((2, 3))}, "mask must be boolean"),
        ({"agg": "mean"}, "agg must be one of 'token'"),
        ({"kl_kind": "k4"}, "kl_kind must be one of 'k1'"),
        ({"clip_low": 1.0}, r"clip_low must lie in \[0, 1\)"),
        ({"dual_clip": 0.5}, "dual_clip must be greater than 1"),
        ({"agg": "const"}, "needs max_len"),
        ({"agg": "rollout"}, "needs rollout_ids"),
        ({"agg": "rollout", "rollout_ids": jnp.zeros(3, int)}, r"rollout_ids must have shape \[2\], got \[3\]"),
        ({"implementation": "cuda"}, 'implementation must be None or one of "xla"'),
    ],
)
def test_says_what_does_not_fit(change, message):
    zeros = jnp.zeros((2, 3))
    arrays = {"logprobs": zeros, "old_logprobs": zeros, "advantages": zeros, "mask": zeros == 0}
    with pytest.raises(ValueError, match=message):
        fused_policy_loss(**{**arrays, **change})
