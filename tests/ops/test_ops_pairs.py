"""Losses of pairs and overlaps of sets, answers and boxes: literal numbers, then plain Python in float64."""

import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import ops as eager
from jaxrl_llm.ops.preference import DpoKind
from jaxrl_llm.rewards import exact_match, token_f1
from tests.ops import oracles
from tests.ops.oracles import JITTED as ops
from tests.ops.oracles import array, check

ONE_PAIR = eager.PairStats(array(1.5), array(-0.5), array(0), array(0), array(3), array(2))


@pytest.mark.parametrize(
    "kind, expected, options",
    [
        ("sigmoid", 0.5981388694, {}),
        ("sigmoid", 0.6181388694, {"label_smoothing": 0.1}),
        ("hinge", 0.8, {}),
        ("ipo", 18.0625, {}),
        ("sigmoid_norm", 0.2014132780, {"beta": 2.0}),
        ("robust", 0.5731388694, {"label_smoothing": 0.1}),
        ("exo_pair", 2.4220146207, {"label_smoothing": 0.001}),
        ("nca_pair", 1.3406653957, {}),
        ("bco_pair", 1.2894166958, {}),
        ("sppo_hard", 32.5, {}),
        ("apo_zero", 0.9500727582, {}),
        ("apo_down", 0.9875958480, {}),
        ("discopop", 0.8147631411, {}),
        ("aot", 0.5981388694, {}),
        ("aot_unpaired", 0.5981388694, {}),
        ("sft", -0.5, {}),
    ],
)
def test_preference_losses(kind, expected, options):
    loss, metrics = ops.dpo_loss(ONE_PAIR, kind=kind, **options)
    check(loss, expected, rtol=2e-6, atol=0)
    beta = options.get("beta", 0.1)
    check([metrics["reward_chosen"], metrics["margin"], metrics["accuracy"]], [1.5 * beta, 2 * beta, 1])


