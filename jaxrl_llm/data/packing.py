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
    _check_lengths(lengths, row_length)
    ends = np.zeros(num_rows, int)
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    num_packed = 0
    for index, length in enumerate(lengths):
        row = int(np.argmax(ends + length <= row_length))
        if ends[row] + length > row_length:
            break
        rows[row].append(index)
        ends[row] += length
        num_packed += 1
    return _fill(tokens, mask, lengths, rows, row_length) | {"num_packed": np.array(num_packed, np.int32)}


def pack_best_fit(
    tokens: Int[np.ndarray, "N L"],
    mask: Bool[np.ndarray, "N L"],
    lengths: Int[np.ndarray, "N"],
    *,
    row_length: int,
) -> dict[str, np.ndarray]:
    """Puts all sequences into few rows, by best-fit decreasing: of many sequences, at most 11/9 of the fewest possible.

    The longest goes first, each into the row with the least room that is enough for it (Ding et al. 2024, Fewer
    Truncations Improve Language Modeling, arXiv:2404.10830). Rows then hold sequences of like lengths: shuffle rows,
    not only sequences.

    Returns:
      as `pack_sequences`, with as many rows as it took; a segment's id is the number of its sequence.

    Raises:
      ValueError: a sequence is longer than a row.
    """
    _check_lengths(lengths, row_length)
    rows: list[list[int]] = []
    rows_by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        room = next((room for room in range(length, row_length) if rows_by_room[room]), row_length)
        if room < row_length:
            row = rows_by_room[room].pop()
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(index)
        rows_by_room[room - length].append(row)
    return _fill(tokens, mask, lengths, rows, row_length) | {"num_packed": np.array(len(lengths), np.int32)}


def _check_lengths(lengths: np.ndarray, row_length: int) -> None:
    if lengths.max(initial=0) > row_length:
        raise ValueError(
            f"sequence {int(lengths.argmax())} has {int(lengths.max())} tokens, rows have {row_length}; "
            "raise row_length or leave it out"
        )


def _fill(
    tokens: np.ndarray, mask: np.ndarray, lengths: np.ndarray, rows: list[list[int]], row_length: int
) -> dict[str, np.ndarray]:
    """Packed arrays of rows that name their sequences."""
    packed: dict[str, np.ndarray] = {
        "tokens": np.zeros((len(rows), row_length), np.int32),
        "mask": np.zeros((len(rows), row_length), bool),
        "segment_ids": np.full((len(rows), row_length), -1, np.int32),
        "positions": np.zeros((len(rows), row_length), np.int32),
    }
    for row, indices in enumerate(rows):
        end = 0
        for index in indices:
            place = slice(end, end := end + int(lengths[index]))
            packed["tokens"][row, place] = tokens[index, : lengths[index]]
            packed["mask"][row, place] = mask[index, : lengths[index]]
            packed["mask"][row, place.start : place.start + 1] = False
            packed["segment_ids"][row, place] = index
            packed["positions"][row, place] = np.arange(lengths[index])
    return packed
