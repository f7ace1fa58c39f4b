"""Values and gradients of reductions, estimators and losses against loops in float64, to 2e-5.

Float32 resolves 6e-8; the sums here are of at most 24 terms of size one, so 2e-5 leaves room for exp and for division by a
small std, and for nothing else.
"""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import ops
from jaxrl_llm.ops import groups
from tests.ops import oracles
from tests.ops.oracles import numerical_gradient

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
B, T, K, V = 5, 6, 3, 4
RNG = np.random.default_rng(3)
MASK = np.array([[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]], bool)
X, WEIGHTS, VALUES = RNG.normal(size=(B, T)), RNG.uniform(0.5, 2, (B, T)), RNG.normal(size=(B, T))
LOGPROBS = -RNG.uniform(0.1, 3, (B, T))
OLD = LOGPROBS + 0.25 * RNG.normal(size=(B, T))
ADVANTAGES = RNG.normal(size=(B, T))
REWARDS, IDS = RNG.normal(size=B), np.array([4, 4, 4, -3, -3])
TURN_IDS = np.array([[-1, 0, 0, -1, 1, -1], [0, 0, -1, -1, 1, 2], [-1, -1, 0, 0, -1, -1], [-1] * 5 + [0], [0, 0, 1, 1, 2, 2]])
TURN_MASK = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 1, 1]], bool)
TURN_REWARDS = RNG.normal(size=(B, K))
ROLLOUTS = np.array([0, 0, 1, 2, 2])
AGGREGATIONS = [("token", {}), ("seq", {}), ("seq_sum", {}), ("const", {"max_len": 7}), ("rollout", {"rollout_ids": ROLLOUTS})]


def compare(function, oracle, *points, cotangent=None):
    """Values at `points`, then the gradient with respect to each, of the dot product with a fixed cotangent."""
    expected = np.asarray(oracle(*points))
    weights = np.random.default_rng(0).normal(size=expected.shape) if cotangent is None else cotangent

    def total(*xs):
        value = function(*xs)
        return jnp.sum(value * weights), value

    graded = jax.jit(jax.value_and_grad(total, argnums=tuple(range(len(points))), has_aux=True))
    (_, value), gradients = graded(*(jnp.asarray(point, jnp.float32) for point in points))
    np.testing.assert_allclose(value, expected, **TOLERANCE)
    for place, gradient in enumerate(gradients):
        def moved(x, place=place):
            return np.sum(np.asarray(oracle(*points[:place], x, *points[place + 1:])) * weights)
        np.testing.assert_allclose(gradient, numerical_gradient(moved, points[place]), **TOLERANCE)


def test_reductions():
    def moments(entries):
        total = sum(w for w, _ in entries)
        center = sum(w * v for w, v in entries) / total
        spread = sum(w * (v - center) ** 2 for w, v in entries)
        return [center * total, center, spread / (total - 1) if total > 1 else 0.0]

    def oracle(x):
        rows = [[(WEIGHTS[b, t], x[b, t]) for t in range(T) if MASK[b, t]] for b in range(B)]
        return np.array([*(moments(row) for row in rows), moments(sum(rows, []))])

    def reduced(x):
        options = {"weights": jnp.asarray(WEIGHTS)}
        columns = [[*op(x, jnp.asarray(MASK), axis=1, **options), op(x, jnp.asarray(MASK), **options)]
                   for op in (ops.masked_sum, ops.masked_mean, ops.masked_var)]
        return jnp.stack([jnp.stack(column) for column in columns], axis=1)

    compare(reduced, oracle, X)


def test_masked_softmax():
    def oracle(x):
        result = np.zeros_like(x)
        for b in range(B):
            total = sum(np.exp(x[b, t] / 0.7) for t in range(T) if MASK[b, t])
            for t in range(T):
                result[b, t] = np.exp(x[b, t] / 0.7) / total if MASK[b, t] else 0
        return result

    compare(lambda x: ops.masked_softmax(x, jnp.asarray(MASK), temperature=0.7), oracle, X)
    large = ops.masked_softmax(jnp.array([1e4, 1e4 - 1, 0.0]), jnp.array([True, True, False]))
    np.testing.assert_allclose(large, [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0], **TOLERANCE)


