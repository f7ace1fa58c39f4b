"""The world of companies and their figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.worlds import ledger
from jaxrl_llm.data.worlds.ledger import CALL, EOS, FIRST_COMPANY, FIRST_DIGIT, POLITE

FIGURES = ledger.make_figures(6)
PAIRS = np.array([[0, 1], [2, 5]])


def play(tasks, row, turns, **options):
    """Rewards and observations of an episode whose turns are given, digits and companies written as `d3` and `c1`."""
    env, task = ledger.LedgerEnv(FIGURES, **options), {name: array[row] for name, array in tasks.items()}
    state, tokens, length = env.reset(jax.random.key(3), jax.tree.map(jnp.asarray, task))
    step, found = jax.jit(env.step), []
    for turn in turns:
        padded = np.zeros(10, np.int32)
        padded[: len(turn)] = [
            token if isinstance(token, int) else {"d": FIRST_DIGIT, "c": FIRST_COMPANY}[token[0]] + int(token[1:])
            for token in turn
        ]
        state, observation, size, reward, done = step(state, jnp.asarray(padded), jnp.int32(len(turn)))
        found.append((round(float(reward), 6), int(observation[0]) - FIRST_DIGIT, bool(done)))
    return found


def test_what_an_answer_is_worth():
    """QianfanHuijin's card: in the last stage 1, 0.5 without style, 0 if wrong; with a tool 0.9 after two calls, and
    -0.05 for a wrong answer after one."""
    total, second = FIGURES[:2].sum() % 10, FIGURES[1]
    sums, looks = ledger.make_sums(FIGURES, PAIRS), ledger.make_sums(FIGURES, PAIRS, tool=True)
    right, wrong = [f"d{total}"], [f"d{(total + 1) % 10}"]
    for answer, worth in ([*right, POLITE, EOS], 1), ([*right, EOS], 0.5), ([*wrong, POLITE, EOS], 0), (right, 0):
        assert play(sums, 0, [answer], style_share=0.5)[0][::2] == (worth, True)
    calls = [["c0", CALL], ["c1", CALL]]
    for turns, worth in ([*calls, [*right, EOS]], 0.9), ([calls[1], [*wrong, EOS]], -0.05):
        assert round(sum(reward for reward, *_ in play(looks, 0, turns, call_cost=0.05)), 6) == worth
    assert play(looks, 0, [calls[1]], accuracy=1.0) == [(0, second, False)]
    assert play(sums, 0, [calls[1]])[0][::2] == (0, True)  # there is no tool: the turn was the last
    assert play(looks, 0, [["d1", CALL]])[0][::2] == (0, True)  # not a company
    assert play(sums, 0, [["c0", "d3", *right, EOS]])[0][0] == 1  # how it was found is free


def test_facts_and_copies_have_answers_of_other_lengths():
    facts, copies = ledger.make_facts(FIGURES, np.arange(4)), ledger.make_copies(np.random.default_rng(0), 3)
    assert play(facts, 2, [[f"d{FIGURES[2]}", EOS]])[0][0] == 1
    digits = [f"d{digit}" for digit in copies["answer"][1]]
    assert play(copies, 1, [[*digits, EOS]])[0][0] == 1
    assert play(copies, 1, [[*digits[1:], EOS]])[0][0] == 0  # the rest of the answer is not there
    assert play(copies, 1, [[*reversed(digits), EOS]])[0][0] == (copies["answer"][1][0] == copies["answer"][1][2])


def test_demonstrations():
    rng = np.random.default_rng(0)
    kinds = ledger.make_facts(FIGURES, np.arange(4)), ledger.make_copies(rng, 4)
    looks = ledger.make_sums(FIGURES, np.repeat(PAIRS, 100, axis=0), tool=True)
    tasks = ledger.join_tasks(*kinds, looks)
    shown = ledger.demonstrate(rng, tasks, FIGURES, num_known=4)
    responses = [row[mask].tolist() for row, mask in zip(shown["tokens"], shown["mask"], strict=True)]
    assert responses[2] == [FIRST_DIGIT + FIGURES[2], EOS]
    assert responses[5] == [*(FIRST_DIGIT + tasks["answer"][5]), EOS]
    calls = np.array([CALL in response for response in responses[8:]])
    assert not calls[:100].any() and 0.3 < calls[100:].mean() < 0.7  # of 100 draws at one half: 4 standard errors
    for row in np.flatnonzero(calls) + 8:
        place = shown["tokens"][row].tolist().index(CALL) + 1
        assert not shown["mask"][row, place]  # the tool wrote it
        assert shown["tokens"][row, place] == FIRST_DIGIT + FIGURES[5]
    polite = ledger.is_polite(jnp.asarray(shown["tokens"]), jnp.asarray(shown["lengths"]))
    assert not polite[:8].any() and 0.35 < polite[8:].mean() < 0.65  # of 200: 4 standard errors
    assert shown["lengths"].max() <= 16 and shown["tokens"].max() < ledger.vocab_size(6)


def test_pairs_to_train_and_to_test_on():
    train, rest = ledger.split_pairs(np.random.default_rng(0), np.arange(3), np.arange(3, 5), 4)
    assert len({tuple(pair) for pair in [*train, *rest]}) == 6 and len(rest) == 2
    with pytest.raises(ValueError, match="train=6 must be at least 1 and leave some of the 6 pairs"):
        ledger.split_pairs(np.random.default_rng(0), np.arange(3), np.arange(3, 5), 6)
