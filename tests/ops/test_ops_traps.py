"""Mistakes that trainers have made and users paid for, each at the level of the ops."""

import functools
import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm import ops
from tests.ops import oracles
from tests.ops.oracles import quick_jit

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
BATCH, ACTIONS, LENGTH = 3, 4, 12


# Observations in the return: what a tool wrote is no action, however long it is.


def with_observations(gaps):
    """Places each row's actions among LENGTH positions, gaps[b][i] observation tokens before action i."""
    positions = np.cumsum(np.array(gaps) + 1, axis=1) - 1
    mask = np.zeros((BATCH, LENGTH), bool)
    np.put_along_axis(mask, positions, True, axis=1)
    return positions, mask


def spread(compact, positions, filler):
    result = np.full((BATCH, LENGTH), filler, np.float32)
    np.put_along_axis(result, positions, compact.astype(np.float32), axis=1)
    return jnp.asarray(result)


@quick_jit
def estimators(rewards, outcome, values, logprobs, ref, ratios, discounts, mask):
    shaped = ops.kl_shaped_rewards(outcome, logprobs, ref, mask, beta=0.2)
    return {
        "returns": ops.discounted_returns(rewards, mask, gamma=0.9),
        "gae": ops.gae_advantages(rewards, values, mask, gamma=0.9, lam=0.8, bootstrap=outcome),
        "vtrace": ops.vtrace_advantages(rewards, values, discounts, ratios, mask=mask, bootstrap=outcome),
        "kl in the return": ops.discounted_returns(shaped, mask, gamma=0.9),
        "reinforce++": ops.reinforce_pp_advantages(shaped, mask, gamma=0.9),
    }


@given(
    gaps=st.lists(st.lists(st.integers(0, 2), min_size=ACTIONS, max_size=ACTIONS), min_size=BATCH, max_size=BATCH),
    seed=st.integers(0, 100),
)
def test_observations_are_no_actions(gaps, seed):
    rng = np.random.default_rng(seed)
    positions, mask = with_observations(gaps)
    rewards, values, logprobs, ref = rng.normal(size=(4, BATCH, ACTIONS))
    ratios, discounts, outcome = (
        np.exp(rng.normal(size=(BATCH, ACTIONS))),
        rng.uniform(size=(BATCH, ACTIONS)),
        rng.normal(size=3),
    )
    wide = [spread(y, positions, np.nan) for y in (rewards, values, logprobs, ref, ratios, discounts)]
    result = estimators(wide[0], jnp.asarray(outcome, jnp.float32), *wide[1:], jnp.asarray(mask))

    full, gamma = np.ones((BATCH, ACTIONS), bool), np.full((BATCH, ACTIONS), 0.9)
    shaped = -0.2 * (logprobs - ref)
    shaped[:, -1] += outcome
    expected = {
        "returns": oracles.discounted_sum(rewards, full, gamma),
        "gae": oracles.gae(rewards, values, full, 0.9, 0.8, bootstrap=outcome),
        "vtrace": oracles.vtrace(rewards, values, discounts, ratios, full, outcome, 1.0, 1.0)[1],
        "kl in the return": oracles.discounted_sum(shaped, full, gamma),
        "reinforce++": oracles.whiten(oracles.discounted_sum(shaped, full, gamma), full),
    }
    for name, advantages in result.items():
        np.testing.assert_allclose(
            np.take_along_axis(np.asarray(advantages), positions, axis=1), expected[name], err_msg=name, **CLOSE
        )
        assert not np.any(np.asarray(advantages)[~mask]), name


POLICY_LOSSES = [ops.ppo_clip_loss, ops.gspo_loss, ops.cispo_loss, ops.reinforce_loss]


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_no_gradient_into_observations(loss):
    rng = np.random.default_rng(0)
    mask = jnp.asarray(rng.random((4, 8)) < 0.5)
    logprobs, old, advantages = (jnp.asarray(y, jnp.float32) for y in rng.normal(size=(3, 4, 8)))

    def objective(x):
        kl = ops.reduce_loss(ops.kl_estimate(x, old, mask=mask), mask)
        return loss(x, old, advantages, mask)[0] + 0.1 * kl

    gradient = jax.jit(jax.grad(objective))(logprobs)
    assert not np.any(np.asarray(gradient)[~mask]) and np.any(np.asarray(gradient)[mask])