@pytest.mark.parametrize("power", [0.0, 1.0, 1.25])
def test_sequence_logprob(power):
    def oracle(x, ref):
        return np.array([sum(x[b, t] - ref[b, t] for t in range(T) if MASK[b, t]) / MASK[b].sum() ** power for b in range(B)])

    compare(lambda x, ref: ops.sequence_log_ratio(x, ref, jnp.asarray(MASK), length_power=power), oracle, LOGPROBS, OLD)
    compare(lambda x: ops.sequence_logprob(x, jnp.asarray(MASK), length_power=power), lambda x: oracle(x, 0 * x), LOGPROBS)


def test_aggregation():
    compare(lambda x: jnp.array([ops.aggregate_loss(x, jnp.asarray(MASK), agg=agg, **options) for agg, options in AGGREGATIONS]),
            lambda x: np.array([oracles.aggregate(x, MASK, agg, **options) for agg, options in AGGREGATIONS]), X)


@pytest.mark.parametrize("options", [
    {}, {"std_of": "centered", "ddof": 0, "singleton": "raw", "var_eps": 1e-3, "eps": 1e-2}])
def test_group_normalize(options):
    valid = np.array([1, 1, 1, 1, 0], bool)  # leaves one member in the second group
    levels = [(center, scale) for center in get_args(groups.Center) for scale in get_args(groups.Scale)]
    assert len(levels) == 12

    def normalized(x):
        return jnp.stack([ops.group_normalize(x, jnp.asarray(IDS), jnp.asarray(valid), center=center, scale=scale, **options)
                          for center, scale in levels])

    compare(normalized, lambda x: np.stack([oracles.group_normalize(x, IDS, valid, *level, **options) for level in levels]),
            REWARDS)


def test_group_stats():
    valid = np.array([1, 1, 0, 1, 1], bool)

    def oracle(x):
        members = [[x[j] for j in range(B) if valid[j] and IDS[j] == IDS[i]] for i in range(B)]
        return np.array([[oracles.mean(m) for m in members], [oracles.variance(m) ** 0.5 for m in members],
                         [len(m) for m in members]])

    compare(lambda x: jnp.stack(ops.group_stats(x, jnp.asarray(IDS), jnp.asarray(valid))), oracle, REWARDS)


@pytest.mark.parametrize("options", [{}, {"ddof": 0, "eps": 1e-5, "eps_in": "std"}, {"ids": IDS}])
def test_whitening(options):
    compare(lambda x: ops.masked_whiten(x, jnp.asarray(MASK), **options), lambda x: oracles.whiten(x, MASK, **options), X)


@pytest.mark.parametrize("how", ["mean", "sum", "max", "min"])
def test_segment_reduce(how):
    ids, valid = np.array([0, 2, 2, -1, 2]), np.array([1, 1, 1, 1, 0], bool)

    def oracle(x):
        slots = [[x[i] for i in range(B) if ids[i] == k and valid[i]] for k in range(3)]
        reduce = {"mean": oracles.mean, "sum": sum, "max": max, "min": min}[how]
        return np.array([reduce(slot) if slot else 0.0 for slot in slots])

    compare(lambda x: ops.segment_reduce(x, jnp.asarray(ids), 3, how=how, valid=jnp.asarray(valid)), oracle, REWARDS)


def test_returns():
    decay = RNG.uniform(0.2, 1, (B, T))
    for on_masked in ("skip", "reset"):
        compare(lambda x, d, on_masked=on_masked: ops.reverse_discounted_sum(x, jnp.asarray(MASK), d, on_masked=on_masked),
                lambda x, d, on_masked=on_masked: oracles.discounted_sum(x, MASK, d, on_masked), X, decay)
    compare(lambda x: ops.discounted_returns(x, jnp.asarray(MASK), gamma=0.9),
            lambda x: oracles.discounted_sum(x, MASK, np.full(MASK.shape, 0.9)), X)
    compare(lambda x: ops.reinforce_pp_advantages(x, jnp.asarray(MASK), gamma=0.9),
            lambda x: oracles.whiten(oracles.discounted_sum(x, MASK, np.full(MASK.shape, 0.9)), MASK), X)


