"""The world of stack programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.worlds.stack_programs import (
    ADD,
    EOS,
    FIRST_NUMBER,
    INPUT,
    PAD,
    RUN,
    TIMES,
    demonstrate_programs,
    make_program_problems,
    program_reward,
    run_program,
)

PROBLEMS = make_program_problems()
run = jax.jit(run_program, static_argnums=2)
TWO, THREE = FIRST_NUMBER + 2, FIRST_NUMBER + 3


def test_all_problems():
    assert np.bincount(PROBLEMS["level"]).tolist() == [11, 30, 36]
    assert len({tuple(row) for row in PROBLEMS["outputs"]}) == 77  # no two ask for the same
    assert PROBLEMS["prompt_tokens"][0].tolist() == [FIRST_NUMBER + 1, TWO, THREE, RUN]
    assert PROBLEMS["program"][0].tolist() == [INPUT, FIRST_NUMBER + 1, ADD, EOS, PAD, PAD, PAD, PAD]
    x = np.arange(7)
    for row in (11, 40, 41, 76):
        program = [token for token in PROBLEMS["program"][row] if token >= FIRST_NUMBER]
        a, b = np.array(program) - FIRST_NUMBER
        expected = a * x + b if PROBLEMS["level"][row] == 1 else (x + a) * x + b
        np.testing.assert_array_equal(PROBLEMS["outputs"][row], expected % 7)


@pytest.mark.parametrize(
    ("program", "ran"),
    [
        ([INPUT, TWO, TIMES, THREE, ADD, EOS], True),
        ([INPUT, TWO, TIMES, THREE, ADD], False),  # no end
        ([INPUT, TWO, EOS], False),  # two numbers left
        ([INPUT, ADD, TWO, EOS], False),  # one number is none to add to
        ([INPUT] * 5 + [ADD] * 2 + [EOS], False),  # the stack is full
        ([INPUT, RUN, EOS], False),
        ([EOS], False),
    ],
)
def test_programs_run(program, ran):
    padded = jnp.array(program + [TWO] * (8 - len(program)))
    outputs, valid = run(padded, jnp.int32(len(program)), 7)
    assert bool(valid) == ran
    if ran:
        np.testing.assert_array_equal(outputs, (2 * np.arange(7) + 3) % 7)


def test_demonstrations():
    shown = demonstrate_programs(np.random.default_rng(0), PROBLEMS, wrong=(0.0, 0.0, 1.0))
    tokens, lengths = jnp.asarray(shown["tokens"][:, 4:]), jnp.asarray(shown["lengths"] - 4)
    rewards = jax.jit(jax.vmap(program_reward))({"outputs": jnp.asarray(PROBLEMS["outputs"])}, tokens, lengths)
    assert np.all(rewards[:41] == 1) and np.mean(rewards[41:]) < 0.2 and tokens.max() < FIRST_NUMBER + 7
    np.testing.assert_array_equal(shown["mask"].sum(1), lengths)


def test_bad_modulus():
    with pytest.raises(ValueError, match="a prime from 3 on, got 2"):
        make_program_problems(2)
