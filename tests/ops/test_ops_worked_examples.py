"""Literal numbers, worked out by hand from the papers' definitions or read off their released code."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxrl_llm.ops
from tests.ops.oracles import JITTED as ops
from tests.ops.oracles import array, check, quick_jit

MASK = np.arange(4) < np.array([3, 2, 4, 1])[:, None]
REWARDS, ONE_GROUP = jnp.array([1.0, 0, 1, 0]), jnp.zeros(4, jnp.int32)


def first_token(advantages):
    return advantages[:, 0]


def test_group_advantages():
    mask, signs = jnp.asarray(MASK), np.array([1, -1, 1, -1])
    for advantages, size in [
        (ops.grpo_advantages(REWARDS, ONE_GROUP, mask), 0.866024),
        (ops.grpo_advantages(REWARDS, ONE_GROUP, mask, scale="none"), 0.5),
        (ops.rloo_advantages(REWARDS, ONE_GROUP, mask), 2 / 3),
    ]:
        check(advantages, size * signs[:, None] * MASK)
    check(ops.remax_advantages(REWARDS, array(0.5, 0.5, 0, 0), mask), np.array([0.5, -0.5, 1, 0])[:, None] * MASK)


def test_reinforce_plus_plus():
    """Mean 0.7 and variance 0.233333 over the ten tokens: a long sequence weighs more."""
    mask = jnp.asarray(MASK)
    expected = np.array([0.621059, -1.449138, 0.621059, -1.449138])[:, None] * MASK
    outcome_last = ops.broadcast_values(REWARDS, ops.last_turn_mask(mask))
    check(ops.reinforce_pp_advantages(outcome_last, mask), expected)
    centered = ops.group_relative_advantages(REWARDS, ONE_GROUP, mask, scale="none")
    check(ops.masked_whiten(centered, mask), expected)  # REINFORCE++-baseline


def test_lone_member_and_equal_rewards():
    mask = jnp.ones((3, 2), bool)
    ids, rewards = jnp.array([5, 8, 8]), array(2, 0.1, 0.1)
    assert not ops.grpo_advantages(rewards, ids, mask).any()
    assert not ops.rloo_advantages(rewards, ids, mask).any()
    check(first_token(ops.grpo_advantages(rewards, ids, mask, singleton="raw")), [2 / (1 + 1e-6), 0, 0])
    check(first_token(ops.rloo_advantages(rewards, ids, mask, singleton="raw")), [2, 0, 0])
    # 0.1 has no exact mean in float32: what rounding leaves must not be divided by eps.
    assert not ops.group_normalize(jnp.full(7, 0.1), jnp.zeros(7, jnp.int32)).any()
    assert not ops.masked_whiten(jnp.full((1, 7), 0.1), jnp.ones((1, 7), bool)).any()


def test_generalized_advantages_skip_the_observation():
    rewards, values = array([0, 0, 0, 1]), array([0.5, 0.4, 9, 0.7])
    mask = jnp.array([[True, True, False, True]])
    advantages = ops.gae_advantages(rewards, values, mask, gamma=1.0, lam=0.95)
    check(advantages, [[0.45575, 0.585, 0, 0.3]])
    check((advantages + values)[:, np.array([0, 1, 3])], [[0.95575, 0.985, 1.0]])


def test_aggregations():
    x = jnp.broadcast_to(array(0.1, 0.2, 0.3, 0.4)[:, None], (4, 4))
    for agg, expected in {"token": 0.23, "seq": 0.25, "seq_sum": 0.575, "const": 0.14375}.items():
        check(ops.reduce_loss(x, jnp.asarray(MASK), agg=agg, max_len=4), expected)


def losses_of(op, ratios, advantages, **options):
    """Per-token values, read off one-token batches."""
    op = getattr(jaxrl_llm.ops, op)
    ones = jnp.ones((1, 1), bool)
    graded = quick_jit(lambda logprobs, advantage: op(logprobs, array([0]), advantage, ones, **options)[0])
    return [float(graded(array([np.log(r)]), array([a]))) for r, a in zip(ratios, advantages, strict=True)]


def test_clipped_surrogates():
    ratios, advantages = [1.3, 1.3, 0.7, 0.7, 4], [1, -1, 1, -1, -1]
    check(losses_of("ppo_clip_loss", ratios, advantages), [-1.2, 1.3, -0.7, 0.8, 4])
    check(losses_of("ppo_clip_loss", ratios, advantages, dual_clip=3.0), [-1.2, 1.3, -0.7, 0.8, 3])
    check(losses_of("ppo_clip_loss", ratios, advantages, clip_high=0.28), [-1.28, 1.3, -0.7, 0.8, 4])
    check(losses_of("ppo_clip_loss", ratios, advantages, ratio_max=2.0), [-1.2, 1.3, -0.7, 0.8, 2])


def test_gspo_ratio():
    log_ratios, mask = array([0.2, -0.1, 0.05]), jnp.ones((1, 3), bool)
    loss, metrics = ops.gspo_loss(log_ratios, jnp.zeros((1, 3)), jnp.ones((1, 3)), mask, clip_low=0.5, clip_high=0.5)
    check(loss, -1.051271)
    check(metrics["ratio_max"], 1.051271)
    check(ops.gspo_loss(log_ratios, jnp.zeros((1, 3)), jnp.ones((1, 3)), mask)[0], -1.0004)


def test_cispo_bounds_the_weight():
    logprobs, old = array([-1, -1]), array([-3, -1])
    ones, mask = jnp.ones((1, 2)), jnp.ones((1, 2), bool)
    check(ops.cispo_loss(logprobs, old, ones, mask)[0], (5 + 1) / 2)
    check(ops.cispo_loss(logprobs, old, ones, mask, clip_low=0.2, clip_high=0.2)[0], (1.2 + 1) / 2)


@pytest.mark.parametrize(
    "kind, values",
    [
        ("k1", [0.3, -0.3]),
        ("k2", [0.045, 0.045]),
        ("k3", [0.040818, 0.049859]),
        ("abs", [0.3, 0.3]),
        ("k1+", [0.3, -0.3]),
        ("k3+", [0.040818, 0.049859]),
    ],
)
def test_kl_estimates(kind, values):
    check(ops.kl_estimate(array(-1, -1), array(-1.3, -0.7), kind=kind), values)


def test_overlong_penalty():
    lengths = jnp.array([0, 80, 90, 100, 150])
    check(ops.overlong_penalty(lengths, max_len=100, buffer=20, factor=1.0), [0, 0, -0.5, -1, -1])


def test_truncated_importance_weights():
    d, mask = array([0.5, 1, -1]), jnp.ones((1, 3), bool)
    check(ops.importance_weights(d, jnp.zeros((1, 3)), mask, cap=2.0), [[1.648721, 2, 0.367879]])
    check(ops.importance_weights(d, jnp.zeros((1, 3)), mask, level="sequence", cap=2.0), [[1.648721] * 3])


def test_decoupled_ppo():
    """ASearcher: the clip around recomputed log-probs, a detached weight against the behavior, dropped above 5."""
    logprobs, prox, old = array([-1, -1, -0.5]), array([-1.1, -1, -1.2]), array([-1.1, -3, -1.0])
    mask, ones = jnp.ones((1, 3), bool), jnp.ones((1, 3))
    weights = ops.importance_weights(prox, old, mask, cap=5.0, outside="zero")
    check(weights, [[1, 0, 0.818731]])
    check(ops.ppo_clip_loss(logprobs, prox, ones, mask, clip_low=0.4, clip_high=0.4, weights=weights)[0], -0.750465)
    rewards = ops.group_normalize(array(1, 0, 0, 0), ONE_GROUP, scale="none")
    shaped = jnp.clip((rewards - 0.5) * 10, -20, 20)[:, None]
    check(
        ops.masked_whiten(shaped, jnp.ones((4, 1), bool), ddof=0, eps=1e-5, eps_in="std")[:, 0],
        [1.732047, -0.577349, -0.577349, -0.577349],
    )


def test_lite_ppo():
    rewards, ids = array(1, 0, 0, 1, 1, 1, 1, 1), jnp.array([0] * 4 + [1] * 4)
    check(ops.group_normalize(rewards, ids, scale="batch"), [1.080121, -1.080121, -1.080121, 1.080121] + [0] * 4)
    check(ops.group_normalize(rewards, ids), [0.866024, -0.866024, -0.866024, 0.866024] + [0] * 4)
    check(ops.group_normalize(rewards, ids, center="batch", scale="batch")[4:], [0.540060] * 4)


def test_campo_and_unequal_groups():
    check(
        ops.group_normalize(array(1, 0, 1, 0) - array(0, 2 / 3, 1, 1 / 3), ONE_GROUP),
        [1.388728, -0.925819, 0, -0.462910],
    )
    # M-GRPO: sub-trajectories of a query, aligned to three per rollout, and as they came.
    check(
        ops.group_normalize(array(1, 1, 1, 0.1, 0, 0.1), jnp.zeros(6, jnp.int32)),
        [0.910549] * 3 + [-0.845510, -1.040628, -0.845510],
    )
    check(
        ops.group_normalize(array(1, 0.1, 0, 0.1, 0.1), jnp.zeros(5, jnp.int32)),
        [1.779130, -0.384677, -0.625100, -0.384677, -0.384677],
    )


def test_siblings_of_a_tree():
    """PORTool: a fork's children are a group named by their parent, -1 at the root."""
    rewards, parent = array(0.9, 0.8, 1, 0, 1), jnp.array([-1, -1, 0, 0, 1])
    check(ops.group_normalize(rewards, parent, scale="none"), [0.05, -0.05, 0.5, -0.5, 0])
    check(ops.group_normalize(rewards, parent), [0.707097, -0.707097, 0.707106, -0.707106, 0])


