"""The world of faces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.worlds import faces
from jaxrl_llm.data.worlds.faces import ANSWER, EOS, FIRST_EMOTION, FIRST_UNIT, PROTOTYPES, THINK, UNITS

READ = jax.jit(faces.read_response)


def read(*response):
    """What is read of a response whose units are written `u1` and emotions `e1`."""
    base = {"u": FIRST_UNIT, "e": FIRST_EMOTION}
    ids = [token if isinstance(token, int) else base[token[0]] + int(token[1:]) for token in response]
    units, emotion, formatted = READ(jnp.array(ids + [0] * (10 - len(ids))), jnp.int32(len(ids)))
    return np.flatnonzero(units).tolist(), int(emotion), bool(formatted)


def test_what_is_read_of_a_response():
    assert read(THINK, "u4", "u1", ANSWER, "e2", EOS) == ([1, 4], 2, True)
    assert read(THINK, "u1", "u1", ANSWER, "e0", EOS) == ([1], 0, True)  # named twice, counted once
    assert read(THINK, ANSWER, "e0", EOS) == ([], 0, True)
    assert read("u1", ANSWER, "e0", EOS) == ([], 0, False)  # without thinking none is named
    assert read(THINK, "u1", ANSWER, "e0") == ([1], 0, False)  # no end
    assert read(THINK, "u1", ANSWER, "e0", "u2", EOS) == ([1], 0, False)
    assert read(THINK, "u1", "e1", ANSWER, "e0", EOS) == ([1], 0, False)  # something else among the units
    assert read(THINK, "u1", "u2") == ([1, 2], -1, False)
    assert read(THINK, "u1", ANSWER) == ([1], -1, False)
    assert read(THINK, *["u1"] * 9) == ([1], -1, False)  # as long as the array
    assert read() == ([], -1, False)


def test_faces_and_demonstrations():
    rng = np.random.default_rng(0)
    clear = faces.make_faces(rng, 200, noise=0.0)
    np.testing.assert_array_equal(clear["prompt_tokens"] - faces.FIRST_LEVEL, 4 * clear["units"])
    np.testing.assert_array_equal(faces.emotion_of(PROTOTYPES), np.arange(len(PROTOTYPES)))
    assert np.bincount(clear["emotion"]).min() > 20
    shown = faces.demonstrate_faces(rng, clear)
    erring = faces.demonstrate_faces(rng, clear, wrong=0.2)
    for right, rows in (True, shown), (False, erring):
        scored = jax.vmap(faces.face_scores)(
            {"emotion": jnp.asarray(clear["emotion"])},
            jnp.asarray(rows["tokens"][:, UNITS:]),
            jnp.asarray(rows["lengths"] - UNITS),
        )
        units, found = jax.device_get(scored)
        assert found["accuracy"].all() and found["format"].all()
        assert (units == clear["units"]).all() == right == found["consistency"].all()
    noisy = faces.make_faces(rng, 500)
    said = noisy["prompt_tokens"] - faces.FIRST_LEVEL > 2
    assert 0.9 < np.mean(said == noisy["units"]) < 0.98  # a level says it most of the time
    assert noisy["prompt_tokens"].max() < FIRST_UNIT and shown["tokens"].max() < faces.VOCAB_SIZE


def test_bad_sizes():
    with pytest.raises(ValueError, match="noise=-1"):
        faces.make_faces(np.random.default_rng(0), 3, noise=-1.0)
