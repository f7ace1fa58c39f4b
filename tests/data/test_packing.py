"""Packing keeps every token of every sequence that it packs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.data.packing import pack_best_fit, pack_sequences


@given(
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=12), num_rows=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_round_trip(lengths, num_rows, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 50, (len(lengths), 10))
    mask = rng.random((len(lengths), 10)) < 0.5
    packed = pack_sequences(tokens, mask, np.array(lengths), num_rows=num_rows, row_length=10)
    assert packed["num_packed"] >= 1
    for index, length in enumerate(lengths[: packed["num_packed"]]):
        here = packed["segment_ids"] == index
        assert len(set(np.argwhere(here)[:, 0])) == 1, "a sequence lies in one row"
        np.testing.assert_array_equal(packed["tokens"][here], tokens[index, :length])
        np.testing.assert_array_equal(packed["positions"][here], np.arange(length))
        np.testing.assert_array_equal(packed["mask"][here], mask[index, :length] & (np.arange(length) > 0))
    padding = packed["segment_ids"] == -1
    assert not packed["mask"][padding].any()
    assert padding.sum() == num_rows * 10 - sum(lengths[: packed["num_packed"]])


def test_too_long():
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens, rows have 8"):
        pack_sequences(np.ones((2, 9)), np.ones((2, 9), bool), np.array([3, 9]), num_rows=1, row_length=8)


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_best_fit_packs_all(lengths, seed):
    lengths = np.array(lengths)
    rng = np.random.default_rng(seed)
    tokens, mask = rng.integers(1, 50, (len(lengths), 12)), rng.random((len(lengths), 12)) < 0.5
    packed = pack_best_fit(tokens, mask, lengths, row_length=12)
    assert packed["num_packed"] == len(lengths)
    for index, length in enumerate(lengths):
        here = packed["segment_ids"] == index
        assert len(set(np.argwhere(here)[:, 0])) == 1 and np.ptp(np.flatnonzero(here)) == length - 1
        np.testing.assert_array_equal(packed["tokens"][here], tokens[index, :length])
        np.testing.assert_array_equal(packed["positions"][here], np.arange(length))
        np.testing.assert_array_equal(packed["mask"][here], mask[index, :length] & (np.arange(length) > 0))
    assert (packed["segment_ids"] == -1).sum() == packed["tokens"].size - lengths.sum()
    # Two rows could be one only if both were at most half full, which best fit never leaves.
    room = (packed["segment_ids"] == -1).sum(axis=1)
    assert (room >= 6).sum() <= 1 or np.sort(12 - room)[:2].sum() > 12


def test_best_fit_finds_a_perfect_packing():
    """First-fit in this order takes four rows: 4 4, 5 5, 6, 6."""
    lengths = np.array([4, 4, 5, 5, 6, 6])
    packed = pack_best_fit(np.ones((6, 6)), np.ones((6, 6), bool), lengths, row_length=10)
    assert packed["tokens"].shape == (3, 10) and packed["tokens"].all()
    in_order = pack_sequences(np.ones((6, 6)), np.ones((6, 6), bool), lengths, num_rows=4, row_length=10)
    assert in_order["num_packed"] == 6 and in_order["tokens"].any(axis=1).all()
    with pytest.raises(ValueError, match="sequence 4 has 6 tokens, rows have 5"):
        pack_best_fit(np.ones((6, 6)), np.ones((6, 6), bool), lengths, row_length=5)
