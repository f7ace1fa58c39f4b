"""Faces: noisy activations of six action units, to be named before the emotion that follows from them.

A prompt has a level, 0 to 4, for each unit in order; the response is `think unit ... unit answer emotion <eos>`. Which
units are active can be told from the levels most of the time, and the emotion is a rule over the active units.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

PAD, EOS, THINK, ANSWER = range(4)
LEVELS, UNITS = 5, 6
FIRST_LEVEL = 4
FIRST_UNIT = FIRST_LEVEL + LEVELS
FIRST_EMOTION = FIRST_UNIT + UNITS
PROTOTYPES = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1], [1, 0, 1, 0, 1, 0]], bool)
VOCAB_SIZE = FIRST_EMOTION + len(PROTOTYPES)
STOP_SEQUENCES = [[EOS]]


def emotion_of(units: Bool[Any, "... 6"]) -> Int[Any, "..."]:
    """The rule: the emotion whose prototype differs from the units in the fewest places, of equal ones the first. Takes
    arrays of NumPy and of JAX."""
    return (units[..., None, :] != PROTOTYPES).sum(-1).argmin(-1)


def make_faces(rng: np.random.Generator, number: int, *, noise: float = 0.3) -> dict[str, np.ndarray]:
    """Random faces: `prompt_tokens` int32[number, 6], `prompt_length`, `units` bool[number, 6] and `emotion`
    int32[number].

    A face has a prototype's units with the chance 0.9 and others with 0.15. The activation of a unit is 1 or 0, plus
    normal noise of that standard deviation; levels divide the range from 0 to 1 evenly and go on beyond it.

    Raises:
      ValueError: `number` below 1, or negative noise.
    """
    if number < 1 or noise < 0:
        raise ValueError(f"number={number} must be at least 1 and noise={noise} at least 0")
    prototypes = PROTOTYPES[rng.integers(len(PROTOTYPES), size=number)]
    units = rng.random(prototypes.shape) < np.where(prototypes, 0.9, 0.15)
    activation = units + noise * rng.normal(size=units.shape)
    levels = np.clip(np.rint(activation * (LEVELS - 1)), 0, LEVELS - 1)
    return {
        "prompt_tokens": (FIRST_LEVEL + levels).astype(np.int32),
        "prompt_length": np.full(number, UNITS, np.int32),
        "units": units,
        "emotion": emotion_of(units).astype(np.int32),
    }


def demonstrate_faces(
    rng: np.random.Generator, faces: dict[str, np.ndarray], *, wrong: float = 0.0
) -> dict[str, np.ndarray]:
    """Responses with the right emotion, whose reasoning errs: of each unit it says the wrong thing with that chance.
    `tokens` int32[N, 16], `mask` (of the response) and `lengths`."""
    number = len(faces["emotion"])
    tokens, mask = np.full((number, 16), PAD, np.int32), np.zeros((number, 16), bool)
    named = faces["units"] ^ (rng.random(faces["units"].shape) < wrong)
    lengths = (UNITS + 4 + named.sum(axis=1)).astype(np.int32)
    for row in range(number):
        units = FIRST_UNIT + np.flatnonzero(named[row])
        response = [THINK, *units, ANSWER, FIRST_EMOTION + faces["emotion"][row], EOS]
        tokens[row, : lengths[row]] = [*faces["prompt_tokens"][row], *response]
        mask[row, UNITS : lengths[row]] = True
    return {"tokens": tokens, "mask": mask, "lengths": lengths}


def read_response(
    tokens: Int[Array, "L"], length: Int[Array, ""]
) -> tuple[Bool[Array, "6"], Int[Array, ""], Bool[Array, ""]]:
    """The units named between `think` and `answer`, the emotion behind it (-1 for none), and whether the response is
    these two blocks and nothing else.

    A unit that is named twice counts once; a response that does not begin to think names none.
    """
    place = jnp.arange(tokens.shape[0])
    end = jnp.min(jnp.where((tokens == ANSWER) & (place < length), place, tokens.shape[0]))
    inside = (place > 0) & (place < jnp.minimum(end, length)) & (tokens[0] == THINK) & (length > 0)
    said = tokens - FIRST_UNIT
    is_unit = inside & (said >= 0) & (said < UNITS)
    units = jnp.any(is_unit[:, None] & (said[:, None] == jnp.arange(UNITS)), axis=0)
    answer = tokens.at[end + 1].get(mode="fill", fill_value=PAD) - FIRST_EMOTION
    given = (end + 1 < length) & (answer >= 0) & (answer < len(PROTOTYPES))
    ended = (length == end + 3) & (tokens.at[end + 2].get(mode="fill", fill_value=PAD) == EOS)
    formatted = (tokens[0] == THINK) & (end > 0) & jnp.all(is_unit == inside) & given & ended
    return units, jnp.where(given, answer, -1), formatted


def face_scores(
    task: dict[str, Any], tokens: Int[Array, "L"], length: Int[Array, ""]
) -> tuple[Bool[Array, "6"], dict[str, Float[Array, ""]]]:
    """The units that a response names; and 1 or 0 for `accuracy` (the right emotion), `format`, and `consistency`: the
    emotion is the one that follows from the units named."""
    units, emotion, formatted = read_response(tokens, length)
    found = {
        "accuracy": emotion == task["emotion"],
        "format": formatted,
        "consistency": formatted & (emotion == emotion_of(units)),
    }
    return units, {name: value.astype(jnp.float32) for name, value in found.items()}