# Micro-batches and devices: a mean of means is another loss.

ROWS, WIDTH = 8, 5
AGGREGATIONS = [("token", {}), ("seq", {}), ("seq_sum", {}), ("const", {"max_len": 9}), ("rollout", {})]


def batch_of(rows, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(WIDTH) < rng.integers(0, WIDTH + 1, rows)[:, None]
    mask[0], mask[1] = True, False  # a full row and an empty one
    old = -rng.uniform(0.1, 2, (rows, WIDTH))
    return {
        "logprobs": old + 0.3 * rng.normal(size=old.shape),
        "old_logprobs": old,
        "advantages": rng.normal(size=old.shape),
        "mask": mask,
        "rollout_ids": np.arange(rows) // 2,
    }


def losses_under(aggregations, loss, batch, denominators=None):
    """[A], the loss under each of several aggregations."""
    arguments = [batch[name] for name in ("logprobs", "old_logprobs", "advantages", "mask")]
    rollouts = {"rollout": {"rollout_ids": batch["rollout_ids"]}}
    denominators = denominators or [None] * len(aggregations)
    return jnp.stack(
        [
            loss(*arguments, agg=agg, denominator=denominator, **options, **rollouts.get(agg, {}))[0]
            for (agg, options), denominator in zip(aggregations, denominators, strict=True)
        ]
    )


@pytest.mark.parametrize(
    "loss, aggregations",
    [(ops.ppo_clip_loss, AGGREGATIONS)] + [(loss, AGGREGATIONS[1:2]) for loss in POLICY_LOSSES[1:]],
)
def test_micro_batches_add_up(loss, aggregations):
    """1, 2, 4 or 8 micro-batches, each under the whole batch's denominator: one loss and one gradient, to the rounding
    of sums of 8 terms. (The two pieces of a rollout stay together, so "rollout" goes to 4.)"""
    batch = jax.tree.map(jnp.asarray, batch_of(ROWS))

    def graded(num_micro, aggregations):
        rollouts = {"rollout": {"rollout_ids": batch["rollout_ids"]}}
        denominators = [
            ops.loss_denominator(batch["mask"], agg=agg, **options, **rollouts.get(agg, {}))
            for agg, options in aggregations
        ]

        def accumulated(x):
            pieces = jax.tree.map(lambda y: y.reshape(num_micro, -1, *y.shape[1:]), {**batch, "logprobs": x})
            return jnp.sum(
                jax.vmap(lambda piece: losses_under(aggregations, loss, piece, denominators))(pieces), axis=0
            )

        return quick_jit(lambda x: (accumulated(x), jax.jacrev(accumulated)(x)))(batch["logprobs"])

    expected = graded(1, aggregations)
    np.testing.assert_allclose(expected[0], quick_jit(lambda: losses_under(aggregations, loss, batch))(), rtol=1e-6)
    for num_micro in (2, 4, 8) if loss is ops.ppo_clip_loss else (4,):
        kept = [setting for setting in aggregations if num_micro < 8 or setting[0] != "rollout"]
        for value, whole in zip(graded(num_micro, kept), expected, strict=True):
            np.testing.assert_allclose(value, whole[: len(kept)], rtol=1e-6, atol=1e-7)


def test_masked_sequences_do_not_count():
    """Sequences that the mask drops as a whole leave loss and gradient alone. "const" divides by all sequences, as
    documented, so that three more than eight make it 8/11 of what it was."""
    batch = jax.tree.map(jnp.asarray, batch_of(ROWS))
    extra = jax.tree.map(jnp.asarray, batch_of(3, seed=5)) | {"mask": jnp.zeros((3, WIDTH), bool)}
    extra["rollout_ids"] += 100
    longer = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch, extra)

    def graded(batch):
        losses = lambda x: losses_under(AGGREGATIONS, ops.ppo_clip_loss, {**batch, "logprobs": x})  # noqa: E731
        return quick_jit(lambda x: (losses(x), jax.jacrev(losses)(x)))(batch["logprobs"])

    (value, gradient), (longer_value, longer_gradient) = graded(batch), graded(longer)
    factor = np.array([8 / 11 if agg == "const" else 1 for agg, _ in AGGREGATIONS])
    np.testing.assert_allclose(longer_value, factor * value, rtol=1e-6)
    np.testing.assert_allclose(longer_gradient[:, :ROWS], factor[:, None, None] * gradient, rtol=1e-6)
    assert not np.any(longer_gradient[:, ROWS:])


