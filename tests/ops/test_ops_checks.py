"""Bad input: an error that names the value, what was expected and what there is to choose from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import ops

X, MASK, IDS, REWARDS = jnp.ones((4, 3)), jnp.ones((4, 3), bool), jnp.array([0, 0, 1, 1]), jnp.arange(4.0)
PAIRS = ops.PairStats(*[REWARDS] * 6)

BAD = [
    # shapes and types
    (lambda: ops.ppo_clip_loss(X, X, X[:, :2], MASK), r"advantages must have shape \[B, T\] with B=4, T=3 .*\[4, 2\]"),
    (
        lambda: ops.grpo_advantages(REWARDS[:3], IDS, MASK),
        r"rewards must have shape \[B\] with B=4 as mask has, got \[3\]",
    ),
    (lambda: ops.masked_mean(X, MASK[:3]), r"mask must have shape"),
    (lambda: ops.masked_mean(X, MASK.astype(jnp.float32)), r"mask must be boolean, got float32; pass mask != 0"),
    (lambda: ops.masked_mean([1.0, 2.0], MASK), r"x must be an array .* got list"),
    (lambda: ops.group_normalize(REWARDS, REWARDS), r"ids must be integers, got float32"),
    (lambda: ops.gae_advantages(X, X, MASK, bootstrap=jnp.ones(3)), r"final must have shape"),
    (lambda: ops.reverse_discounted_sum(X, MASK, X[0]), r"decay must have shape"),
    (lambda: ops.token_entropy(X, MASK), r"mask must have shape"),
    (lambda: ops.broadcast_values(X, jnp.zeros((3, 5), jnp.int32)), r"ids must have shape \[B, T\] with B=4"),
    (lambda: ops.masked_whiten(X, MASK, ids=IDS[:2]), r"ids must have the leading shape of x"),
    # ids that point past the values, where they can be looked at
    (lambda: ops.broadcast_values(X, jnp.full((4, 5), 3)), r"ids must be below 3, .* got 3"),
    (lambda: ops.place_turn_rewards(X, jnp.full((4, 5), 9)), r"turn_ids must be below 3, .* got 9"),
    (lambda: ops.grpo_advantages(REWARDS, IDS, MASK, rollout_ids=IDS + 3), r"rollout_ids must be below 4"),
    # unknown options, with the choices
    (lambda: ops.reduce_loss(X, MASK, agg="mean"), r"agg must be one of 'token', 'seq', .*; got 'mean'"),
    (lambda: ops.kl_estimate(X, X, kind="k4"), r"kind must be one of 'k1', .*'k3\+'; got 'k4'"),
    (lambda: ops.group_normalize(REWARDS, IDS, center="prompt"), r"center must be one of"),
    (lambda: ops.group_normalize(REWARDS, IDS, scale="all"), r"scale must be one of"),
    (lambda: ops.group_normalize(REWARDS, IDS, std_of="centred"), r"std_of must be one of"),
    (lambda: ops.group_normalize(REWARDS, IDS, singleton="one"), r"singleton must be one of"),
    (lambda: ops.masked_whiten(X, MASK, eps_in="mean"), r"eps_in must be one of"),
    (lambda: ops.segment_reduce(REWARDS, IDS, 2, how="median"), r"how must be one of"),
    (lambda: ops.discounted_returns(X, MASK, on_masked="stop"), r"on_masked must be one of"),
    (lambda: ops.importance_weights(X, X, MASK, level="batch"), r"level must be one of"),
    (lambda: ops.importance_weights(X, X, MASK, outside="drop"), r"outside must be one of"),
    (lambda: ops.shape_ratio(X, MASK, strategy="log"), r"strategy must be one of"),
    (lambda: ops.sft_loss(X, MASK, kind="mse"), r"kind must be one of"),
    (lambda: ops.add_outcome(X, REWARDS, MASK, mode="set"), r"mode must be one of"),
    (lambda: ops.prime_advantages(X, REWARDS, MASK, IDS, loo="both"), r"loo must be one of"),
    (lambda: ops.mirror_descent_loss(REWARDS, REWARDS, REWARDS, IDS, tau=1.0, form="kl"), r"form must be one of"),
    # numbers out of range
    (lambda: ops.ppo_clip_loss(X, X, X, MASK, clip_low=1.0), r"clip_low must lie in \[0, 1\), got 1.0"),
    (lambda: ops.ppo_clip_loss(X, X, X, MASK, clip_high=-0.1), r"clip_high must lie in \[0, inf\), got -0.1"),
    (lambda: ops.ppo_clip_loss(X, X, X, MASK, dual_clip=1.0), r"dual_clip must lie in \(1, inf\)"),
    (lambda: ops.gae_advantages(X, X, MASK, lam=1.5), r"lam must lie in \[0, 1\], got 1.5"),
    (lambda: ops.masked_softmax(X, MASK, temperature=0.0), r"temperature must lie in \(0, inf\)"),
    (lambda: ops.importance_weights(X, X, MASK, cap=2.0, floor=3.0), r"floor must lie in \[0, 2\]"),
    (lambda: ops.overlong_penalty(IDS, max_len=10, buffer=11), r"buffer must lie in \[1, 10\], got 11"),
    (lambda: ops.value_loss(X, X, X, MASK, clip=0.0), r"clip must lie in"),
    (
        lambda: ops.token_cross_entropy(jnp.ones((4, 3, 2)), jnp.zeros((4, 3), jnp.int32), MASK, shift=3),
        r"shift must lie in",
    ),
    # what an option needs
    (lambda: ops.aggregate_loss(X, MASK, agg="const"), r'agg="const" needs max_len'),
    (lambda: ops.aggregate_loss(X, MASK, agg="rollout"), r'agg="rollout" needs rollout_ids'),
    (lambda: ops.value_loss(X, None, X, MASK, clip=0.2), r"clip needs old_values"),
    (lambda: ops.group_normalize(REWARDS[:1], IDS[:1], scale="batch"), r'scale="batch" needs at least 2 values'),
    (lambda: ops.masked_whiten(X, MASK & False), r"whitening needs at least 2 true entries of mask, got 0"),
    (lambda: ops.masked_whiten(X[:1], MASK[:1] & (jnp.arange(3) < 1)), r"at least 2 true entries of mask, got 1"),
    (
        lambda: ops.mirror_descent_loss(REWARDS, REWARDS, REWARDS, jnp.array([0, 0, 0, 7]), tau=1.0),
        r"mirror descent needs at least 2 samples per prompt, got one in group 7",
    ),
    (lambda: ops.prime_advantages(X, REWARDS, MASK, jnp.array([0, 0, 0, 7])), r"at least 2 samples per prompt"),
    # rewards from terms
    (lambda: ops.group_length_rewards(IDS, REWARDS, IDS), r"correct must be boolean, got float32"),
    (lambda: ops.group_length_rewards(IDS, MASK[:, 0], IDS, kind="max"), r"kind must be one of 'min_max'"),
    (lambda: ops.repetition_scores(X, IDS, min_repeats=1), r"min_repeats must lie in \[2, inf\)"),
    (lambda: ops.repetition_scores(X, IDS + 3), r"lengths must be at most 3, the width of tokens, got 4"),
    (lambda: ops.format_gated_rewards(REWARDS, IDS, penalty=()), r"penalty must be a number"),
    (lambda: ops.format_gated_rewards(REWARDS, IDS * 2, penalty=(-1.0,)), r"state must lie in 0..1, .* got 0..2"),
    (lambda: ops.combine_rewards({"a": REWARDS}, {"b": 1.0}), r"same names, got \['a'\] and \['b'\]"),
    (lambda: ops.combine_rewards({"a": REWARDS, "b": X}, {"a": 1.0, "b": 1.0}), r"b must have shape \[B\]"),
    (lambda: ops.progress_rewards(X, MASK), r"potentials must have one more column"),
    # which samples to train on
    (lambda: ops.pass_rate_mask(REWARDS, low=0.9, high=0.1), r"low must be at most high"),
    (lambda: ops.top_k_select(REWARDS, k=5), r"k must lie in \[1, 4\], got 5"),
    (lambda: ops.top_fraction_mask(REWARDS, fraction=1.5), r"fraction must lie in \[0, 1\]"),
    (lambda: ops.score_probs(REWARDS, transform="log"), r"transform must be one of"),
    (lambda: ops.resample_indices(jax.random.key(0), REWARDS, 2, method="best"), r"method must be one of"),
    (lambda: ops.reward_filter_weights(REWARDS, IDS, strategy="worst"), r"strategy must be one of"),
    (lambda: ops.best_worst_pairs(X, rejected="random"), r'rejected="random" needs a key'),
    (lambda: ops.best_worst_pairs(X[:, :1]), r"a pair needs at least 2 candidates"),
    # tokens and trees
    (lambda: ops.nucleus_mask(X, top_p=0.0), r"top_p must lie in \(0, 1\], got 0.0"),
    (lambda: ops.top_k_mask(X, 0), r"top_k must be a whole number of at least 1"),
    (lambda: ops.masked_log_softmax(X, X), r"allowed_mask must be boolean"),
    (lambda: ops.interpolate_params({"a": X}, {"a": X[0]}, 0.5), r"leaf \['a'\] must hold floats of one shape"),
    (lambda: ops.interpolate_params(X, X, 1.5), r"weight must lie in \[0, 1\]"),
    (lambda: ops.project_conflicting_grads([X, IDS], [X, IDS]), r"leaf \[1\] must hold floats"),
    (lambda: ops.semantic_branch_scores(X[:, :1], X[:, :1, None]), r"a branch needs at least 2 candidates"),
    (lambda: ops.semantic_branch_scores(X, X[..., None], form="cosine"), r"form must be one of"),
    (lambda: ops.choose_branch(X, IDS, jax.random.key(0), eps=1.5), r"eps must lie in \[0, 1\]"),
    (lambda: ops.branch_node_mask(jnp.array([-1, 2, 3, 1]), IDS, max_len=3), r"and no circle, got \[-1 .2 .3 .1\]"),
    (lambda: ops.branch_node_mask(jnp.array([-1, 0, 4, 0]), IDS, max_len=3), r"parent must name rows of the batch"),
    (lambda: ops.branch_node_mask(IDS - 1, IDS + 3, max_len=3), r"branch_pos must be at most max_len=3, got 4"),
    # overlaps
    (lambda: ops.fbeta(REWARDS, REWARDS, beta=0.0), r"beta must lie in \(0, inf\)"),
    (lambda: ops.set_fscore(MASK, MASK[:, :2]), r"gold_mask must have shape"),
    (lambda: ops.box_iou(X, X), r"boxes must have 4 coordinates on the last axis, got \[4, 3\]"),
    (lambda: ops.token_f1_ids(X.astype(int), MASK, X.astype(int), MASK), r"gold_ids must have shape \[B, G, M\]"),
    # pairs
    (lambda: ops.pair_margins(X[:3], X[:3], MASK[:3]), r"their number must be even, got 3"),
    (lambda: ops.pairwise_logistic_loss(REWARDS, REWARDS[:2]), r"labels must have shape"),
    (lambda: ops.dpo_loss(PAIRS, kind="apo"), r"kind must be one of 'sigmoid', 'robust'.*; got 'apo'"),
    (lambda: ops.dpo_loss(PAIRS, kind="exo_pair"), r'"exo_pair" needs label_smoothing above 0'),
    (lambda: ops.dpo_loss(PAIRS, label_smoothing=0.5), r"label_smoothing must lie in \[0, 0.5\)"),
    (lambda: ops.dpo_loss(PAIRS, beta=0.0), r"beta must lie in \(0, inf\), got 0.0"),
    (lambda: ops.dpo_loss(PAIRS, kind="aot", weights=REWARDS), r"weights of pairs mean nothing"),
    # votes and chances
    (lambda: ops.pass_at_k(IDS + 4, IDS, k=5), r"n of at least k=5"),
    (lambda: ops.pass_at_k(IDS + 4, IDS + 9, k=2), r"c in 0..n"),
    (lambda: ops.best_of_k_value(REWARDS, 0), r"k must lie in \[1, inf\), got 0"),
    (lambda: ops.elo_ratings(X, rounds=1, key=jax.random.key(0)), r"wins must have shape \[M, M\]"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_shapes_are_checked_at_trace_time():
    with pytest.raises(ValueError, match=r"mask must have shape \[B, T\]"):
        jax.jit(lambda x, mask: ops.sft_loss(x, mask))(X, MASK[:2])


def test_what_cannot_be_looked_at_under_jit_gives_zero():
    one = jnp.zeros((4, 3), bool).at[0, 0].set(True)
    assert not jax.jit(ops.masked_whiten)(X, one).any()
    assert not jax.jit(ops.reinforce_pp_advantages)(X, one).any()
    lone = jnp.array([0, 0, 0, 7])
    prime = jax.jit(ops.prime_advantages)(X, REWARDS, MASK, lone)
    assert prime[:3].any() and not prime[3].any()
    gradient = jax.jit(jax.grad(lambda seq: ops.mirror_descent_loss(seq, REWARDS, REWARDS, lone, tau=1.0)[0]))
    with pytest.raises(ValueError, match="group 7"):  # the ids are a constant here, so they can be
        gradient(REWARDS)
    late = jax.jit(jax.grad(lambda seq, ids: ops.mirror_descent_loss(seq, REWARDS, REWARDS, ids, tau=1.0)[0]))
    assert late(REWARDS + 1, lone)[3] == 0
    assert not jax.jit(ops.broadcast_values)(X, jnp.full((4, 5), 9)).any()
    circle = jax.jit(lambda parent: ops.branch_node_mask(parent, IDS, max_len=3))(jnp.array([1, 0, -1, -1]))
    assert circle[:, 0].all()  # it ends


def test_numpy_arrays_are_welcome():
    zeros, mask = np.zeros((2, 3)), np.ones((2, 3), bool)
    assert jax.jit(lambda: ops.ppo_clip_loss(zeros, zeros, zeros + 1, mask)[0])() == -1
    advantages = jax.jit(lambda: ops.grpo_advantages(np.array([1.0, 0.0]), np.array([3, 3]), mask))()
    np.testing.assert_allclose(advantages[:, 0], [0.707106, -0.707106], atol=2e-6)
