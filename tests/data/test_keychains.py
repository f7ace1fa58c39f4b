"""The world of long windows and key chains."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.worlds.keychains import (
    ASK,
    EOS,
    FACT,
    FIRST_KEY,
    FIRST_NAME,
    FIRST_VALUE,
    KEY,
    KINDS,
    VALUES,
    Question,
    demonstrate_trails,
    link_chain,
    make_keychain,
    make_long_questions,
    trail_reward,
)

QUESTIONS = [Question([50 + i, 60], f"answer {i}") for i in range(4)]
DOCUMENTS = [[FACT, 50 + i, 70 + i, 80] for i in range(20)]
OPTIONS = {"question": QUESTIONS[0], "other_questions": QUESTIONS[1:], "documents": DOCUMENTS}


def test_a_chain_leads_from_the_head_to_the_question():
    options = OPTIONS | {"num_chains": 3, "hops": 2, "window": 60, "key_len": 2, "key_ids": range(100, 104)}
    tokens, head, answer = make_keychain(np.random.default_rng(0), **options)
    same, *_ = make_keychain(np.random.default_rng(0), **options)
    np.testing.assert_array_equal(tokens, same)
    assert answer == "answer 0" and len(tokens) <= 60 and len(tokens) + 4 > 60
    text = tokens.tolist()
    pairs = [text[i + 1 : i + 5] for i, token in enumerate(text) if token == KEY]
    assert len(pairs) == 6
    follows = {tuple(pair[:2]): tuple(pair[2:]) for pair in pairs}
    assert follows[follows[head]] == (50, 60)
    assert sorted(set(follows.values()) - set(follows)) == [(50, 60), (51, 60), (52, 60)]
    assert [text[i + 1] for i, token in enumerate(text) if token == FACT] != list(range(50, 57))  # shuffled
    assert {50, 51, 52} <= {text[i + 1] for i, token in enumerate(text) if token == FACT}  # taken in order


def test_bad_chains():
    make = {"num_chains": 3, "hops": 4, "window": 60}
    with pytest.raises(ValueError, match="3 chains of 4 pairs take 39 tokens, .* a window of 40"):
        make_keychain(np.random.default_rng(0), **OPTIONS, **make | {"window": 40})
    with pytest.raises(ValueError, match="needs 4 other questions, got 3"):
        make_keychain(np.random.default_rng(0), **OPTIONS, **make | {"num_chains": 5})
    with pytest.raises(ValueError, match="12 different keys of 1 tokens need more than 3 key_ids"):
        make_keychain(np.random.default_rng(0), **OPTIONS, **make, key_ids=range(3))
    with pytest.raises(ValueError, match="hops=0"):
        make_keychain(np.random.default_rng(0), **OPTIONS, **make | {"hops": 0})
    with pytest.raises(ValueError, match="all different"):
        link_chain([[1], [2], [1]], [9])
    with pytest.raises(ValueError, match="one above 0"):
        make_long_questions(np.random.default_rng(0), 2, windows=(20,), mix={"essay": 1.0})
    with pytest.raises(ValueError, match="8 to 259 tokens"):
        make_long_questions(np.random.default_rng(0), 2, windows=(20, 1000), mix={"qa": 1.0})


def test_every_trail_can_be_walked_in_its_window():
    questions = make_long_questions(
        np.random.default_rng(1), 30, windows=(20, 64, 128), mix={kind: 1 / 3 for kind in KINDS}, asked=6
    )
    steps = {"needle": 1, "qa": 2, "keychain": 6}
    assert set(questions["kind"]) == {0, 1, 2} and np.bincount(questions["window"])[[20, 64, 128]].tolist() == [10] * 3
    for row in range(30):
        text = questions["prompt_tokens"][row, : questions["prompt_length"][row]]
        assert len(text) <= questions["window"][row] and text[-2] == ASK
        pieces = text[:-2].reshape(-1, 3)
        assert set(pieces[:, 0]) <= {FACT, KEY} and len(set(pieces[:, 1])) == len(pieces)
        follows = {start: end for _, start, end in pieces.tolist()}
        trails = [trail[: np.argmax(trail == EOS)].tolist() for trail in questions["trails"][row] if trail[0]]
        assert trails[0][0] == text[-1] and len(trails[0]) == 1 + steps[KINDS[questions["kind"][row]]]
        assert trails[0][-1] == questions["answer"][row]
        for trail in trails:
            assert [follows[token] for token in trail[:-1]] == trail[1:] and 0 <= trail[-1] - FIRST_VALUE < VALUES
        walked = [token for trail in trails for token in trail[:-1]]
        assert len(walked) == len(set(walked))  # nothing in common
    keys = questions["prompt_tokens"][questions["kind"] == 2]
    assert ((keys >= FIRST_KEY).sum(1) > 0).all() and FIRST_NAME < FIRST_KEY


def test_demonstrations_and_reward():
    rng = np.random.default_rng(2)
    questions = make_long_questions(rng, 20, windows=(64,), mix={"qa": 1.0}, asked=3)
    right = demonstrate_trails(rng, questions)
    for tokens, mask, length, trails in zip(*right.values(), questions["trails"], strict=True):
        assert tokens[mask].tolist() == [token for trail in trails for token in trail[1:] if token]
        assert mask[length - 1] and not mask[length:].any()
    stops = demonstrate_trails(rng, questions, stop=0.5)
    assert 0.6 < stops["mask"].sum() / right["mask"].sum() < 0.95  # half of the trails end after one step of two
    task = {"answer": jnp.int32(7)}
    for response, reward in (([60, 7, EOS], 1), ([7, EOS], 1), ([7], 0), ([7, 8, EOS], 0), ([EOS], 0), ([], 0)):
        padded = jnp.array([*response, *[7] * (4 - len(response))])
        assert trail_reward(task, padded, jnp.int32(len(response))) == reward
