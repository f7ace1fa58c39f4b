"""Losses, weights and divergences: values and gradients against loops in float64, to 2e-5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import ops
from tests.ops import oracles
from tests.ops.oracles import (
    ADVANTAGES,
    AGGREGATIONS,
    IDS,
    LOGPROBS,
    MASK,
    OLD,
    REWARDS,
    TOLERANCE,
    VALUES,
    WEIGHTS,
    B,
    T,
    V,
    X,
    compare,
)


def compare_loss(op, tokens, *points, **options):
    """A loss under every aggregation; `tokens(x)` are its per-token terms, `points` the other arrays of the op."""

    def losses(x):
        arrays = map(jnp.asarray, points or (OLD, ADVANTAGES))
        arguments = (x, *arrays, jnp.asarray(MASK))
        return jnp.stack(
            [
                op(*arguments, agg=agg, weights=jnp.asarray(WEIGHTS), **extra, **options)[0]
                for agg, extra in AGGREGATIONS
            ]
        )

    compare(
        losses,
        lambda x: np.array([oracles.loss(tokens(x), MASK, WEIGHTS, agg=agg, **extra) for agg, extra in AGGREGATIONS]),
        VALUES if points else LOGPROBS,
    )


def test_ppo_clip_loss():
    compare_loss(ops.ppo_clip_loss, lambda x: oracles.ppo_tokens(x, OLD, ADVANTAGES))
    compare_loss(
        ops.ppo_clip_loss,
        lambda x: oracles.ppo_tokens(x, OLD, ADVANTAGES, 0.1, 0.15, 1.2, 1.25),
        clip_low=0.1,
        clip_high=0.15,
        dual_clip=1.2,
        ratio_max=1.25,
    )


def test_ppo_metrics():
    _, metrics = jax.jit(lambda *xs: ops.ppo_clip_loss(*xs, dual_clip=1.2))(LOGPROBS, OLD, ADVANTAGES, MASK)
    ratio, a = np.exp(LOGPROBS - OLD)[MASK], ADVANTAGES[MASK]
    plain, clipped = -ratio * a, -np.clip(ratio, 0.8, 1.2) * a
    expected = {
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "clip_fraction": np.mean(clipped > plain),
        "approx_kl_k1": -np.log(ratio).mean(),
        "approx_kl_k3": np.mean(ratio - 1 - np.log(ratio)),
        "dual_clip_fraction": np.mean((a < 0) & (np.maximum(plain, clipped) > -1.2 * a)),
    }
    assert metrics.keys() == expected.keys() and 0 < expected["clip_fraction"] and 0 < expected["dual_clip_fraction"]
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, err_msg=name, **TOLERANCE)


def test_gspo_loss():
    """Equal to direct differentiation of the sequence ratio where the advantage is constant over the sequence."""
    constant = np.repeat(ADVANTAGES[:, :1], T, axis=1)
    for options in ({"clip_low": 0.9, "clip_high": 9.0}, {"clip_low": 0.01, "clip_high": 0.02}):
        low, high = options.values()
        compare(
            lambda x, options=options: ops.gspo_loss(
                x, jnp.asarray(OLD), jnp.asarray(constant), jnp.asarray(MASK), **options
            )[0],
            lambda x, low=low, high=high: oracles.loss(
                oracles.gspo_tokens(x, OLD, constant, MASK, low, high), MASK, agg="seq"
            ),
            LOGPROBS,
            cotangent=1.0,
        )


def test_gspo_of_a_rollout_in_pieces():
    """With rollout_ids, cutting a sequence in two changes neither loss nor gradient under agg="rollout"."""
    whole = [jnp.asarray(y) for y in (LOGPROBS, OLD, np.repeat(ADVANTAGES[:, :1], T, axis=1), MASK)]
    first, second = (jnp.asarray(MASK & half) for half in (np.arange(T) < 3, np.arange(T) >= 3))
    pieces = [jnp.concatenate([y, y]) for y in whole[:3]] + [jnp.concatenate([first, second])]
    options = {"agg": "rollout", "clip_low": 0.02, "clip_high": 0.02}

    def graded(args, ids):
        loss = lambda x: ops.gspo_loss(x, *args[1:], rollout_ids=jnp.asarray(ids), **options)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(args[0])

    (expected, expected_gradient), (value, gradient) = (
        graded(whole, np.arange(B)),
        graded(pieces, np.tile(np.arange(B), 2)),
    )
    np.testing.assert_allclose(value, expected, **TOLERANCE)
    np.testing.assert_allclose(gradient[:B] + gradient[B:], expected_gradient, **TOLERANCE)


def test_cispo_and_reinforce():
    ratio = np.exp(LOGPROBS - OLD)
    compare_loss(ops.cispo_loss, lambda x: -np.minimum(ratio, 1.1) * ADVANTAGES * x, clip_high=0.1)
    compare_loss(ops.cispo_loss, lambda x: -np.clip(ratio, 0.9, 1.1) * ADVANTAGES * x, clip_low=0.1, clip_high=0.1)
    compare_loss(ops.reinforce_loss, lambda x: -ADVANTAGES * x)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("outside", ["clip", "zero"])
@pytest.mark.parametrize("normalize", [False, True])
def test_importance_weights(level, outside, normalize):
    expected = np.zeros((B, T))
    for b, t in oracles.true_entries(MASK):
        d = LOGPROBS[b] - OLD[b]
        w = np.exp(d[t] if level == "token" else d[MASK[b]].sum())
        inside = 0.8 <= w <= 1.2
        expected[b, t] = np.clip(w, 0.8, 1.2) if outside == "clip" else w * inside
    if normalize:
        rows = expected[MASK] if level == "token" else [expected[b, oracles.actions(MASK[b])[0]] for b in range(B)]
        expected /= np.mean(rows)
    options = {"level": level, "outside": outside, "cap": 1.2, "floor": 0.8, "normalize": normalize}
    weights = jax.jit(lambda *xs: ops.importance_weights(*xs, **options))(LOGPROBS, OLD, MASK)
    np.testing.assert_allclose(weights, expected, **TOLERANCE)


@pytest.mark.parametrize(
    "strategy, value", [("percentile", 0.9), ("percentile", 0.5), ("constant", 0.1), ("power", 0.4)]
)
def test_shape_ratio(strategy, value):
    ratio = np.exp(LOGPROBS - OLD)
    offsets = oracles.shape_offsets(ratio, MASK, strategy, value)
    compare(
        lambda x: ops.shape_ratio(x, jnp.asarray(MASK), strategy=strategy, value=value),
        lambda x: oracles.shape_ratio(x, MASK, strategy, value, offsets),
        ratio,
    )


@pytest.mark.parametrize("form", ["surrogate", "squared"])
@pytest.mark.parametrize("baseline", ["mean", "logsumexp"])
def test_mirror_descent_loss(form, baseline):
    rng = np.random.default_rng(1)
    seq, ref = rng.normal(size=B), rng.normal(size=B)
    compare(
        lambda x: ops.mirror_descent_loss(
            x, *map(jnp.asarray, (ref, REWARDS, IDS)), tau=0.3, form=form, baseline=baseline
        )[0],
        lambda x: oracles.mirror_descent(x, ref, REWARDS, IDS, 0.3, form, baseline),
        seq,
        cotangent=1.0,
    )


def test_value_loss():
    rng = np.random.default_rng(1)
    old = VALUES + 0.3 * rng.normal(size=(B, T))

    def oracle(v, clip):
        plain = (v - X) ** 2
        return plain / 2 if clip is None else np.maximum(plain, (np.clip(v, old - clip, old + clip) - X) ** 2) / 2

    for clip in (None, 0.2):
        compare_loss(ops.value_loss, lambda v, clip=clip: oracle(v, clip), old, X, clip=clip)
    _, metrics = jax.jit(lambda *xs: ops.value_loss(*xs, clip=0.2))(VALUES, old, X, MASK)
    explained = 1 - oracles.variance((X - VALUES)[MASK]) / oracles.variance(X[MASK])
    np.testing.assert_allclose(metrics["explained_variance"], explained, **TOLERANCE)
    np.testing.assert_allclose(
        metrics["value_clip_fraction"], np.mean((oracle(VALUES, 0.2) > (VALUES - X) ** 2 / 2)[MASK]), **TOLERANCE
    )


def test_sft_loss():
    rng = np.random.default_rng(1)
    rows = rng.uniform(0, 1, B)
    compare(
        lambda x: ops.sft_loss(x, jnp.asarray(MASK), agg="seq", weights=jnp.asarray(rows))[0],
        lambda x: oracles.loss(-x, MASK, rows[:, None], agg="seq"),
        LOGPROBS,
        cotangent=1.0,
    )
    compare(
        lambda x: ops.sft_loss(x, jnp.asarray(MASK), kind="dft", weights=jnp.asarray(WEIGHTS))[0],
        lambda x: oracles.loss(-x * np.exp(LOGPROBS), MASK, WEIGHTS),
        LOGPROBS,
        cotangent=1.0,
    )


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_token_cross_entropy(shift):
    rng = np.random.default_rng(1)
    logits, targets = rng.normal(size=(B, T, V)), rng.integers(0, V, (B, T))
    targets[0, 0] = -100  # under a false mask anything may stand

    def oracle(logits):
        scores = oracles.log_softmax(logits)
        terms = [-scores[b, t - shift, targets[b, t]] for b, t in oracles.true_entries(MASK) if t >= shift]
        return oracles.mean(terms)

    compare(
        lambda x: ops.token_cross_entropy(x, jnp.asarray(targets), jnp.asarray(MASK), shift=shift)[0],
        oracle,
        logits,
        cotangent=1.0,
    )


def test_divergences():
    rng = np.random.default_rng(1)
    p, q = rng.normal(size=(2, 3, V)), rng.normal(size=(2, 3, V))

    def kl(p, q):
        p, q = oracles.log_softmax(p), oracles.log_softmax(q)
        return np.sum(np.exp(p) * (p - q), axis=-1)

    def entropy(p):
        return -np.sum(np.exp(oracles.log_softmax(p)) * oracles.log_softmax(p), axis=-1)

    def jensen_shannon(p, q):
        m = (p + q) / 2
        return (np.sum(p * np.log2(p / m), axis=-1) + np.sum(q * np.log2(q / m), axis=-1)) / 2

    compare(ops.token_entropy, entropy, p)
    compare(ops.categorical_kl, kl, p, q)
    compare(ops.symmetric_kl, lambda p, q: kl(p, q) + kl(q, p), p, q)
    compare(ops.jensen_shannon, jensen_shannon, np.exp(oracles.log_softmax(p)), np.exp(oracles.log_softmax(q)))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs", "k1+", "k3+"])
def test_kl_estimate(kind):
    value = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: np.exp(-d) - 1 + d, "abs": np.abs}
    fixed = value[kind[:2] if kind != "abs" else kind](LOGPROBS - OLD)

    def oracle(x):
        if kind.endswith("+"):  # the value is fixed, what moves is k2
            return fixed + (x - OLD) ** 2 / 2 - (LOGPROBS - OLD) ** 2 / 2
        return value[kind](x - OLD)

    compare(lambda x: ops.kl_estimate(x, jnp.asarray(OLD), kind=kind), oracle, LOGPROBS)