def test_constants_get_no_gradient():
    """Old log-probs, advantages, weights and targets are constants, also where they come out of the same parameters."""
    batch = jax.tree.map(lambda y: jnp.asarray(y, jnp.float32), batch_of(ROWS))
    mask = batch["mask"] != 0

    def total(old, advantages, weights):
        x = batch["logprobs"]
        losses = [loss(x, old, advantages, mask, weights=weights)[0] for loss in POLICY_LOSSES]
        losses += [ops.value_loss(x, old, advantages, mask, clip=0.2, weights=weights)[0]]
        losses += [ops.sft_loss(x, mask, kind=kind, weights=weights)[0] for kind in ("nll", "dft")]
        losses += [
            ops.mirror_descent_loss(x[:, 0], old[:, 0], advantages[:, 0], batch_of(ROWS)["rollout_ids"], tau=1.0)[0]
        ]
        losses += [ops.kl_estimate(x, old, mask=mask).sum(), ops.importance_weights(x, old, mask).sum()]
        return jnp.sum(jnp.stack(losses))

    constants = batch["old_logprobs"], batch["advantages"], jnp.abs(batch["advantages"])
    assert not any(np.any(gradient) for gradient in jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*constants))


# Importance weights over thousands of tokens.


def test_sequence_weights_of_8k_tokens():
    tokens = 8192
    rng = np.random.default_rng(0)
    noise = rng.normal(scale=0.5, size=tokens)
    noise -= noise.mean()
    d = np.stack([noise, np.full(tokens, 1.0), np.full(tokens, -1.0), np.full(tokens, 1e-4)])
    old = -rng.uniform(1, 5, d.shape)
    args = (jnp.asarray(old + d, jnp.float32), jnp.asarray(old, jnp.float32), jnp.ones(d.shape, bool))
    weights = jax.jit(lambda *args: ops.importance_weights(*args, level="sequence", cap=None))(*args)[:, 0]
    assert np.all(np.isfinite(weights)) and np.all(weights > 0)
    # Rounding of log-probs of size 5 to float32 (3e-7 each) over 8192 tokens leaves about 1e-4 in the sum.
    np.testing.assert_allclose(weights[0], 1, atol=2e-3)
    np.testing.assert_allclose(weights[3], np.exp(0.8192), rtol=2e-3)
    np.testing.assert_allclose(weights[1:3], np.exp([20, -20]), rtol=1e-5)
    capped = jax.jit(lambda *args: ops.importance_weights(*args, level="sequence", outside="zero", floor=0.5))(*args)[
        :, 0
    ]
    np.testing.assert_allclose(capped, [1, 0, 0, 0], atol=2e-3)


def test_ratio_is_one_before_any_update():
    batch = jax.tree.map(jnp.asarray, batch_of(ROWS))
    for loss in POLICY_LOSSES:
        _, metrics = jax.jit(loss)(batch["old_logprobs"], batch["old_logprobs"], batch["advantages"], batch["mask"])
        assert metrics["ratio_min"] == metrics["ratio_max"] == 1
        assert metrics["clip_fraction"] == metrics["approx_kl_k3"] == 0


# KL estimators: an unbiased value is not an unbiased gradient.

LOGITS = np.array([0.5, -1.0, 1.2, 0.0, -0.3])
REF = oracles.log_softmax(np.array([0.0, 0.4, 0.3, -0.5, 1.0]))
UNBIASED = {  # kind: (value, gradient)
    "k1": (True, False),
    "k2": (False, True),
    "k3": (True, False),
    "abs": (False, False),
    "k1+": (True, True),
    "k3+": (True, True),
}


def exact_kl(logits):
    log_p = oracles.log_softmax(logits)
    return np.sum(np.exp(log_p) * (log_p - REF))


