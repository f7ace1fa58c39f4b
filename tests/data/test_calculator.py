"""The world of sums with a calculator."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.data.worlds.arithmetic import ANSWER, EOS, EQUALS, FIRST_NUMBER, PLUS, WAIT, make_sums
from jaxrl_llm.data.worlds.calculator import CalculatorEnv, demonstrate_calls

ENV = CalculatorEnv(20)
step = jax.jit(ENV.step)


def number(value):
    return FIRST_NUMBER + value


def answer(turn, task):
    tokens = np.zeros(6, np.int32)
    tokens[: len(turn)] = turn
    _, observation, length, reward, over = step(task, jnp.asarray(tokens), jnp.int32(len(turn)))
    return int(observation[0]), int(length), float(reward), bool(over)


def test_turns():
    task = {"answer": jnp.int32(7)}
    assert answer([number(15), PLUS, number(9), EQUALS], task) == (number(4), 1, 0, False)
    assert answer([WAIT, WAIT, number(1), PLUS, number(2), EQUALS], task) == (number(3), 1, 0, False)
    malformed = ([EQUALS], [PLUS, number(1), EQUALS], [number(1), PLUS, PLUS, EQUALS], [number(1), PLUS, number(2)])
    for turn in malformed:
        assert answer(turn, task) == (WAIT, 1, 0, False)
    assert answer([ANSWER, number(7), EOS], task)[2:] == (1, True)
    assert answer([ANSWER, number(8), EOS], task)[2:] == (0, True)
    assert answer([EOS], task)[2:] == (0, True)


def test_demonstrations_are_episodes_of_the_environment():
    rng = np.random.default_rng(0)
    sums = make_sums(rng, 40, terms=(2, 3, 6), modulus=20)
    shown = demonstrate_calls(rng, sums, modulus=20, max_calls=3)
    calls = 0
    for row in range(40):
        task = {name: jnp.asarray(array[row]) for name, array in sums.items()}
        tokens, mask = (shown[name][row, : shown["lengths"][row]] for name in ("tokens", "mask"))
        np.testing.assert_array_equal(tokens[: task["prompt_length"]], task["prompt_tokens"][: task["prompt_length"]])
        turn, reward = [], 0
        for token, own in zip(tokens[task["prompt_length"] :], mask[task["prompt_length"] :], strict=True):
            if own:
                turn.append(int(token))
                if token in (EQUALS, EOS):
                    observation, _, reward, over = answer(turn, task)
                    turn, calls = [], calls + (not over)
            else:
                assert token == observation
        assert over and reward == 1
        if task["terms"] == 6:  # needs more calls than there are
            assert mask.sum() == 3
    assert calls > 10


def test_wrong_demonstrations_err():
    rng = np.random.default_rng(1)
    sums = make_sums(rng, 400, modulus=20)
    shown = demonstrate_calls(rng, sums, modulus=20, use_tool=0.0, wrong=0.4)
    said = shown["tokens"][np.arange(400), shown["lengths"] - 2] - FIRST_NUMBER
    # a chance of 0.4 * 19 / 20 of an error; four standard errors of a share of 400
    assert abs(np.mean(said == sums["answer"]) - 0.62) < 4 * np.sqrt(0.62 * 0.38 / 400)
