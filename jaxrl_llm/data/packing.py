"""Packing of short sequences into long rows, so that a step spends its time on tokens and not on padding."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int


def pack_sequences(
    tokens: Int[np.ndarray, "N L"],
    mask: Bool[np.ndarray, "N L"],
    lengths: Int[np.ndarray, "N"],
    *,
    num_rows: int,
    row_length: int,
) -> dict[str, np.ndarray]:
    """Puts sequences, in their order, each into the first of `num_rows` rows that has room; the rest is left out.

    Returns:
      `tokens`, `mask`, `segment_ids` and `positions`, each `[num_rows, row_length]`. A segment's positions start at 0,
      its first token is never in the mask (nothing predicts it), padding has segment -1; and `num_packed`, how many
      sequences went in.

    Raises:
      ValueError: a sequence is longer than a row.
    """
    if lengths.max(initial=0) > row_length:
        raise ValueError(
            f"sequence {int(lengths.argmax())} has {int(lengths.max())} tokens, rows have {row_length}; "
            "raise row_length or leave it out"
        )
    packed: dict[str, np.ndarray] = {
        "tokens": np.zeros((num_rows, row_length), np.int32),
        "mask": np.zeros((num_rows, row_length), bool),
        "segment_ids": np.full((num_rows, row_length), -1, np.int32),
        "positions": np.zeros((num_rows, row_length), np.int32),
    }
    ends = np.zeros(num_rows, int)
    num_packed = 0
    for index, length in enumerate(lengths):
        row = int(np.argmax(ends + length <= row_length))
        if ends[row] + length > row_length:
            break
        place = slice(ends[row], ends[row] + length)
        packed["tokens"][row, place] = tokens[index, :length]
        packed["mask"][row, place] = mask[index, :length]
        packed["mask"][row, place.start] = False
        packed["segment_ids"][row, place] = index
        packed["positions"][row, place] = np.arange(length)
        ends[row] += length
        num_packed += 1
    return packed | {"num_packed": np.array(num_packed, np.int32)}