def per_token(kind):
    """Value [V] and gradient by the logits [V, V] of the estimate, for each token that may be sampled."""

    def estimate(logits, token):
        return ops.kl_estimate(jax.nn.log_softmax(logits)[token], jnp.asarray(REF, jnp.float32)[token], kind=kind)

    tokens, logits = jnp.arange(5), jnp.asarray(LOGITS, jnp.float32)
    value, gradient = quick_jit(jax.vmap(jax.value_and_grad(estimate), in_axes=(None, 0)))(logits, tokens)
    return np.asarray(value, np.float64), np.asarray(gradient, np.float64)


@pytest.mark.parametrize("kind", UNBIASED)
def test_kl_estimators_on_policy(kind):
    """40,000 samples of the policy: what is called unbiased lies within 4 standard errors of the exact KL or its
    gradient, what is called biased does not; and the expectation over all tokens says the same without noise."""
    p = np.exp(oracles.log_softmax(LOGITS))
    counts = np.random.default_rng(1).multinomial(40_000, p)
    exact = exact_kl(LOGITS), oracles.numerical_gradient(exact_kl, LOGITS)
    for table, target, unbiased in zip(per_token(kind), exact, UNBIASED[kind], strict=True):
        table = table.reshape(5, -1)
        mean = counts @ table / counts.sum()
        error = np.sqrt(counts @ (table - mean) ** 2 / counts.sum() / (counts.sum() - 1))
        assert np.all(np.abs(mean - target) <= 4 * error + 1e-6) == unbiased
        assert np.allclose(p @ table, target, atol=1e-6) == unbiased


def test_kl_estimators_off_policy():
    """Samples of an older policy need the ratio as a weight; without it even "k3+" is off."""
    old, p = np.exp(oracles.log_softmax(LOGITS[::-1])), np.exp(oracles.log_softmax(LOGITS))
    gradient = oracles.numerical_gradient(exact_kl, LOGITS)
    for kind in ("k2", "k1+", "k3+"):
        table = per_token(kind)[1]
        np.testing.assert_allclose((old * (p / old)) @ table, gradient, atol=1e-6)
        assert np.abs(old @ table - gradient).max() > 0.05
    reverse = oracles.numerical_gradient(lambda x: np.sum(np.exp(REF) * (REF - oracles.log_softmax(x))), LOGITS)
    np.testing.assert_allclose(
        p @ per_token("k3")[1], reverse, atol=1e-6
    )  # the mean slope of k3 is that of KL(ref || policy)
    np.testing.assert_allclose(p @ per_token("k1")[1], 0, atol=1e-6)


# Length bias: four answers, one of one token and three of two, so that the policy gradient is known exactly.

ANSWERS, ANSWER_REWARDS = np.array([[0, 0], [1, 2], [1, 3], [1, 4]]), np.array([0.3, 1.0, 0.0, -0.5])
ANSWER_MASK = np.array([[1, 0], [1, 1], [1, 1], [1, 1]], bool)
THETA = jnp.array([0.3, -0.2, 0.1, 0.5, -0.4])  # two logits of the first token, three of the second


def answer_logprobs(theta):
    logits = jnp.concatenate([jax.nn.log_softmax(theta[:2]), jax.nn.log_softmax(theta[2:])])
    return jnp.where(ANSWER_MASK, logits[ANSWERS], 0)


def expected_gradients(size):
    """By aggregation: the exact mean, over all batches of `size` answers, of the gradient of the REINFORCE loss."""
    batches = jnp.array(list(itertools.product(range(4), repeat=size)))
    options = {"const": {"max_len": 2}, "rollout": {"rollout_ids": jnp.arange(size)}}
    names = get_args(ops.Aggregation)

    def gradient(batch):
        def losses(theta):
            logprobs, mask = answer_logprobs(theta)[batch], jnp.asarray(ANSWER_MASK)[batch]
            rewards = jnp.asarray(ANSWER_REWARDS, jnp.float32)[batch]
            arrays = logprobs, logprobs, ops.broadcast_values(rewards - 0.2, mask), mask  # a baseline changes no mean
            return jnp.stack([ops.reinforce_loss(*arrays, agg=agg, **options.get(agg, {}))[0] for agg in names])

        return jnp.exp(answer_logprobs(THETA)[batch].sum()) * jax.jacrev(losses)(THETA)

    gradients = jnp.sum(quick_jit(jax.vmap(gradient))(batches), axis=0)
    return dict(zip(names, np.asarray(gradients, np.float64), strict=True))


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_length_bias_of_aggregations():
    exact = jax.grad(lambda theta: -jnp.exp(answer_logprobs(theta).sum(axis=1)) @ ANSWER_REWARDS)(THETA)
    by_size = [expected_gradients(size) for size in (1, 2, 4)]
    for gradients in by_size:
        # Sums are unbiased at any batch size, the constant divisor being a factor.
        np.testing.assert_allclose(gradients["seq_sum"], exact, atol=1e-6)
        np.testing.assert_allclose(gradients["const"], exact / 2, atol=1e-6)
        # A mean per sequence points elsewhere, however large the batch.
        assert cosine(gradients["seq"], exact) < 0.98
        np.testing.assert_allclose(gradients["rollout"], gradients["seq"], atol=1e-6)
    # The token mean divides by a random count. Its angle to the exact gradient at least halves as the batch doubles,
    # and 1 - cosine is half the angle squared.
    off = [1 - cosine(gradients["token"], exact) for gradients in by_size]
    assert off[0] > 0.01 and off[0] > 4 * off[1] and off[0] > 10 * off[2]