def plain_losses(chosen, rejected, ref_chosen, ref_rejected, counts, beta, e):
    """Every kind, over pairs, in float64."""
    n_c, n_r = counts
    c, r = chosen - ref_chosen, rejected - ref_rejected
    s = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    ls = lambda x: np.log(s(x))  # noqa: E731
    smooth = lambda x: -(1 - e) * ls(x) - e * ls(-x)  # noqa: E731
    u, mean, m = beta * (c - r), c / n_c - r / n_r, s(beta * (c - r) / 0.05)
    values = {
        "sigmoid": smooth(u),
        "robust": (-(1 - e) * ls(u) + e * ls(-u)) / (1 - 2 * e),
        "hinge": np.maximum(0, 1 - u),
        "ipo": (mean - 1 / (2 * beta)) ** 2,
        "sigmoid_norm": -ls(beta * mean),
        "exo_pair": s(u) * (ls(u) - np.log(1 - e)) + s(-u) * (ls(-u) - np.log(e)),
        "nca_pair": -ls(beta * c) - 0.5 * ls(-beta * c) - 0.5 * ls(-beta * r),
        "bco_pair": -ls(beta * c) - ls(-beta * r),
        "sppo_hard": (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2,
        "apo_zero": 1 - s(beta * c) + s(beta * r),
        "apo_down": s(beta * c) + 1 - s(u),
        "discopop": -ls(u) * (1 - m) + np.exp(-u) * m,
        "aot": smooth(beta * (np.sort(chosen - rejected) - np.sort(ref_chosen - ref_rejected))),
        "aot_unpaired": smooth(beta * (np.sort(c) - np.sort(r))),
        "sft": np.array(-np.sum(chosen) / np.sum(n_c)),
    }
    return np.array([np.mean(values[kind]) for kind in get_args(DpoKind)])


def test_all_kinds_and_their_gradients():
    """From tokens on, with a pair that does not count; then the same losses as parts of one sum."""
    rng = np.random.default_rng(0)
    mask = rng.random((8, 6)) < 0.6
    mask[:, 0] = True
    logprobs, ref = -rng.uniform(0.1, 1.5, (2, 8, 6))
    valid, beta, e, kinds = np.array([True, True, False, True]), 0.7, 0.1, get_args(DpoKind)
    poisoned = np.where(np.tile(valid, 2)[:, None], ref, np.nan)

    def losses(x):
        stats = eager.pair_margins(x, jnp.asarray(poisoned, jnp.float32), jnp.asarray(mask))
        parts = [
            eager.dpo_loss(stats, kind=k, beta=beta, label_smoothing=e, valid=jnp.asarray(valid))[0] for k in kinds
        ]
        return jnp.stack(parts)

    def oracle(x):
        sums, ref_sums, counts = ((y * mask).sum(1).reshape(2, 4)[:, valid] for y in (x, ref, np.ones(mask.shape)))
        return plain_losses(*sums, *ref_sums, counts, beta, e)

    oracles.compare(losses, oracle, logprobs)
    stats = eager.pair_margins(*map(jnp.asarray, (logprobs, ref, mask)))
    mixture = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
    total, metrics = ops.dpo_loss(stats, kind=mixture, beta=beta)
    check(total, sum(weight * metrics[kind] for kind, weight in mixture.items()))


def test_weighted_pairs():
    stats = eager.PairStats(array(1, 2), array(0, 0), *[jnp.zeros(2)] * 2, *[jnp.ones(2)] * 2)
    each = [ops.dpo_loss(eager.PairStats(*(x[i : i + 1] for x in stats)))[0] for i in range(2)]
    check(ops.dpo_loss(stats, weights=array(0.5, 3))[0], (0.5 * each[0] + 3 * each[1]) / 2)  # a pair is still a pair
    check(ops.pairwise_logistic_loss(array(0.1, 0.2), weights=array(0.5, 3))[0], (0.5 * each[0] + 3 * each[1]) / 3.5)
    labelled, metrics = ops.pairwise_logistic_loss(array(1), 0.8)  # CREAM's agreement as a label
    check(labelled, 0.5132616875)
    assert metrics["accuracy"] == 1
    check(ops.dpo_loss(stats, labels=array(1, 1), label_smoothing=0.1)[0], sum(each) / 2)
    gradient = lambda loss: oracles.quick_jit(jax.grad(loss))  # noqa: E731
    half = gradient(lambda m: eager.pairwise_logistic_loss(m, 0.5)[0])(array(0, 0))
    assert not half.any()  # a tie asks for no margin
    poisoned = gradient(
        lambda m: eager.pairwise_logistic_loss(m, array(1, jnp.nan), valid=jnp.array([True, False]))[0]
    )(array(0, jnp.nan))
    check(poisoned, [-0.5, 0])


def sets(*rows, size=13):
    return jnp.array([[k in row for k in range(size)] for row in rows])


def test_sets():
    """Facial-R1's action units, paid with 2F - 1; spans where nothing to find and nothing found is right."""
    pred, gold = sets({4, 9}, {6, 12}, set(), {1}, set()), sets({4, 7, 9}, {6, 12}, {1}, set(), set())
    check(2 * ops.set_fscore(pred, gold) - 1, [0.6, 1, -1, -1, -1])
    check(ops.set_fscore(sets({1, 2}, set()), sets({1}, set()), empty=1.0), [2 / 3, 1])
    check(ops.fbeta(array(1, 0), array(2 / 3, 0), beta=2.0), [5 * (2 / 3) / (4 + 2 / 3), 0])


def test_boxes():
    check(ops.box_iou(array(0, 0, 2, 2), array(1, 1, 3, 3)), 1 / 7)
    a = array([0, 0, 2, 2], [0, 0, 4, 4], [3, 3, 1, 1])  # the last is empty
    check(ops.box_iou(a[:, None], a[:2]), [[1, 0.25], [0.25, 1], [0, 0]])
    assert ops.box_iou(a[2], a[2]) == 0
    oracles.compare(
        lambda x: eager.box_iou(x, array(1, 1, 3, 3)),
        lambda x: (x[2] - 1) * (x[3] - 1) / (4 + (x[2] - x[0]) * (x[3] - x[1]) - (x[2] - 1) * (x[3] - 1)),
        np.array([0.1, 0.2, 2.1, 2.3]),
    )


def test_answers_as_ids_score_as_text_does():
    """All answers of up to three of two tokens against two golds, with gaps in the masks, as words of a text."""
    answers = [list(x) for n in range(4) for x in itertools.product((0, 1), repeat=n)]
    cases = [(pred, gold) for pred in answers for gold in answers if gold]
    other = [1, 1, 0]

    def padded(rows):
        """Tokens two apart, and something else between them."""
        tokens, mask = np.full((len(rows), 6), 1), np.zeros((len(rows), 6), bool)
        for i, row in enumerate(rows):
            tokens[i, : 2 * len(row) : 2], mask[i, : 2 * len(row) : 2] = row, True
        return tokens, mask

    pred, pred_mask = padded([pred for pred, _ in cases])
    golds = [padded(rows) for rows in ([gold for _, gold in cases], [other] * len(cases), [[]] * len(cases))]
    gold, gold_mask = (np.stack(parts, axis=1) for parts in zip(*golds, strict=True))
    arguments = [jnp.asarray(x) for x in (pred, pred_mask, gold, gold_mask)]
    text = lambda row: " ".join("xy"[token] for token in row)  # noqa: E731
    for op, score in ((ops.exact_match_ids, exact_match), (ops.token_f1_ids, token_f1)):
        expected = [score(text(pred), [text(gold), text(other)]) for pred, gold in cases]
        check(op(*arguments), expected)