def test_informative_groups():
    rewards = array([1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]).ravel()
    ids = jnp.repeat(jnp.arange(4), 4)
    advantages = ops.group_normalize(rewards, ids) * ops.informative_group_scale(rewards, ids)
    check(
        advantages.reshape(4, 4)[np.array([0, 3])],
        [[3, -1, -1, -1], [1.732051, 1.732051, -1.732051, -1.732051]],
        atol=1e-5,
    )
    replayed = rewards.at[7].set(1)
    advantages = ops.group_normalize(replayed, ids) * ops.informative_group_scale(replayed, ids)
    check(advantages[4:8], [-0.666667, -0.666667, -0.666667, 2], atol=1e-5)
    assert ops.dynamic_sampling_mask(rewards, ids).tolist() == [True] * 4 + [False] * 8 + [True] * 4


def test_pieces_of_a_rollout():
    """SUPO: statistics over rollouts, handed to their 2, 1 and 3 pieces."""
    pieces = jnp.array([0, 0, 1, 2, 2, 2])
    mask = jnp.ones((6, 1), bool)
    advantages = ops.grpo_advantages(array(1, 0, 1), jnp.zeros(3, jnp.int32), mask, rollout_ids=pieces)
    check(first_token(advantages), [0.577349, 0.577349, -1.154699, 0.577349, 0.577349, 0.577349])
    without = ops.grpo_advantages(
        array(1, 0, 1), jnp.zeros(3, jnp.int32), mask, rollout_ids=pieces, valid=jnp.array([True, False, True])
    )
    assert not without.any()


