"""Trees of rollouts, masks over the vocabulary and trees of parameters: worked examples and plain Python."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_kernels import filter_logits
from jaxrl_llm import ops as eager
from tests.ops import oracles
from tests.ops.oracles import JITTED as ops
from tests.ops.oracles import array, check

PARENT, BRANCH_POS = jnp.array([-1, 0, -1, 0]), jnp.array([-1, 2, 0, 4])
LENGTHS, ONE_GROUP = jnp.array([6, 8, 5, 6]), jnp.zeros(4, jnp.int32)


def test_rose_tree():
    nodes = ops.branch_node_mask(PARENT, BRANCH_POS, max_len=8)
    assert [np.flatnonzero(row).tolist() for row in nodes] == [[0, 2, 4], [0, 2], [0], [0, 2, 4]]
    rewards = array(1, 1, 0, 0)
    advantages = ops.tree_segment_advantages(rewards, nodes, LENGTHS, ONE_GROUP)
    sixth = 1 / 6
    expected = [
        [sixth, sixth, -sixth, -sixth, 0.5, 0.5, 0, 0],
        [sixth, sixth] + [1 / 3] * 6,
        [-0.5] * 5 + [0] * 3,
        [sixth, sixth, -sixth, -sixth, -0.5, -0.5, 0, 0],
    ]
    check(advantages, expected)
    shorter = ops.tree_segment_advantages(rewards, nodes, LENGTHS, ONE_GROUP, length_exponent=1.0)
    expected[1][2:] = [0.222222] * 6  # phi = 1 - 4 / 6
    check(shorter, expected)
    for outside, phi in ((False, 1 - (4 / 6) ** 2), (True, (1 - 4 / 6) ** 2)):
        squared = ops.tree_segment_advantages(
            rewards, nodes, LENGTHS, ONE_GROUP, length_exponent=2.0, power_outside=outside
        )
        check(squared[1, 2:], (1 - phi) / 3)
    unscored = ops.tree_segment_advantages(
        rewards.at[3].set(jnp.nan), nodes, LENGTHS, ONE_GROUP, jnp.array([True, True, True, False])
    )
    check(unscored[0], [1 / 3, 1 / 3] + [0] * 6)
    assert not unscored[3].any()


def random_tree(rng, rows, width):
    """Rows of tokens, each drawn once; two groups side by side."""
    parent, branch_pos, tokens, group = [], [], [], []
    fresh = iter(range(10_000))
    for row in range(rows):
        group.append(row % 2)
        relatives = [r for r in range(row) if group[r] == group[row]]
        above = int(rng.choice(relatives)) if relatives and rng.random() < 0.8 else -1
        kept = int(rng.integers(0, len(tokens[above]) + 1)) if above >= 0 else (0 if relatives else -1)
        length = int(rng.integers(max(kept, 1), width + 1))
        own = tokens[above][:kept] if above >= 0 else []
        tokens.append(own + [next(fresh) for _ in range(length - len(own))])
        parent.append(above)
        branch_pos.append(kept)
    return parent, branch_pos, tokens, group


def plain_advantages(rewards, nodes, tokens, group, exponent):
    values = lambda b, k: oracles.mean(  # noqa: E731
        rewards[r] for r in range(len(rewards)) if group[r] == group[b] and k in nodes[r]
    )
    result = []
    right = [r for r in range(len(rewards)) if rewards[r]]
    for b, row in enumerate(tokens):
        cuts = sorted(k for k in nodes[b] if k < len(row)) + [len(row)]
        ends = [values(b, k) for k in cuts[:-1]] + [rewards[b]]
        own = np.concatenate([[ends[i + 1] - ends[i]] * (cuts[i + 1] - cuts[i]) for i in range(len(cuts) - 1)])
        rivals = [r for r in right if group[r] == group[b]]
        if b in right and exponent:
            best = min(rivals, key=lambda r: (len(tokens[r]), r))
            least = len(tokens[best])
            fork = max(k for k in nodes[b] & nodes[best] if k <= least)
            phi = 1 - ((least - fork) / max(len(row) - fork, 1)) ** exponent
            own[fork:] -= np.abs(own[fork:]) * max(phi, 0)
        result.append(own)
    return result


def test_random_trees():
    """Nodes by comparing prefixes of tokens that are all different; values and advantages by the definitions."""
    rows, width, rng = 10, 7, np.random.default_rng(0)

    @oracles.quick_jit
    def run(parent, branch_pos, rewards, lengths, group):
        nodes = eager.branch_node_mask(parent, branch_pos, max_len=width)
        return nodes, eager.tree_segment_advantages(rewards, nodes, lengths, group, length_exponent=0.5)

    for _ in range(30):
        parent, branch_pos, tokens, group = random_tree(rng, rows, width)
        order = rng.permutation(rows)  # children may come before their parents
        place = np.append(np.argsort(order), -1)
        parent, branch_pos, tokens, group = (
            place[[parent[r] for r in order]],
            *([column[r] for r in order] for column in (branch_pos, tokens, group)),
        )
        rewards = rng.integers(0, 2, rows).astype(float)
        lengths = [len(row) for row in tokens]
        mask, advantages = run(*map(jnp.asarray, (parent, branch_pos, rewards.astype(np.float32), lengths, group)))
        branches = {tuple(tokens[r][: branch_pos[r]]) for r in range(rows) if branch_pos[r] >= 0}
        nodes = [{0} | {k for k in range(1, len(row) + 1) if tuple(row[:k]) in branches} for row in tokens]
        for b, row in enumerate(mask):
            assert {*np.flatnonzero(row[: lengths[b] + 1]).tolist()} == nodes[b]
        for b, expected in enumerate(plain_advantages(rewards, nodes, tokens, group, 0.5)):
            check(advantages[b], np.pad(expected, (0, width - len(expected))))


def test_branch_scores():
    logp, vectors = jnp.log(array(0.5, 0.3, 0.2)), array([1, 0], [0, 2], [0.6, 0.8])  # their length does not matter
    for form, expected in {"released": -0.222405, "dissimilarity": 0.415980, "entropy": 1.029653}.items():
        check(ops.semantic_branch_scores(logp, vectors, form=form), expected)
    certain = jnp.log(array(0.98, 0.01, 0.01))
    check(ops.semantic_branch_scores(certain, vectors, form="released"), -0.001334)
    check(ops.semantic_branch_scores(certain, vectors), 0.003075)
    check(ops.semantic_branch_scores(array(0, -jnp.inf, -jnp.inf), vectors), 0)


def test_gradient_of_branch_scores():
    rng = np.random.default_rng(2)
    logp, vectors = np.log(rng.dirichlet(np.ones(4), 3)), rng.normal(size=(3, 4, 2))

    def oracle(logp, vectors):
        scores = []
        for row, embedded in zip(logp, vectors, strict=True):
            p, unit = np.exp(row), embedded / np.linalg.norm(embedded, axis=-1, keepdims=True)
            pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
            scores.append(-np.sum(p * row) * sum(p[i] * p[j] * (1 - unit[i] @ unit[j]) for i, j in pairs))
        return np.array(scores)

    oracles.compare(eager.semantic_branch_scores, oracle, logp, vectors)


def test_choice_of_a_branch():
    scores, lengths = array([0.1, 0.9, 5], [0.9, 0.2, 0.1], [7, 7, 7]), jnp.array([2, 3, 0])
    choices = {eps: oracles.quick_jit(partial(eager.choose_branch, eps=eps)) for eps in (0.0, 0.5, 1.0)}
    choose = lambda seed, eps, lengths: tuple(  # noqa: E731
        map(int, choices[eps](scores, lengths, jax.random.key(seed)))
    )
    assert choose(0, 0.0, lengths) == (0, 1)  # the first of equals; what was not generated does not count
    assert choose(0, 1.0, lengths) == (-1, 0)
    assert choose(0, 0.0, lengths * 0) == (-1, 0)
    restarts = sum(choose(seed, 0.5, lengths) == (-1, 0) for seed in range(60))
    assert 11 < restarts < 49  # five standard deviations around 30


def test_nucleus():
    logits = array(2, 1, 0, -1, -2)
    allowed = ops.nucleus_mask(logits, top_p=0.9)
    assert allowed.tolist() == [True, True, True, False, False]
    check(ops.masked_log_softmax(logits, allowed)[:3], [-0.407606, -1.407606, -2.407606])
    assert np.all(np.asarray(ops.masked_log_softmax(logits, allowed)[3:]) == -np.inf)
    assert ops.nucleus_mask(logits, top_p=0.5, always=(4,)).tolist() == [True, False, False, False, True]
    assert ops.nucleus_mask(logits, top_p=0.5, min_keep=2).tolist() == [True, True, False, False, False]
    assert ops.nucleus_mask(logits, top_p=1.0).all()
    assert ops.top_k_mask(logits[None, None], k=2).tolist() == [[[True, True, False, False, False]]]
    assert ops.top_k_mask(logits, k=9).all()


def test_nucleus_is_the_samplers():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(40, 64)), jnp.float32)
    kept = jnp.isfinite(filter_logits(logits, top_p=0.7))
    assert jnp.array_equal(ops.nucleus_mask(logits, top_p=0.7), kept)
    # the fewest that reach the probability
    mass, probs = jnp.sum(jax.nn.softmax(logits) * kept, -1), jnp.where(kept, jax.nn.softmax(logits), 1)
    assert np.all(mass >= 0.7) and np.all(mass - jnp.min(probs, -1) < 0.7)


def test_gradient_among_allowed_tokens():
    logits, allowed = oracles.X, oracles.MASK
    chosen = np.argmax(allowed, axis=1)

    def oracle(x):
        return np.array([row[i] - np.log(np.sum(np.exp(row[m]))) for row, m, i in zip(x, allowed, chosen, strict=True)])

    def op(x):
        return jnp.take_along_axis(eager.masked_log_softmax(x, jnp.asarray(allowed)), chosen[:, None], 1)[:, 0]

    oracles.compare(op, oracle, logits)
    nothing = oracles.quick_jit(
        jax.grad(lambda x: jnp.sum(jnp.exp(eager.masked_log_softmax(x, jnp.zeros((2, 3), bool)))))
    )
    assert not nothing(jnp.full((2, 3), jnp.nan)).any()


def test_interpolation():
    old, new = {"w": array(1, 2), "b": [jnp.ones((), jnp.bfloat16)]}, {"w": array(3, 6), "b": [jnp.float32(3)]}
    mixed = eager.interpolate_params(old, new, 0.25)
    assert mixed["w"].tolist() == [1.5, 3] and mixed["b"][0] == 1.5 and mixed["b"][0].dtype == jnp.bfloat16
    assert eager.interpolate_params(old, new, jnp.float32(1))["w"].tolist() == [3, 6]
    with pytest.raises(ValueError):
        eager.interpolate_params(old, {"w": old["w"]}, 0.5)


def test_projection():
    check(ops.project_conflicting_grads(array(1, -2), array(1, 1)), [1.5, -1.5])
    tree = {"a": array(1), "b": array(-2)}  # the inner product is that of the whole tree
    projected = ops.project_conflicting_grads(tree, {"a": array(1), "b": array(1)})
    assert projected["a"] == 1.5 and projected["b"] == -1.5
    check(ops.project_conflicting_grads(array(1, 2), array(1, 1)), [1, 2])
    check(ops.project_conflicting_grads(array(1, 2), array(0, 0)), [1, 2])
