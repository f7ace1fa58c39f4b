"""The world of preferred strings."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.worlds.strings import (
    EOS,
    FIRST_LETTER,
    LETTERS,
    make_preferences,
    preference_reward,
    preference_score,
)


def test_the_best_answer_and_the_reference():
    made = make_preferences(np.random.default_rng(0), 50)
    key, best = made["prompt_tokens"][:, :4] - FIRST_LETTER, made["best"][:, :6] - FIRST_LETTER
    np.testing.assert_array_equal(best[:, :4], key)
    np.testing.assert_array_equal(best[:, 4:], (key[:, :2] + 1) % LETTERS)
    length = jnp.full(50, 7)
    np.testing.assert_allclose(preference_score(made["best"], made["best"], length), 1, rtol=1e-6)
    np.testing.assert_allclose(preference_score(made["best"], made["reference"], length), 0.8, rtol=1e-6)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_preferences(np.random.default_rng(0), 0)


@pytest.mark.parametrize(("wrong", "score"), [(0, 1), (1, 0.8), (2, 0.6), (3, 0.4), (4, 0), (6, 0)])
def test_scores_by_the_letters_that_are_right(wrong, score):
    best = np.array([3, 4, 5, 6, 7, 8, EOS])
    answer = best.copy()
    answer[:wrong] += 1
    task = {"best": jnp.asarray(best)}
    np.testing.assert_allclose(preference_reward(task, jnp.asarray(answer), jnp.int32(7)), score, rtol=1e-6)
    assert preference_reward(task, jnp.asarray(answer), jnp.int32(6)) == 0
    assert preference_reward(task, jnp.asarray(np.append(answer[:6], 9)), jnp.int32(7)) == 0