# Rewards that could not be computed.


def test_unscorable_rewards_are_in_no_statistic():
    """A missing reward leaves mean, std and divisor as if the sample had not been drawn; it is not a reward of zero."""
    rewards = jnp.array([1.0, jnp.nan, 0.0, 0.5, jnp.nan, jnp.nan, 2.0, jnp.nan])
    group_ids, valid = jnp.array([0, 0, 0, 0, 1, 1, 2, 2]), ~jnp.isnan(rewards)
    mask = jnp.ones((8, 3), bool)
    for estimate in (ops.grpo_advantages, ops.rloo_advantages):
        advantages = jax.jit(estimate)(rewards, group_ids, mask, valid=valid)
        alone = jax.jit(estimate)(jnp.array([1.0, 0.0, 0.5]), jnp.zeros(3, jnp.int32), mask[:3])
        np.testing.assert_allclose(advantages[jnp.array([0, 2, 3])], alone, rtol=1e-6)
        # Unscorable, a group of such, and the one that is left of a pair.
        assert not advantages[jnp.array([1, 4, 5, 6, 7])].any()

    scored = mask & valid[:, None]  # the loss leaves them out of the divisor too
    logprobs = -jnp.linspace(0.1, 2, 24).reshape(8, 3)

    @jax.jit
    def graded(x, rewards):
        advantages = ops.grpo_advantages(rewards, group_ids, mask, valid=valid)
        return ops.ppo_clip_loss(x, logprobs, advantages, scored)[0]

    gradient = jax.grad(graded)(logprobs, rewards)
    assert np.all(np.isfinite(gradient)) and not gradient[~valid].any() and gradient[:4][valid[:4]].any()
    assert not gradient[4:6].any()  # the group without any reward
    np.testing.assert_array_equal(gradient, jax.grad(graded)(logprobs, jnp.where(valid, rewards, 7.0)))
    kept = jax.jit(ops.dynamic_sampling_mask)(rewards, group_ids, valid)
    assert kept.tolist() == [True, False, True, True] + [False] * 4
    np.testing.assert_allclose(jax.jit(ops.informative_group_scale)(rewards, group_ids, valid), 2)


@given(
    seed=st.integers(0, 1000),
    levels=st.sampled_from([("group", "group"), ("leave_one_out", "none"), ("group", "batch")]),
)
def test_groups_do_not_depend_on_order_or_names(seed, levels):
    """Groups are sets: their names and the order of samples mean nothing."""
    rng = np.random.default_rng(seed)
    rewards, ids, valid = rng.normal(size=9), rng.integers(0, 4, 9), rng.random(9) < 0.8
    order, names = rng.permutation(9), rng.choice(10**6, 4, replace=False) - 500_000
    straight = normalize(*levels)(rewards.astype(np.float32), ids, valid)
    shuffled = normalize(*levels)(rewards.astype(np.float32)[order], names[ids][order], valid[order])
    np.testing.assert_allclose(shuffled, straight[order], **CLOSE)
    for group in range(4):
        members = valid & (ids == group)
        if members.any():
            np.testing.assert_allclose(straight[members].sum(), 0, atol=1e-4)


@functools.cache
def normalize(center, scale):
    return quick_jit(functools.partial(ops.group_normalize, center=center, scale=scale))