def test_generalized_advantages():
    discounts, bootstrap = RNG.integers(0, 2, (B, T)).astype(float), RNG.normal(size=B)
    compare(lambda r, v, d, final: ops.gae_advantages(r, v, jnp.asarray(MASK), gamma=0.9, lam=0.8, discounts=d,
                                                      bootstrap=final),
            lambda r, v, d, final: oracles.gae(r, v, MASK, 0.9, 0.8, d, final), X, VALUES, discounts, bootstrap)
    compare(lambda r, v: ops.gae_advantages(r, v, jnp.asarray(MASK)), lambda r, v: oracles.gae(r, v, MASK, 1.0, 0.95), X, VALUES)


def test_vtrace():
    discounts, ratios, bootstrap = RNG.uniform(0, 1, (B, T)), np.exp(OLD - LOGPROBS), RNG.normal(size=B)
    for place, op in enumerate((ops.vtrace_targets, ops.vtrace_advantages)):
        compare(lambda r, v, final, op=op: op(r, v, jnp.asarray(discounts), jnp.asarray(ratios), rho_max=1.2, c_max=1.0,
                                              mask=jnp.asarray(MASK), bootstrap=final),
                lambda r, v, final, place=place: oracles.vtrace(r, v, discounts, ratios, MASK, final, 1.2, 1.0)[place],
                X, VALUES, bootstrap)


def test_vtrace_on_policy_is_gae_with_lambda_one():
    ones, discount = jnp.ones((B, T)), jnp.full((B, T), 0.9)
    args = jnp.asarray(X), jnp.asarray(VALUES)
    advantages = ops.gae_advantages(*args, jnp.asarray(MASK), gamma=0.9, lam=1.0)
    np.testing.assert_allclose(ops.vtrace_advantages(*args, discount, ones, mask=jnp.asarray(MASK)), advantages, **TOLERANCE)


def test_advantages_of_groups_and_turns():
    spread = np.where(MASK, 1.0, 0.0)
    loo = {"center": "leave_one_out", "scale": "none"}
    compare(lambda r: jnp.stack([op(r, jnp.asarray(IDS), jnp.asarray(MASK)) for op in (ops.grpo_advantages, ops.rloo_advantages)]),
            lambda r: np.stack([oracles.group_normalize(r, IDS, **options)[:, None] * spread for options in ({}, loo)]), REWARDS)
    compare(lambda r, g: ops.remax_advantages(r, g, jnp.asarray(MASK)), lambda r, g: (r - g)[:, None] * spread, REWARDS,
            REWARDS[::-1])
    compare(lambda r: ops.turn_advantages(r, jnp.asarray(TURN_MASK), jnp.asarray(TURN_IDS), gamma=0.9),
            lambda r: oracles.by_turn(oracles.discounted_sum(r, TURN_MASK, np.full((B, K), 0.9)), TURN_IDS), TURN_REWARDS)
    compare(lambda r: ops.dual_level_advantages(r, jnp.asarray(TURN_MASK), jnp.asarray(TURN_IDS), jnp.asarray(IDS), weight=0.3),
            lambda r: oracles.dual_level(r, TURN_MASK, TURN_IDS, IDS, weight=0.3), TURN_REWARDS)
    options = {"gamma_process": 0.9, "gamma_outcome": 0.8, "process_weight": 0.5, "outcome_weight": 2.0}
    compare(lambda p, r: jnp.stack([ops.prime_advantages(p, r, jnp.asarray(MASK), jnp.asarray(IDS), loo=loo, **options)
                                    for loo in ("paper", "code")]),
            lambda p, r: np.stack([oracles.prime(p, r, MASK, IDS, loo=loo, **options) for loo in ("paper", "code")]), X, REWARDS)


def test_kl_shaped_rewards():
    def oracle(r, x, ref):
        result = np.where(MASK, -0.3 * (x - ref), 0)
        for b in range(B):
            result[b, oracles.actions(MASK[b])[-1]] += r[b]
        return result

    compare(lambda r, x, ref: ops.kl_shaped_rewards(r, x, ref, jnp.asarray(MASK), beta=0.3), oracle, REWARDS, LOGPROBS, OLD)


