"""Reductions, group statistics, returns and advantages: values and gradients against loops in float64, to 2e-5."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import ops
from jaxrl_llm.ops import groups
from tests.ops import oracles
from tests.ops.oracles import (
    AGGREGATIONS,
    IDS,
    LOGPROBS,
    MASK,
    OLD,
    REWARDS,
    TOLERANCE,
    TURN_IDS,
    TURN_MASK,
    TURN_REWARDS,
    VALUES,
    WEIGHTS,
    B,
    K,
    T,
    X,
    compare,
)


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
        columns = [
            [*op(x, jnp.asarray(MASK), axis=1, **options), op(x, jnp.asarray(MASK), **options)]
            for op in (ops.masked_sum, ops.masked_mean, ops.masked_var)
        ]
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
        return np.array(
            [sum(x[b, t] - ref[b, t] for t in range(T) if MASK[b, t]) / MASK[b].sum() ** power for b in range(B)]
        )

    compare(lambda x, ref: ops.sequence_log_ratio(x, ref, jnp.asarray(MASK), length_power=power), oracle, LOGPROBS, OLD)
    compare(
        lambda x: ops.sequence_logprob(x, jnp.asarray(MASK), length_power=power), lambda x: oracle(x, 0 * x), LOGPROBS
    )


def test_aggregation():
    compare(
        lambda x: jnp.array(
            [ops.aggregate_loss(x, jnp.asarray(MASK), agg=agg, **options) for agg, options in AGGREGATIONS]
        ),
        lambda x: np.array([oracles.aggregate(x, MASK, agg, **options) for agg, options in AGGREGATIONS]),
        X,
    )


@pytest.mark.parametrize(
    "options", [{}, {"std_of": "centered", "ddof": 0, "singleton": "raw", "var_eps": 1e-3, "eps": 1e-2}]
)
def test_group_normalize(options):
    valid = np.array([1, 1, 1, 1, 0], bool)  # leaves one member in the second group
    levels = [(center, scale) for center in get_args(groups.Center) for scale in get_args(groups.Scale)]
    assert len(levels) == 12

    def normalized(x):
        return jnp.stack(
            [
                ops.group_normalize(x, jnp.asarray(IDS), jnp.asarray(valid), center=center, scale=scale, **options)
                for center, scale in levels
            ]
        )

    compare(
        normalized,
        lambda x: np.stack([oracles.group_normalize(x, IDS, valid, *level, **options) for level in levels]),
        REWARDS,
    )


def test_group_stats():
    valid = np.array([1, 1, 0, 1, 1], bool)

    def oracle(x):
        members = [[x[j] for j in range(B) if valid[j] and IDS[j] == IDS[i]] for i in range(B)]
        return np.array(
            [
                [oracles.mean(m) for m in members],
                [oracles.variance(m) ** 0.5 for m in members],
                [len(m) for m in members],
            ]
        )

    compare(lambda x: jnp.stack(ops.group_stats(x, jnp.asarray(IDS), jnp.asarray(valid))), oracle, REWARDS)


@pytest.mark.parametrize("options", [{}, {"ddof": 0, "eps": 1e-5, "eps_in": "std"}, {"ids": IDS}])
def test_whitening(options):
    compare(
        lambda x: ops.masked_whiten(x, jnp.asarray(MASK), **options), lambda x: oracles.whiten(x, MASK, **options), X
    )


@pytest.mark.parametrize("how", ["mean", "sum", "max", "min"])
def test_segment_reduce(how):
    ids, valid = np.array([0, 2, 2, -1, 2]), np.array([1, 1, 1, 1, 0], bool)

    def oracle(x):
        slots = [[x[i] for i in range(B) if ids[i] == k and valid[i]] for k in range(3)]
        reduce = {"mean": oracles.mean, "sum": sum, "max": max, "min": min}[how]
        return np.array([reduce(slot) if slot else 0.0 for slot in slots])

    compare(lambda x: ops.segment_reduce(x, jnp.asarray(ids), 3, how=how, valid=jnp.asarray(valid)), oracle, REWARDS)


def test_returns():
    rng = np.random.default_rng(1)
    decay = rng.uniform(0.2, 1, (B, T))
    for on_masked in ("skip", "reset"):
        compare(
            lambda x, d, on_masked=on_masked: ops.reverse_discounted_sum(x, jnp.asarray(MASK), d, on_masked=on_masked),
            lambda x, d, on_masked=on_masked: oracles.discounted_sum(x, MASK, d, on_masked),
            X,
            decay,
        )
    compare(
        lambda x: ops.discounted_returns(x, jnp.asarray(MASK), gamma=0.9),
        lambda x: oracles.discounted_sum(x, MASK, np.full(MASK.shape, 0.9)),
        X,
    )
    compare(
        lambda x: ops.reinforce_pp_advantages(x, jnp.asarray(MASK), gamma=0.9),
        lambda x: oracles.whiten(oracles.discounted_sum(x, MASK, np.full(MASK.shape, 0.9)), MASK),
        X,
    )


def test_generalized_advantages():
    rng = np.random.default_rng(1)
    discounts, bootstrap = rng.integers(0, 2, (B, T)).astype(float), rng.normal(size=B)
    compare(
        lambda r, v, d, final: ops.gae_advantages(
            r, v, jnp.asarray(MASK), gamma=0.9, lam=0.8, discounts=d, bootstrap=final
        ),
        lambda r, v, d, final: oracles.gae(r, v, MASK, 0.9, 0.8, d, final),
        X,
        VALUES,
        discounts,
        bootstrap,
    )
    compare(
        lambda r, v: ops.gae_advantages(r, v, jnp.asarray(MASK)),
        lambda r, v: oracles.gae(r, v, MASK, 1.0, 0.95),
        X,
        VALUES,
    )


def test_vtrace():
    rng = np.random.default_rng(1)
    discounts, ratios, bootstrap = rng.uniform(0, 1, (B, T)), np.exp(OLD - LOGPROBS), rng.normal(size=B)
    for place, op in enumerate((ops.vtrace_targets, ops.vtrace_advantages)):
        compare(
            lambda r, v, final, op=op: op(
                r,
                v,
                jnp.asarray(discounts),
                jnp.asarray(ratios),
                rho_max=1.2,
                c_max=1.0,
                mask=jnp.asarray(MASK),
                bootstrap=final,
            ),
            lambda r, v, final, place=place: oracles.vtrace(r, v, discounts, ratios, MASK, final, 1.2, 1.0)[place],
            X,
            VALUES,
            bootstrap,
        )


def test_vtrace_on_policy_is_gae_with_lambda_one():
    ones, discount = jnp.ones((B, T)), jnp.full((B, T), 0.9)
    advantages = jax.jit(lambda r, v: ops.gae_advantages(r, v, MASK, gamma=0.9, lam=1.0))(X, VALUES)
    vtrace = jax.jit(lambda r, v: ops.vtrace_advantages(r, v, discount, ones, mask=MASK))(X, VALUES)
    np.testing.assert_allclose(vtrace, advantages, **TOLERANCE)


def test_advantages_of_groups_and_turns():
    spread = np.where(MASK, 1.0, 0.0)
    loo = {"center": "leave_one_out", "scale": "none"}
    compare(
        lambda r: jnp.stack(
            [op(r, jnp.asarray(IDS), jnp.asarray(MASK)) for op in (ops.grpo_advantages, ops.rloo_advantages)]
        ),
        lambda r: np.stack([oracles.group_normalize(r, IDS, **options)[:, None] * spread for options in ({}, loo)]),
        REWARDS,
    )
    compare(
        lambda r, g: ops.remax_advantages(r, g, jnp.asarray(MASK)),
        lambda r, g: (r - g)[:, None] * spread,
        REWARDS,
        REWARDS[::-1],
    )
    compare(
        lambda r: ops.turn_advantages(r, jnp.asarray(TURN_MASK), jnp.asarray(TURN_IDS), gamma=0.9),
        lambda r: oracles.by_turn(oracles.discounted_sum(r, TURN_MASK, np.full((B, K), 0.9)), TURN_IDS),
        TURN_REWARDS,
    )
    compare(
        lambda r: ops.dual_level_advantages(
            r, jnp.asarray(TURN_MASK), jnp.asarray(TURN_IDS), jnp.asarray(IDS), weight=0.3
        ),
        lambda r: oracles.dual_level(r, TURN_MASK, TURN_IDS, IDS, weight=0.3),
        TURN_REWARDS,
    )
    options = {"gamma_process": 0.9, "gamma_outcome": 0.8, "process_weight": 0.5, "outcome_weight": 2.0}
    compare(
        lambda p, r: jnp.stack(
            [
                ops.prime_advantages(p, r, jnp.asarray(MASK), jnp.asarray(IDS), loo=loo, **options)
                for loo in ("paper", "code")
            ]
        ),
        lambda p, r: np.stack([oracles.prime(p, r, MASK, IDS, loo=loo, **options) for loo in ("paper", "code")]),
        X,
        REWARDS,
    )


def test_kl_shaped_rewards():
    def oracle(r, x, ref):
        result = np.where(MASK, -0.3 * (x - ref), 0)
        for b in range(B):
            result[b, oracles.actions(MASK[b])[-1]] += r[b]
        return result

    compare(
        lambda r, x, ref: ops.kl_shaped_rewards(r, x, ref, jnp.asarray(MASK), beta=0.3), oracle, REWARDS, LOGPROBS, OLD
    )


def test_running_moments_pool_exactly():
    """Three batches of other sizes give the moments of all values at once, next to the weak prior."""
    rng = np.random.default_rng(1)
    batches = [rng.normal(2, 3, n) for n in (4, 7, 50)]
    state = ops.Moments(np.float32(0), np.float32(1), np.float32(0))
    for batch in batches:
        padded = np.concatenate([batch, np.full(53 - len(batch), np.nan)])
        state, z = jax.jit(ops.update_moments)(state, padded, np.arange(53) < len(batch))
    everything = np.concatenate(batches)
    np.testing.assert_allclose(state.mean, everything.mean(), **TOLERANCE)
    np.testing.assert_allclose(state.var, everything.var(), **TOLERANCE)
    np.testing.assert_allclose(z[:-3], (batches[-1] - everything.mean()) / everything.std(), **TOLERANCE)
    assert not z[-3:].any()


@pytest.mark.parametrize("ids", [None, np.arange(64) % 2])
def test_whitening_of_many_tokens_keeps_its_digits(ids):
    """A quarter of a million tokens far from zero: sums taken one after the other in float32 would be off by 1e-3."""
    x = np.random.default_rng(0).normal(10, 1, (64, 4096)).astype(np.float32)
    mask = np.ones(x.shape, bool)
    sets = [slice(None)] if ids is None else [ids == 0, ids == 1]
    expected = np.zeros(x.shape)
    for rows in sets:
        wide = x[rows].astype(np.float64)
        expected[rows] = (wide - wide.mean()) / wide.std(ddof=1)
    whitened = jax.jit(lambda x: ops.masked_whiten(x, mask, ids=ids))(x)
    np.testing.assert_allclose(whitened, expected, **TOLERANCE)
