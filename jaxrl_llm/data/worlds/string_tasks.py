"""Tasks on strings of four symbols out of six: reorder or sum them, then add a number; for learning one after another.

A task is an operation and a shift: the operation's token, the shift's and the four symbols are answered by four
symbols.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

OPERATIONS = ("identity", "reverse", "rotate", "swap", "sum")
SYMBOLS, LENGTH = 6, 4
FIRST_SHIFT = len(OPERATIONS)
FIRST_SYMBOL = FIRST_SHIFT + SYMBOLS
PROMPT = 2 + LENGTH


def vocab_size() -> int:
    """Tokens there are: operations, shifts and symbols."""
    return FIRST_SYMBOL + SYMBOLS


def make_strings(
    rng: np.random.Generator, shifts: Sequence[int], per_task: int, *, shuffle: bool = False
) -> dict[str, np.ndarray]:
    """`per_task` random strings for every operation and shift: `tokens` int32[N, 10] (prompt and right answer), `mask`
    (of the answer), `lengths`; task by task, or in random order.

    The operations: as it is, reversed, rotated right by one, neighbors swapped, running sum modulo 6.

    Raises:
      ValueError: a shift outside 0..5, or none; `per_task` below 1.
    """
    if per_task < 1 or not shifts or not set(shifts) <= set(range(SYMBOLS)):
        raise ValueError(f"per_task={per_task} must be at least 1 and shifts={tuple(shifts)} some of 0..{SYMBOLS - 1}")
    pairs = [(operation, shift) for shift in shifts for operation in range(len(OPERATIONS))]
    operation, shift = np.repeat(np.array(pairs), per_task, axis=0).T
    string = rng.integers(SYMBOLS, size=(len(operation), LENGTH))
    done = [string, string[:, ::-1], np.roll(string, 1, axis=1), string[:, [1, 0, 3, 2]], np.cumsum(string, axis=1)]
    answer = (np.choose(operation[:, None], done) + shift[:, None]) % SYMBOLS
    tokens = np.column_stack([operation, FIRST_SHIFT + shift, FIRST_SYMBOL + string, FIRST_SYMBOL + answer])
    if shuffle:
        tokens = rng.permutation(tokens)
    mask = np.broadcast_to(np.arange(tokens.shape[1]) >= PROMPT, tokens.shape).copy()
    return {"tokens": tokens.astype(np.int32), "mask": mask, "lengths": np.full(len(tokens), PROMPT + LENGTH, np.int32)}
