"""The world of requests with forbidden pairs."""

import numpy as np
import pytest

from jaxrl_llm.data.worlds import requests
from jaxrl_llm.data.worlds.requests import RETHINK, SAFE, UNSAFE


def test_requests_hold_what_they_say():
    for attacked in (False, True):
        made = requests.make_requests(np.random.default_rng(0), 300, harmful=0.2, attacked=attacked)
        assert made["harmful"].sum() == 60 and made["lookalike"].sum() == 120
        words = made["tokens"]
        meant = np.where((words >= requests.FIRST_SYNONYM) & (words < requests.FIRST_NOISE), words - 20, words)
        for pair in range(3):
            found = np.isin(meant, (2 * pair, 2 * pair + 1)).sum(axis=1)
            np.testing.assert_array_equal(found, made["found"][:, pair])
        assert ((made["found"] == 2).any(axis=1) == made["harmful"]).all()
        assert ((made["found"] == 1).any(axis=1) >= made["lookalike"]).all()
        assert ((words >= requests.FIRST_NOISE).sum(axis=1) == 2 * attacked).all()
        assert (words < 6).any() != attacked
        both = made["harmful"] & (made["found"] == 1).any(axis=1)
        assert 15 < both.sum() < 45


def test_verdicts_of_a_guard():
    assert requests.step_verdicts(np.array([0.1, 0.2, 0.9, 0.8])).tolist() == [SAFE, RETHINK, UNSAFE, UNSAFE]
    assert requests.step_verdicts(np.array([0.1, 0.5, 0.2])).tolist() == [SAFE, RETHINK, SAFE]
    kept = requests.keep_trace(
        np.array([True, True, True, False, False]),
        np.array([UNSAFE, UNSAFE, RETHINK, SAFE, SAFE]),
        np.array([True, False, True, False, True]),
    )
    assert kept.tolist() == [True, False, False, True, False]


def test_labels_of_each_scheme():
    found = np.array([[0, 1, 2], [2, 0, 0], [1, 0, 0]])
    binary, rethink, guard = (requests.label_rules(found, scheme).tolist() for scheme in ("binary", "rethink", "guard"))
    assert binary == [[SAFE, SAFE, UNSAFE], [UNSAFE, SAFE, SAFE], [SAFE, SAFE, SAFE]]
    assert rethink == [[SAFE, RETHINK, UNSAFE], [UNSAFE, SAFE, SAFE], [RETHINK, SAFE, SAFE]]
    assert guard == [[SAFE, RETHINK, UNSAFE], [UNSAFE, UNSAFE, UNSAFE], [RETHINK, SAFE, SAFE]]
    with pytest.raises(ValueError, match="one of binary, rethink, guard"):
        requests.label_rules(found, "other")


def test_traces():
    made = requests.make_requests(np.random.default_rng(0), 40, harmful=0.5)
    rows = requests.write_traces(made, pivots=True)
    assert rows["tokens"].shape == (40, 15) and rows["tokens"].max() < requests.vocab_size()
    assert ((rows["tokens"][:, -1] == requests.REFUSE) == made["harmful"]).all()
    assert (rows["mask"].sum(axis=1) == 7).all()
    np.testing.assert_array_equal(rows["tokens"][:, 9:14:2], requests.label_rules(made["found"], "binary"))
    assert requests.write_traces(made, pivots=False)["tokens"].shape == (40, 12)
    guarded = requests.write_traces(made, pivots=True, scheme="guard")["tokens"]
    assert 20 <= len(guarded) < 40 and set(guarded[:, -2]) == {SAFE, UNSAFE}
    with pytest.raises(ValueError, match="harmful=2"):
        requests.make_requests(np.random.default_rng(0), 4, harmful=2)