def test_information_gain_turns():
    """IGPO: population std with 1e-8 under the root, gains and outcomes normalized apart or together, then summed."""
    rewards = array([0.2, 0.3, 1], [0.1, 0.4, 0])
    turn_mask, ids = jnp.ones((2, 3), bool), jnp.zeros((2, 3), jnp.int32)
    options = {"ddof": 0, "var_eps": 1e-8}
    apart = ops.group_normalize(rewards, ids + jnp.array([0, 0, 1]), **options)
    check(apart, [[-0.447209, 0.447209, 0.999998], [-1.341628, 1.341628, -0.999998]], atol=5e-6)
    turn_ids = jnp.array([[0, 1, 2, -1], [0, 1, 1, 2]])
    check(
        ops.turn_advantages(apart, turn_mask, turn_ids),
        [[0.999998, 1.447207, 0.999998, 0], [-0.999998, 0.341630, 0.341630, -0.999998]],
        atol=5e-6,
    )
    together = ops.group_normalize(rewards, ids, **options)
    check(
        ops.discounted_returns(together, turn_mask),
        [[1.538963, 1.949353, 2.051950], [-1.538963, -0.820780, -1.025975]],
        atol=5e-6,
    )


def test_dual_level_advantages():
    rewards, turn_mask = array([0.5, 1], [0, 0.8], [0.75, 0.25]), jnp.ones((3, 2), bool)
    advantages = ops.dual_level_advantages(rewards, turn_mask, jnp.array([[0, 1]] * 3), jnp.zeros(3, jnp.int32))
    check(advantages, [[1.090808, 0.962382], [-0.869655, -0.265825], [-0.221153, -0.696557]])


