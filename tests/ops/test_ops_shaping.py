"""Terms of a reward: the papers' worked examples in literal numbers, edges, and loops in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import ops as eager
from tests.ops import oracles
from tests.ops.oracles import JITTED as ops
from tests.ops.oracles import array, check

ONE_GROUP = jnp.zeros(4, jnp.int32)


def test_length_by_range():
    """Kimi k1.5: half a point down to minus half, and nothing to gain from a wrong answer."""
    lengths, right = jnp.array([100, 200, 300, 150]), jnp.array([True, True, False, False])
    check(ops.group_length_rewards(lengths, right, ONE_GROUP), [0.5, 0, -0.5, 0])
    equal = ops.group_length_rewards(jnp.full(4, 7), right, ONE_GROUP)
    assert not equal.any()
    ids = jnp.array([9, -1, 9, -1])  # two groups: 100 and 300, 200 and 150
    check(ops.group_length_rewards(lengths, right, ids), [0.5, -0.5, -0.5, 0])
    without = ops.group_length_rewards(lengths, right, ONE_GROUP, jnp.array([True, True, False, True]))
    check(without, [0.5, -0.5, 0, 0])


def test_length_by_deviates_of_the_right_answers():
    """GRPO-lambda's two selected groups, and a group with one right answer, whose deviate is 0."""
    lengths = jnp.tile(jnp.array([10, 20, 30, 40]), 3)
    right = jnp.array([1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0], bool)
    terms = ops.group_length_rewards(lengths, right, jnp.repeat(jnp.arange(3), 4), kind="sigmoid")
    rewards = right * (1 - 0.2 * terms)
    check(rewards[:8], [0.954580, 0.9, 0.845420, 0, 0.958552, 0.921995, 0.878005, 0.841448])
    check(terms[8:], [0.5, 0, 0, 0])
    advantages = ops.group_normalize(rewards[:8], jnp.repeat(jnp.arange(2), 4))
    check(advantages, [0.618262, 0.497565, 0.376868, -1.492695, 1.146495, 0.430686, -0.430686, -1.146495], atol=2e-5)


def test_length_by_deviation():
    """HARMO: nothing up to a fifth from the mean length of the right answers, at most the whole penalty of a half."""
    lengths, right = jnp.array([100, 100, 40, 300]), jnp.array([True, True, False, False])
    terms = ops.group_length_rewards(lengths, right, ONE_GROUP, kind="deviation", tolerance=0.2)
    check(0.5 * terms, [0, 0, -0.25, -0.5])
    total = array(1, 1, 0, 0) + 0.5 + 0.5 * terms
    check(ops.group_normalize(total - 0.0, ONE_GROUP, scale="none"), [0.6875, 0.6875, -0.5625, -0.8125])
    none = ops.group_length_rewards(lengths, right & False, ONE_GROUP, kind="deviation")
    assert not none.any()


def looped_share(answer, min_repeats):
    looped = 0
    for period in range(1, len(answer) // min_repeats + 1):
        blocks = 1
        while (blocks + 1) * period <= len(answer):
            start = len(answer) - (blocks + 1) * period
            if answer[start : start + period] != answer[start + period : start + 2 * period]:
                break
            blocks += 1
        if blocks >= min_repeats:
            looped = blocks * period
    return looped / len(answer) if answer else 0.0


def test_repetition():
    """CAMPO's examples; then every answer of up to twelve tokens in a sample, against the rule spelt out. No period but
    the largest counts, and what lies behind the answer is not read."""
    answers = [[1, 2, 3, 7, 8, 7, 8, 7, 8], [9, 1, 2, 1, 2, 1], [5, 5, 5, 5], [7, 5, 5, 5, 5, 5], [1, 2, 3, 4, 5, 6]]
    rng = np.random.default_rng(0)
    answers += [rng.integers(0, 2, rng.integers(0, 13)).tolist() for _ in range(200)]
    tokens = np.full((len(answers), 12), 1)  # a padding that would go on with many a loop
    for row, answer in zip(tokens, answers, strict=True):
        row[: len(answer)] = answer
    lengths = np.array([len(answer) for answer in answers])
    scores = ops.repetition_scores(jnp.asarray(tokens), jnp.asarray(lengths))
    check(scores[:5], [6 / 9, 4 / 6, 1, 4 / 6, 0])
    check(scores, [looped_share(answer, 2) for answer in answers])
    thrice = ops.repetition_scores(jnp.asarray(tokens), jnp.asarray(lengths), min_repeats=3)
    check(thrice, [looped_share(answer, 3) for answer in answers])
    assert 0.05 < np.mean(np.asarray(thrice) > 0) < 0.95
    # the looping right answer gets no credit
    rewards = array(1, 0, 1, 0) - array(0, 2 / 3, 1, 1 / 3)
    check(ops.group_normalize(rewards, ONE_GROUP), [1.388728, -0.925819, 0, -0.462910])


def test_gated_rewards():
    rewards = array(1, jnp.nan, 0.5, 0.2)
    check(ops.format_gated_rewards(rewards, jnp.array([True, False, True, True]), penalty=-0.1), [1, -0.1, 0.5, 0.2])
    state = jnp.array([0, 1, 2, 0])
    check(ops.format_gated_rewards(rewards, state, penalty=(-0.1, -0.5)), [1, -0.1, -0.5, 0.2])
    check(ops.format_gated_rewards(rewards, state, penalty=-1), [1, -1, -1, 0.2])
    gradient = jax.grad(lambda r: eager.format_gated_rewards(r, state).sum())(rewards)
    assert gradient.tolist() == [1, 0, 0, 1]


def test_combined_rewards():
    """SSRL: nine tenths for the answer, one for the format."""
    terms = {"answer": array(1, 1, 0), "format": array(1, 0.5, 1)}
    total, metrics = eager.combine_rewards(terms, {"answer": 0.9, "format": 0.1})
    check(total, [1, 0.95, 0.1])
    check(metrics["answer"], 2 / 3)
    check(metrics["format"], 2.5 / 3)
    terms["answer"] = array(1, jnp.nan, 0)
    total, metrics = eager.combine_rewards(
        terms, {"answer": jnp.float32(0.9), "format": 0.1}, jnp.array([True, False, True])
    )
    check(total, [1, 0, 0.1])
    check(metrics["answer"], 0.5)


def test_progress():
    """A prover's success after best of four (PAV), evidence covered (IM-RAG); they telescope."""
    policy = array([0.2, 0.3, 0.25, 0.9])
    prover = ops.best_of_k_value(policy, k=4)
    check(prover, [[0.5904, 0.7599, 0.683594, 0.9999]])
    everything = jnp.ones((1, 3), bool)
    check(ops.progress_rewards(prover, everything), [[0.1695, -0.076306, 0.316306]])
    check(ops.progress_rewards(array([0, 0.628377, 0.995037]), everything[:, :2]), [[0.628377, 0.366660]])
    stopped = jnp.array([[True, True, False]])
    unread = array([0.2, 0.3, 0.25, jnp.nan])
    check(ops.progress_rewards(unread, stopped, gamma=0.9, step_cost=0.01), [[0.06, -0.085, 0]])


def test_gradient_of_progress():
    potentials = np.random.default_rng(1).normal(size=(oracles.B, oracles.K + 1))
    oracles.compare(
        lambda x: eager.progress_rewards(x, jnp.asarray(oracles.TURN_MASK), gamma=0.9, step_cost=0.1),
        lambda x: np.where(oracles.TURN_MASK, 0.9 * x[:, 1:] - x[:, :-1] - 0.1, 0),
        potentials,
    )
