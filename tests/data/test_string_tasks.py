"""The world of tasks on strings."""

import numpy as np
import pytest

from jaxrl_llm.data.worlds.string_tasks import FIRST_SHIFT, FIRST_SYMBOL, make_strings, vocab_size


def test_answers_by_hand():
    rows = make_strings(np.random.default_rng(0), [1, 3], 2)
    assert rows["tokens"].shape == (20, 10) and rows["mask"].sum() == 80 and rows["tokens"].max() < vocab_size()
    assert rows["tokens"][:, 1].tolist() == [FIRST_SHIFT + 1] * 10 + [FIRST_SHIFT + 3] * 10
    for operation, shift, *rest in rows["tokens"].tolist():
        a, b, c, d = (symbol - FIRST_SYMBOL for symbol in rest[:4])
        by_hand = [[a, b, c, d], [d, c, b, a], [d, a, b, c], [b, a, d, c], [a, a + b, a + b + c, a + b + c + d]]
        right = [(symbol + shift - FIRST_SHIFT) % 6 for symbol in by_hand[operation]]
        assert [symbol - FIRST_SYMBOL for symbol in rest[4:]] == right


def test_order_and_bad_input():
    rows = make_strings(np.random.default_rng(0), [0], 8, shuffle=True)["tokens"][:, 0]
    assert sorted(rows) != rows.tolist() and np.bincount(rows).tolist() == [8] * 5
    with pytest.raises(ValueError, match=r"shifts=\(6,\) some of 0..5"):
        make_strings(np.random.default_rng(0), [6], 8)