def test_prime_advantages():
    process, mask = array([0.2, 0.4], [-0.1, 0.1]), jnp.ones((2, 2), bool)
    args = process, array(1, 0), mask, jnp.zeros(2, jnp.int32)
    check(ops.prime_advantages(*args, loo="code"), [[0.889043, 0.829774], [-1.007582, -0.711235]])
    check(ops.prime_advantages(*args, loo="paper"), [[0.920296, 0.801548], [-0.979670, -0.742174]])


def test_turn_rewards_on_tokens():
    turn_ids = jnp.array([[-1, 0, 0, -1, 1, 1, 2, -1], [0, 0, -1, 1, -1, -1, -1, -1]])
    placed = ops.place_turn_rewards(array([0.6, 0.3, 1.05], [0.6, 0.3, 9]), turn_ids)
    check(placed, [[0, 0, 0.6, 0, 0, 0.3, 1.05, 0], [0, 0.6, 0, 0.3, 0, 0, 0, 0]])
    turn_mask = jnp.array([[True, True, True], [True, True, False], [False, False, False]])
    rewards = jnp.ones((3, 3)) * 0.1
    check(ops.add_outcome(rewards, array(1, 2, 3), turn_mask), [[0.1, 0.1, 1.1], [0.1, 2.1, 0], [0, 0, 0]])
    check(ops.add_outcome(rewards, array(1, 2, 3), turn_mask, mode="replace"), [[0.1, 0.1, 1], [0.1, 2, 0], [0, 0, 0]])


def test_returns_over_actions():
    mask = jnp.ones((1, 4), bool)
    check(ops.discounted_returns(array([-1, -1, -1, 0]), mask, gamma=0.9), [[-2.71, -1.9, -1, 0]])
    # ILQL's targets r + gamma V', V' at the next action (the observation's 0.1 is passed over).
    mask = jnp.array([[True, True, False, True]])
    following = ops.next_values(array([0.4, 0.3, 0.1, 0.6]), mask, 0.0)
    check((array([-1, -1, 0, 0]) + 0.9 * following)[:, np.array([0, 1, 3])], [[-0.73, -0.46, 0]])
    # Clip of step rewards at most 0, their returns to the end.
    check(
        ops.discounted_returns(array([0, 0, -0.3, 0, -0.1]), jnp.ones((1, 5), bool)), [[-0.4, -0.4, -0.4, -0.1, -0.1]]
    )


def test_reset_at_observations():
    """verl's REINFORCE++: tokens before an observation see nothing of the reward behind it."""
    rewards, mask = array([0, 0, 0, 1]), jnp.array([[True, True, False, True]])
    check(ops.discounted_returns(rewards, mask, gamma=0.5), [[0.25, 0.5, 0, 1]])
    check(ops.discounted_returns(rewards, mask, gamma=0.5, on_masked="reset"), [[0, 0, 0, 1]])


def test_mirror_descent():
    seq, ref = array(-10, -12, -9, -11), array(-10.5, -11, -9, -11.2)
    args = seq, ref, array(1, 1, 0, 0), ONE_GROUP
    check(ops.mirror_descent_loss(*args, tau=0.1, form="squared")[0], 0.270725)
    check(ops.mirror_descent_loss(*args, tau=0.1)[0], 0.266125)


