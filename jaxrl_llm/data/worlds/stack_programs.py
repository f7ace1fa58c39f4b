"""Stack programs from examples: `1 2 3 run` asks for a program that maps 0, 1, 2 to those, such as `x 1 +`.

A program is tested on every input there is, modulo a prime. Three levels: shift or scale (3 tokens), both (5), a square
(7).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

PAD, EOS, RUN, INPUT, ADD, TIMES = range(6)
FIRST_NUMBER = 6
LEVELS = ("easy", "middle", "hard")
EXAMPLES, STACK = 3, 4
LONGEST = 8  # tokens of a program with its end


def make_program_problems(modulus: int = 7) -> dict[str, np.ndarray]:
    """All problems, 77 modulo 7: `prompt_tokens` int32[N, 4], `prompt_length`, `outputs` int32[N, modulus] for the
    inputs from 0 on, `level` (index into `LEVELS`) and `program` int32[N, 8], one that solves it.

    Raises:
      ValueError: a modulus below 3.
    """
    if modulus < 3:
        raise ValueError(f"modulus must be a prime from 3 on, got {modulus}")
    some, other = range(1, modulus), range(2, modulus)
    easy = [[INPUT, _number(c), ADD] for c in some] + [[INPUT, _number(a), TIMES] for a in other]
    middle = [[INPUT, _number(a), TIMES, _number(b), ADD] for a in other for b in some]
    hard = [[INPUT, _number(b), ADD, INPUT, TIMES, _number(c), ADD] for b in some for c in some]
    programs = [*easy, *middle, *hard]
    ended = np.full((len(programs), LONGEST), PAD, np.int32)
    for row, program in enumerate(programs):
        ended[row, : len(program) + 1] = [*program, EOS]
    lengths = jnp.array([len(program) + 1 for program in programs])
    run = jax.jit(jax.vmap(lambda tokens, length: run_program(tokens, length, modulus)[0]))
    outputs = np.asarray(run(jnp.asarray(ended), lengths))
    prompts = np.pad(FIRST_NUMBER + outputs[:, :EXAMPLES], ((0, 0), (0, 1)), constant_values=RUN)
    return {
        "prompt_tokens": prompts.astype(np.int32),
        "prompt_length": np.full(len(programs), EXAMPLES + 1, np.int32),
        "outputs": outputs,
        "level": np.repeat(np.arange(3, dtype=np.int32), [len(easy), len(middle), len(hard)]),
        "program": ended,
    }


def run_program(
    tokens: Int[Array, "L"], length: Int[Array, ""], modulus: int
) -> tuple[Int[Array, "modulus"], Bool[Array, ""]]:
    """What the program gives for each input, and whether it ran: it ends, takes nothing from an empty stack, and leaves
    one number."""

    def step(state: tuple[Array, Array, Array], token: Array) -> tuple[tuple[Array, Array, Array], None]:
        stack, size, valid = state
        operator = (token == ADD) | (token == TIMES)
        pushes = (token == INPUT) | (token >= FIRST_NUMBER)
        top, below = stack[jnp.maximum(size - 1, 0)], stack[jnp.maximum(size - 2, 0)]
        result = jnp.where(token == ADD, below + top, below * top) % modulus
        pushed = jnp.where(token == INPUT, jnp.arange(modulus), token - FIRST_NUMBER)
        valid &= (operator & (size >= 2)) | (pushes & (size < STACK))
        place = jnp.where(operator, size - 2, size)
        stack = stack.at[place].set(jnp.where(operator, result, pushed), mode="drop")
        return (stack, jnp.where(operator, size - 1, size + 1), valid), None

    def maybe_step(state: tuple[Array, Array, Array], row: tuple[Array, Array]) -> Any:
        token, inside = row
        return jax.tree.map(lambda new, old: jnp.where(inside, new, old), step(state, token)[0], state), None

    start = (jnp.zeros((STACK, modulus), jnp.int32), jnp.int32(0), jnp.bool_(True))
    inside = jnp.arange(tokens.shape[0]) < length - 1  # without the end
    (stack, size, valid), _ = jax.lax.scan(maybe_step, start, (tokens, inside))
    ended = (length > 0) & (tokens[jnp.maximum(length - 1, 0)] == EOS)
    return stack[0], valid & ended & (size == 1)


def program_reward(task: dict[str, Any], tokens: Int[Array, "L"], length: Int[Array, ""]) -> Float[Array, ""]:
    """1 if the program is right for every input, else 0."""
    outputs, ran = run_program(tokens, length, task["outputs"].shape[0])
    return jnp.where(ran & jnp.all(outputs == task["outputs"]), 1.0, 0.0)


def demonstrate_programs(
    rng: np.random.Generator, problems: dict[str, np.ndarray], *, wrong: tuple[float, float, float]
) -> dict[str, np.ndarray]:
    """Programs of a demonstrator who errs: `tokens` int32[N, 12], `mask` (of the program) and `lengths`.

    Args:
      wrong: for each level the chance that a number in the program is a random one.
    """
    programs = problems["program"].copy()
    spoilt = (programs >= FIRST_NUMBER) & (rng.random(programs.shape) < np.asarray(wrong)[problems["level"]][:, None])
    programs[spoilt] = FIRST_NUMBER + rng.integers(problems["outputs"].shape[1], size=int(spoilt.sum()))
    tokens = np.concatenate([problems["prompt_tokens"], programs], axis=1)
    mask = (tokens != PAD) & (np.arange(tokens.shape[1]) > EXAMPLES)
    return {"tokens": tokens, "mask": mask, "lengths": (mask.sum(axis=1) + EXAMPLES + 1).astype(np.int32)}


def _number(value: int) -> int:
    return FIRST_NUMBER + value
