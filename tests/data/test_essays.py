"""The world of essays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.worlds.essays import (
    ASKS,
    EOS,
    FEATURES,
    FIRST_TOPIC,
    PRAISE,
    VOCAB_SIZE,
    demonstrate_essays,
    essay_features,
    essay_quality,
    has_ended,
    make_essay_prompts,
)

ONE, TWO, THREE, FOUR = range(FIRST_TOPIC, FIRST_TOPIC + 4)
TASK = {"prompt_tokens": jnp.array([ONE, TWO, THREE, ASKS])}


@pytest.mark.parametrize(
    ("words", "held", "quality"),
    [
        ([TWO, ONE, THREE, EOS], (4, 5, 6, 7, 8), 1.0),
        ([PRAISE] * 5 + [EOS], (0, 1, 2, 3, 8), -0.8),
        ([ONE, PRAISE, ONE, EOS], (0, 4, 8), 0.0),
        ([ONE, TWO, FOUR, EOS], (4, 5, 7), 2 / 3),
        ([EOS], (8,), 0.0),
    ],
)
def test_features_and_quality_by_hand(words, held, quality):
    tokens, length = jnp.array(words + [PRAISE] * (8 - len(words))), jnp.int32(len(words))
    features = jax.jit(essay_features)(TASK, tokens, length)
    assert np.flatnonzero(features).tolist() == list(held) and len(features) == len(FEATURES)
    assert float(jax.jit(essay_quality)(TASK, tokens, length)) == pytest.approx(quality, abs=1e-6)
    assert has_ended(tokens, length) and not has_ended(tokens, length + 1) and not has_ended(tokens, jnp.int32(0))


def test_prompts_and_demonstrations():
    prompts = make_essay_prompts(np.random.default_rng(0), 100)["prompt_tokens"]
    assert all(len(set(row[:3])) == 3 for row in prompts.tolist()) and (prompts[:, 3] == ASKS).all()
    shown = demonstrate_essays(np.random.default_rng(0), 100)
    ends = shown["tokens"][np.arange(100), shown["lengths"] - 1]
    assert (ends == EOS).all() and shown["tokens"].max() < VOCAB_SIZE
    np.testing.assert_array_equal(shown["mask"].sum(1), shown["lengths"] - 4)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_essay_prompts(np.random.default_rng(0), 0)