def test_shaped_ratio_of_hinted_samples():
    ratio, mask = jnp.exp(array([-2, 0.5, 0, -0.7])), jnp.ones((1, 4), bool)
    check(ops.shape_ratio(ratio, mask), [[0.085147, 0.531361, 0.407481, 0.254569]])
    padded = jnp.concatenate([ratio, array([jnp.nan] * 4)], axis=1)
    long = jnp.arange(8)[None] < 4
    check(ops.shape_ratio(padded, long)[:, :4], ops.shape_ratio(ratio, mask))
    offset = np.quantile(np.r_[np.exp([-2, 0.5, 0, -0.7]), np.ones(4)], 0.9)
    check(ops.shape_ratio(padded, long, count_padding=True)[:, :4], ratio / (ratio + offset))


def test_weighted_parts_of_a_demonstration():
    """FunReason: 8 thinking tokens and a call of 2, their means mixed 0.7 to 0.3 through token weights."""
    logprobs = -array([0.2, 0.1, 0.3, 0.2, 0.2, 0.4, 0.1, 0.3, 1.0, 0.6])
    mask = jnp.ones((1, 10), bool)
    check(ops.sft_loss(logprobs, mask)[0], 0.34)
    weights = array([0.7 / 8] * 8 + [0.3 / 2] * 2)
    check(ops.sft_loss(logprobs, mask, weights=weights, denominator=1.0)[0], 0.3975)


def test_full_distributions():
    p, q = jnp.log(array(0.7, 0.2, 0.1)), jnp.log(array(0.5, 0.3, 0.2))
    check(ops.categorical_kl(p, q), 0.085123)
    check(ops.categorical_kl(q, p), 0.092033)
    check(ops.symmetric_kl(p, q), 0.177156)
    check(ops.categorical_kl(array(2, 0, 0), array(1, 0, 0)), 0.0988860)
    check(ops.token_entropy(jnp.zeros(8)), np.log(8))
    check(ops.token_entropy(array(0, -jnp.inf, 0)), np.log(2))
    check(ops.categorical_kl(array(0, -jnp.inf, 0), array(0, 0, 0)), np.log(3 / 2))
    assert ops.categorical_kl(array(0, 0), array(0, -jnp.inf)) == jnp.inf
    pred, gold = array(0.35, 0.1, 0.45, 0.1), array(0.476190, 0.142857, 0.380952, 0)
    check(ops.jensen_shannon(pred, gold), 0.0617928)
    check(ops.jensen_shannon(array(1, 0), array(0, 1)), 1)


def test_kl_coefficient():
    check(ops.update_kl_coefficient(0.1, 0.3, target=0.1, rate=0.1), 0.102)
    check(ops.update_kl_coefficient(0.1, 0.0, target=0.1, rate=1.0), 0.08)
    check(ops.update_kl_coefficient(0.05, 0.0, target=6.0, rate=1.0, floor=0.05), 0.05)


def test_first_occurrences():
    ids, valid = (
        jnp.array([[3, 1, 3, 1, 2], [3, 3, 3, 1, 1]]),
        jnp.array([[True] * 5, [False, True, True, True, False]]),
    )
    expected = [[True, True, False, False, True], [False, True, False, True, False]]
    assert ops.first_occurrence_mask(ids, valid).tolist() == expected


def test_segments():
    x, ids = array(1, 2, 3, 4), jnp.array([2, 0, 2, -1])
    for how, expected in {"mean": [2, 0, 2], "sum": [2, 0, 4], "max": [2, 0, 3], "min": [2, 0, 1]}.items():
        check(ops.segment_reduce(x, ids, num=3, how=how), expected)


def test_three_forms_of_broadcasting():
    ids = jnp.array([[0, 1, -1], [1, -1, 0]])
    check(ops.broadcast_values(array([1, 2], [3, 4]), ids), [[1, 2, 0], [4, 0, 3]])
    check(ops.broadcast_values(array(5, 6), ids), [[5, 6, 0], [6, 0, 5]])
    check(ops.broadcast_values(array(7, 8), ids >= 0), [[7, 7, 0], [8, 0, 8]])