def compare_loss(op, tokens, *points, **options):
    """A loss under every aggregation; `tokens(x)` are its per-token terms, `points` the other arrays of the op."""
    def losses(x):
        arrays = map(jnp.asarray, points or (OLD, ADVANTAGES))
        arguments = (x, *arrays, jnp.asarray(MASK))
        return jnp.stack([op(*arguments, agg=agg, weights=jnp.asarray(WEIGHTS), **extra, **options)[0]
                          for agg, extra in AGGREGATIONS])

    compare(losses, lambda x: np.array([oracles.loss(tokens(x), MASK, WEIGHTS, agg=agg, **extra)
                                        for agg, extra in AGGREGATIONS]), VALUES if points else LOGPROBS)


def test_ppo_clip_loss():
    compare_loss(ops.ppo_clip_loss, lambda x: oracles.ppo_tokens(x, OLD, ADVANTAGES))
    compare_loss(ops.ppo_clip_loss, lambda x: oracles.ppo_tokens(x, OLD, ADVANTAGES, 0.1, 0.15, 1.2, 1.25), clip_low=0.1,
                 clip_high=0.15, dual_clip=1.2, ratio_max=1.25)


def test_ppo_metrics():
    _, metrics = ops.ppo_clip_loss(*map(jnp.asarray, (LOGPROBS, OLD, ADVANTAGES, MASK)), dual_clip=1.2)
    ratio, a = np.exp(LOGPROBS - OLD)[MASK], ADVANTAGES[MASK]
    plain, clipped = -ratio * a, -np.clip(ratio, 0.8, 1.2) * a
    expected = {"ratio_mean": ratio.mean(), "ratio_min": ratio.min(), "ratio_max": ratio.max(),
                "clip_fraction": np.mean(clipped > plain), "approx_kl_k1": -np.log(ratio).mean(),
                "approx_kl_k3": np.mean(ratio - 1 - np.log(ratio)),
                "dual_clip_fraction": np.mean((a < 0) & (np.maximum(plain, clipped) > -1.2 * a))}
    assert metrics.keys() == expected.keys() and 0 < expected["clip_fraction"] and 0 < expected["dual_clip_fraction"]
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, err_msg=name, **TOLERANCE)


def test_gspo_loss():
    """Equal to direct differentiation of the sequence ratio where the advantage is constant over the sequence."""
    constant = np.repeat(ADVANTAGES[:, :1], T, axis=1)
    for options in ({"clip_low": 0.9, "clip_high": 9.0}, {"clip_low": 0.01, "clip_high": 0.02}):
        low, high = options.values()
        compare(lambda x, options=options: ops.gspo_loss(x, jnp.asarray(OLD), jnp.asarray(constant), jnp.asarray(MASK),
                                                         **options)[0],
                lambda x, low=low, high=high: oracles.loss(oracles.gspo_tokens(x, OLD, constant, MASK, low, high), MASK,
                                                           agg="seq"), LOGPROBS, cotangent=1.0)


def test_gspo_of_a_rollout_in_pieces():
    """With rollout_ids, cutting a sequence in two changes neither loss nor gradient under agg="rollout"."""
    whole = [jnp.asarray(y) for y in (LOGPROBS, OLD, np.repeat(ADVANTAGES[:, :1], T, axis=1), MASK)]
    first, second = (jnp.asarray(MASK & half) for half in (np.arange(T) < 3, np.arange(T) >= 3))
    pieces = [jnp.concatenate([y, y]) for y in whole[:3]] + [jnp.concatenate([first, second])]
    options = {"agg": "rollout", "clip_low": 0.02, "clip_high": 0.02}

    def graded(args, ids):
        loss = lambda x: ops.gspo_loss(x, *args[1:], rollout_ids=jnp.asarray(ids), **options)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(args[0])

    (expected, expected_gradient), (value, gradient) = graded(whole, np.arange(B)), graded(pieces, np.tile(np.arange(B), 2))
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
    weights = ops.importance_weights(*map(jnp.asarray, (LOGPROBS, OLD, MASK)), level=level, outside=outside, cap=1.2, floor=0.8,
                                     normalize=normalize)
    np.testing.assert_allclose(weights, expected, **TOLERANCE)


