"""The world of known rules, new rules and noise."""

import numpy as np
import pytest

from jaxrl_llm.data.worlds.chains import KNOWN, NEW, NOISE, TOKENS, demonstrate_known, make_chunks, make_pool


def followers(tokens):
    return {(a, b) for row in tokens for a, b in zip(row[:-1], row[1:], strict=True)}


def test_rules_noise_and_pool():
    rng, ones = np.random.default_rng(0), np.ones(400)
    known, new = (followers(make_chunks(rng, share * ones, 0 * ones).tolist()) for share in (0, 1))
    # two followers of each token, in rare cases the same one
    assert TOKENS < len(known) <= 2 * TOKENS and TOKENS < len(new) <= 2 * TOKENS
    assert len(known & new) < TOKENS
    assert len(followers(make_chunks(rng, 0 * ones, ones).tolist())) == TOKENS**2
    pool = make_pool(rng, 600)
    assert pool["tokens"].shape == (600, 16) and set(pool["kind"]) == {KNOWN, NEW, NOISE}
    share = {}
    for kind in (KNOWN, NEW, NOISE):
        rows = pool["tokens"][pool["kind"] == kind].tolist()
        share[kind] = np.mean([(a, b) in known for row in rows for a, b in zip(row[:-1], row[1:], strict=True)])
    assert share[KNOWN] > 0.85 > share[NEW] > 0.35 > share[NOISE]


def test_demonstrations_and_bad_input():
    shown = demonstrate_known(np.random.default_rng(0), 5, length=8)
    assert shown["tokens"].shape == (5, 8) and shown["mask"].sum() == 35 and (shown["lengths"] == 8).all()
    with pytest.raises(ValueError, match="shares must lie in"):
        make_chunks(np.random.default_rng(0), np.full(2, 1.5), np.zeros(2))
