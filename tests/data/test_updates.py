"""The world of a long ledger."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.worlds.updates import (
    ASK,
    BEGIN,
    EOS,
    FIRST_ACCOUNT,
    FIRST_BALANCE,
    NEXT,
    SUMMARIZE,
    UpdatesEnv,
    demonstrate_updates,
    make_ledgers,
)

ENV = UpdatesEnv(32)
step = jax.jit(ENV.step)


def test_answers_are_the_last_balance():
    ledgers = make_ledgers(np.random.default_rng(0), 300, updates=20)
    ages = []
    for updates, asked, answer, memory in zip(
        *(ledgers[name] for name in ("updates", "asked", "answer", "memory")), strict=True
    ):
        times = np.flatnonzero(updates[:, 0] == asked)
        ages.append(20 - times[-1] if len(times) else 21)
        assert answer == (updates[times[-1], 1] if len(times) else memory[2 * (asked - FIRST_ACCOUNT) + 1])
    assert np.bincount(ages, minlength=22)[1:].min() > 3  # each of 21 ages is drawn some 14 times
    with pytest.raises(ValueError, match="updates=0"):
        make_ledgers(np.random.default_rng(0), 4, updates=0)


def test_demonstrations_are_episodes_of_the_environment():
    """Piece for piece, with the summaries as the next contexts, and rewarded where nothing was wrong."""
    rng = np.random.default_rng(1)
    ledgers = make_ledgers(rng, 6, updates=9)
    shown = demonstrate_updates(rng, ledgers, window=32, max_summaries=9)
    assert len(shown["lengths"]) == 6 * 3
    row = 0
    for number in range(6):
        task, reward = {name: jnp.asarray(array[number]) for name, array in ledgers.items()}, 0.0
        while not reward:
            tokens, mask = (shown[name][row, : shown["lengths"][row]].tolist() for name in ("tokens", "mask"))
            state, prompt, length = ENV.reset(jax.random.key(0), task)
            transcript = prompt[: int(length)].tolist()
            assert transcript[0] == BEGIN
            over = False
            while not over:
                end = len(transcript) + mask[len(transcript) :].index(True)
                turn = []
                while end + len(turn) < len(tokens) and mask[end + len(turn)]:
                    turn.append(tokens[end + len(turn)])
                padded = jnp.array([*turn, *[0] * (10 - len(turn))], jnp.int32)
                state, observation, length, reward, over = step(state, padded, jnp.int32(len(turn)))
                transcript += turn + ([] if over else observation[: int(length)].tolist())
            assert transcript == tokens
            assert (SUMMARIZE in tokens) != (ASK in tokens)
            task |= {"seen": state.seen - 1, "memory": padded[:9]}
            row += 1
        assert reward == 1 and turn == [int(ledgers["answer"][number]), EOS]
    assert row == 18


def test_errors_are_carried_on():
    rng = np.random.default_rng(2)
    ledgers = make_ledgers(rng, 200, updates=1)
    shown = demonstrate_updates(rng, ledgers, window=32, max_summaries=0, wrong=0.4)
    said = shown["tokens"][np.arange(200), shown["lengths"] - 2]
    assert said.min() >= FIRST_BALANCE and (shown["tokens"][:, 10] == NEXT).all()
    # a chance of 0.4 * 7 / 8 of an error; four standard errors of a share of 200
    assert abs(np.mean(said == ledgers["answer"]) - 0.65) < 4 * np.sqrt(0.65 * 0.35 / 200)


def test_what_is_not_open_ends_with_its_first_turn():
    ledgers = make_ledgers(np.random.default_rng(3), 1, updates=5)
    task = {name: jnp.asarray(array[0]) for name, array in ledgers.items()} | {"open": jnp.bool_(False)}
    state, _, _ = ENV.reset(jax.random.key(0), task)
    assert bool(step(state, jnp.full(10, NEXT), jnp.int32(1))[4])