@pytest.mark.parametrize("strategy, value", [("percentile", 0.9), ("percentile", 0.5), ("constant", 0.1), ("power", 0.4)])
def test_shape_ratio(strategy, value):
    ratio = np.exp(LOGPROBS - OLD)
    offsets = oracles.shape_offsets(ratio, MASK, strategy, value)
    compare(lambda x: ops.shape_ratio(x, jnp.asarray(MASK), strategy=strategy, value=value),
            lambda x: oracles.shape_ratio(x, MASK, strategy, value, offsets), ratio)


@pytest.mark.parametrize("form", ["surrogate", "squared"])
@pytest.mark.parametrize("baseline", ["mean", "logsumexp"])
def test_mirror_descent_loss(form, baseline):
    seq, ref = RNG.normal(size=B), RNG.normal(size=B)
    compare(lambda x: ops.mirror_descent_loss(x, *map(jnp.asarray, (ref, REWARDS, IDS)), tau=0.3, form=form,
                                              baseline=baseline)[0],
            lambda x: oracles.mirror_descent(x, ref, REWARDS, IDS, 0.3, form, baseline), seq, cotangent=1.0)


def test_value_loss():
    old = VALUES + 0.3 * RNG.normal(size=(B, T))

    def oracle(v, clip):
        plain = (v - X) ** 2
        return plain / 2 if clip is None else np.maximum(plain, (np.clip(v, old - clip, old + clip) - X) ** 2) / 2

    for clip in (None, 0.2):
        compare_loss(ops.value_loss, lambda v, clip=clip: oracle(v, clip), old, X, clip=clip)
    _, metrics = ops.value_loss(*map(jnp.asarray, (VALUES, old, X, MASK)), clip=0.2)
    explained = 1 - oracles.variance((X - VALUES)[MASK]) / oracles.variance(X[MASK])
    np.testing.assert_allclose(metrics["explained_variance"], explained, **TOLERANCE)
    np.testing.assert_allclose(metrics["value_clip_fraction"], np.mean((oracle(VALUES, 0.2) > (VALUES - X) ** 2 / 2)[MASK]),
                               **TOLERANCE)


def test_sft_loss():
    rows = RNG.uniform(0, 1, B)
    compare(lambda x: ops.sft_loss(x, jnp.asarray(MASK), agg="seq", weights=jnp.asarray(rows))[0],
            lambda x: oracles.loss(-x, MASK, rows[:, None], agg="seq"), LOGPROBS, cotangent=1.0)
    compare(lambda x: ops.sft_loss(x, jnp.asarray(MASK), kind="dft", weights=jnp.asarray(WEIGHTS))[0],
            lambda x: oracles.loss(-x * np.exp(LOGPROBS), MASK, WEIGHTS), LOGPROBS, cotangent=1.0)


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_token_cross_entropy(shift):
    logits, targets = RNG.normal(size=(B, T, V)), RNG.integers(0, V, (B, T))
    targets[0, 0] = -100  # under a false mask anything may stand

    def oracle(logits):
        scores = oracles.log_softmax(logits)
        terms = [-scores[b, t - shift, targets[b, t]] for b, t in oracles.true_entries(MASK) if t >= shift]
        return oracles.mean(terms)

    compare(lambda x: ops.token_cross_entropy(x, jnp.asarray(targets), jnp.asarray(MASK), shift=shift)[0], oracle, logits,
            cotangent=1.0)


def test_divergences():
    p, q = RNG.normal(size=(2, 3, V)), RNG.normal(size=(2, 3, V))

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


def test_running_moments_pool_exactly():
    """Three batches of other sizes give the moments of all values at once, next to the weak prior."""
    batches = [RNG.normal(2, 3, n) for n in (4, 7, 50)]
    state = ops.Moments(np.float32(0), np.float32(1), np.float32(0))
    for batch in batches:
        padded = np.concatenate([batch, np.full(3, np.nan)])
        state, z = ops.update_moments(state, jnp.asarray(padded), jnp.arange(len(padded)) < len(batch))
    everything = np.concatenate(batches)
    np.testing.assert_allclose(state.mean, everything.mean(), **TOLERANCE)
    np.testing.assert_allclose(state.var, everything.var(), **TOLERANCE)
    np.testing.assert_allclose(z[:-3], (batches[-1] - everything.mean()) / everything.std(), **TOLERANCE)
    assert not z[-3:].any()
