"""What is kept, in which proportions it is mixed, and in which order it comes."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.data.mixing import (
    curriculum_order,
    deduplicate_records,
    filter_by_tokens,
    filter_records,
    mix_records,
)
from jaxrl_llm.data.records import Records
from jaxrl_llm.models.tokenizer import load_tokenizer


def texts(*values):
    return Records("language_modeling", [{"text": value} for value in values])


def numbered(name, size):
    return texts(*(f"{name}{number}" for number in range(size)))


def test_filters_count_what_they_leave_out():
    records = deduplicate_records(texts("Blue sky", "blue  SKY ", "\uff22lue sky", "green"), "text")
    assert [row["text"] for row in records] == ["Blue sky", "green"] and records.skipped == {"duplicate": 2}
    records = filter_records(records, lambda row: row["text"] != "green", "not green")
    assert len(records) == 1 and records.skipped == {"duplicate": 2, "not green": 1}
    for function in (deduplicate_records, lambda records: deduplicate_records(records, "prompt")):
        with pytest.raises(ValueError, match="column"):
            function(records)


def test_filter_by_tokens_counts_all_columns():
    tokenizer = load_tokenizer(Path(__file__).parents[1] / "models/golden/tokenizers/chatml")
    rows = [
        {"prompt": "a " * n, "completion": [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]}
        for n in (1, 5, 9)
    ]
    lengths = [len(tokenizer.encode(row["prompt"])) + 2 for row in rows]
    records = filter_by_tokens(
        Records("prompt_completion", rows),
        tokenizer,
        "prompt",
        "completion",
        min_tokens=lengths[0] + 1,
        max_tokens=lengths[1],
    )
    assert list(records) == [rows[1]] and list(records.skipped.values()) == [2]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    stop=st.sampled_from(["first", "all"]),
    seed=st.integers(0, 9),
)
def test_mixture(sizes, weights, stop, seed):
    names = "abcd"[: len(sizes)]
    sources = {name: numbered(name, size) for name, size in zip(names, sizes, strict=True)}
    weights = dict(zip(names, weights, strict=False))
    mixed = mix_records(sources, weights, seed=seed, stop=stop)
    origins = np.array([row["dataset"] for row in mixed])
    for name, size in zip(names, sizes, strict=True):
        share = weights[name] / sum(weights.values())
        taken = np.cumsum(origins == name)
        # A beginning is off by half a record of each source at most, of which this one bears its share, and its own.
        bound = 0.5 + 0.5 * len(names) * share + 1e-6
        assert np.abs(taken - share * np.arange(1, len(taken) + 1)).max(initial=0) <= bound
        own = [row["text"] for row in mixed if row["dataset"] == name]
        assert all(text.startswith(name) for text in own)
        for start in range(0, len(own) - size + 1, size):
            assert len(set(own[start : start + size])) == size, "none comes twice before all have come"
        assert len(own) <= size if stop == "first" else len(own) >= size
    used_up = [Counter(origins.tolist())[name] == size for name, size in zip(names, sizes, strict=True)]
    assert any(used_up)
    again = mix_records(dict(reversed(sources.items())), weights, seed=seed, stop=stop)
    assert list(again) == list(mixed), "the order of the dict does not count"


def test_seeds_differ_and_repeats_are_reordered():
    sources, weights = {"a": numbered("a", 20), "b": numbered("b", 60)}, {"a": 1, "b": 1}
    mixed = mix_records(sources, weights, seed=0, stop="all")
    assert list(mixed) != list(mix_records(sources, weights, seed=1, stop="all"))
    a = [row["text"] for row in mixed if row["dataset"] == "a"]
    assert len(a) == 60 and a[:20] != a[20:40] and sorted(a[:20]) == sorted(a[20:40])


@pytest.mark.parametrize(
    ("sources", "weights", "options", "message"),
    [
        ({"a": texts("x")}, {"b": 1}, {}, r"weights must be of the sources \['a'\], got \['b'\]"),
        ({"a": texts()}, {"a": 1}, {}, "source 'a' has 0 records"),
        ({"a": texts("x")}, {"a": 0}, {}, "weight 0; both must be positive"),
        ({"a": texts("x")}, {"a": float("nan")}, {}, "weight nan"),
        ({"a": texts("x")}, {"a": 1}, {"stop": "never"}, "stop must be"),
        ({"a": texts("x"), "b": Records("corpus", [{}])}, {"a": 1, "b": 1}, {}, "one kind, got corpus, language"),
    ],
)
def test_bad_mixtures(sources, weights, options, message):
    with pytest.raises(ValueError, match=message):
        mix_records(sources, weights, seed=0, **options)


def test_curriculum():
    difficulty = np.random.default_rng(0).random(400)
    strict = curriculum_order(difficulty)
    np.testing.assert_array_equal(difficulty[strict], np.sort(difficulty))
    np.testing.assert_array_equal(curriculum_order(np.zeros(5)), np.arange(5))

    def sortedness(order):
        return np.corrcoef(difficulty[order], np.arange(400))[0, 1]

    # Noise of standard deviation s, in parts of N, on ranks of standard deviation 1/sqrt(12): their correlation is
    # 1/sqrt(1 + 12 s^2); 0.1 is five standard errors at N = 400.
    for noise in (0.1, 0.5, 2.0):
        order = curriculum_order(difficulty, noise=noise, seed=3)
        assert sorted(order.tolist()) == list(range(400))
        assert abs(sortedness(order) - 1 / np.sqrt(1 + 12 * noise**2)) < 0.1
    staged = curriculum_order(difficulty, stages=4, seed=1)
    for stage in range(4):
        part = slice(100 * stage, 100 * stage + 100)
        assert set(staged[part]) == set(strict[part]) and list(staged[part]) != list(strict[part])
    for options, message in [({"noise": -1}, "noise"), ({"stages": 401}, "from 1 to the 400")]:
        with pytest.raises(ValueError, match=message):
            curriculum_order(difficulty, **options)
    with pytest.raises(ValueError, match="finite"):
        curriculum_order(np.array([0, np.nan]))
