"""The world of keys and codes."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.worlds.codes import (
    EQUALS,
    FIRST_KEY,
    FIRST_NUMBER,
    NUMBERS,
    code_reward,
    demonstrate_codes,
    make_code_questions,
    make_codes,
    vocab_size,
)


def test_questions_and_answers():
    asked = make_code_questions(np.random.default_rng(0), 200, num_keys=6, num_easy=2)
    codes = make_codes(6)
    keys, x = asked["prompt_tokens"][:, 0] - FIRST_KEY, asked["prompt_tokens"][:, 1] - FIRST_NUMBER
    assert (
        asked["hard"].mean() == 0.5 and set(keys[asked["hard"]]) == {2, 3, 4, 5} and set(keys[~asked["hard"]]) == {0, 1}
    )
    np.testing.assert_array_equal(asked["response"][:, :2] - FIRST_NUMBER, codes[keys])
    np.testing.assert_array_equal(asked["response"][:, 2] - FIRST_NUMBER, (x + codes[keys, 0]) % NUMBERS)
    np.testing.assert_array_equal(asked["hinted_tokens"][:, 2:4] - FIRST_NUMBER, codes[keys])
    assert (asked["prompt_tokens"][:, 2] == EQUALS).all() and (asked["hinted_tokens"][:, 4] == EQUALS).all()
    assert max(array.max() for name, array in asked.items() if name != "hard") < vocab_size(6)
    assert make_code_questions(np.random.default_rng(0), 4, num_keys=3, num_easy=0)["hard"].all()
    assert not make_code_questions(np.random.default_rng(0), 4, num_keys=3, num_easy=3)["hard"].any()


def test_demonstrations_follow_their_hint_and_tell_no_hard_code():
    rng = np.random.default_rng(1)
    asked = make_code_questions(rng, 100)
    shown = demonstrate_codes(rng, asked)
    for row in range(100):
        response = shown["tokens"][row][shown["mask"][row]]
        assert shown["lengths"][row] == (9 if shown["tokens"][row, 2] != EQUALS else 7)
        if asked["hard"][row]:
            hint, x = shown["tokens"][row, 2:4], shown["tokens"][row, 1] - FIRST_NUMBER
            np.testing.assert_array_equal(response[:2], hint)
            assert response[2] - FIRST_NUMBER == (x + hint[0] - FIRST_NUMBER) % NUMBERS
            continue
        task = {"response": jnp.asarray(asked["response"][row])}
        assert code_reward(task, jnp.asarray(np.append(response, 0)), jnp.int32(4)) == 1
        assert code_reward(task, jnp.asarray(np.append(response, 0)), jnp.int32(3)) == 0
        assert code_reward(task, jnp.asarray(np.append(response, 0)), jnp.int32(5)) == 0
    assert (shown["lengths"][asked["hard"]] == 9).all() and (shown["lengths"][~asked["hard"]] == 7).any()


def test_bad_sizes():
    with pytest.raises(ValueError, match="num_easy=5 at most num_keys"):
        make_code_questions(np.random.default_rng(0), 4, num_keys=4, num_easy=5)
