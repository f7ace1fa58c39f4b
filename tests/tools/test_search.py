"""The search tool over each kind of index: what it finds, how that is written, and what a policy can do wrong."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxrl_llm.retrieval import DenseIndex, bm25_index
from jaxrl_llm.tools.search import hybrid_search, render_passages, search_tool
from jaxrl_llm.tools.tool import call_tool, render_tools

TITLES = ["Rome", "Paris", "Tiber", "Seine", "Vesuvius"]
PASSAGES = [
    "the capital of Italy",
    "the capital of France",
    "a river\n through  Rome",
    "a river through Paris",
    "a mountain by Naples",
]
WORDS = sorted({word.lower() for text in [*TITLES, *PASSAGES] for word in text.split()})


def embed(texts):
    """Counts of words, of length 1: a text is near those that share its words."""
    rows = np.array([[text.lower().split().count(word) for word in WORDS] for text in texts], np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


@pytest.fixture(scope="module")
def words():
    return bm25_index(PASSAGES, titles=TITLES, stop_share=0.5)


@pytest.fixture(scope="module")
def vectors():
    return DenseIndex.build([f"{title} {text}" for title, text in zip(TITLES, PASSAGES, strict=True)], embed=embed)


def ask(tool, **arguments):
    return call_tool([tool], tool.name, arguments)


def test_results_are_written_as_in_search_r1(words):
    tool = search_tool(words, PASSAGES, titles=TITLES, k=2)
    expected = "Doc 1(Title: Tiber) a river through Rome\nDoc 2(Title: Rome) the capital of Italy"
    assert ask(tool, query="Rome?") == (expected, None)
    assert ask(search_tool(words, PASSAGES), query="Vesuvius") == ("Doc 1: a mountain by Naples", None)
    assert render_passages(["a\nb"], ["c\nd"]) == "Doc 1(Title: c d) a b"
    assert render_tools([tool], "plain").startswith("search(query: string)\n")


def test_what_a_policy_can_do_wrong(words):
    tool = search_tool(words, PASSAGES, titles=TITLES, k=1, max_k=2, name="lookup")
    assert ask(tool, query="qqq") == ("No passage matches 'qqq'. Try other words.", None)
    assert ask(tool, query=" \n") == ("Error: The query is empty. Write what to search for.", "failed")
    assert ask(tool, query="rome").text == "Doc 1(Title: Tiber) a river through Rome"
    two = ask(tool, query="rome", k=2).text
    assert two.count("Doc") == 2 and ask(tool, query="rome", k=50).text == f"{two}\n(k is at most 2.)"
    assert "lookup(query: string, k: integer = 1)" in render_tools([tool], "plain")
    for arguments in ({}, {"query": 3}, {"query": "x", "k": 0}, {"query": "x", "page": 2}):
        assert ask(tool, **arguments).error == "bad_arguments"
    fixed = search_tool(words, PASSAGES)
    assert ask(fixed, query="rome", k=1).error == "bad_arguments"


def test_vectors_and_functions(vectors):
    tool = search_tool(vectors, PASSAGES, titles=TITLES, k=1)
    queries = ["a mountain by the river", "capital of France", "Seine"] * 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda query: ask(tool, query=query).text, queries))
    assert [text.split(")")[0] for text in found] == [f"Doc 1(Title: {t}" for t in ("Vesuvius", "Paris", "Seine")] * 4
    backward = search_tool(lambda query, k: [-1, *range(4, -1, -1)], PASSAGES, titles=TITLES, k=2)
    assert [line.split(")")[0] for line in ask(backward, query="x").text.splitlines()] == [
        "Doc 1(Title: Vesuvius",
        "Doc 2(Title: Seine",
    ]


@pytest.mark.parametrize("fusion", ["reciprocal_rank", "min_max", "z"])
def test_hybrid(words, vectors, fusion):
    """A passage that both find stands before what one of them alone finds."""
    find = hybrid_search([words, vectors], fusion=fusion)
    assert find("river Rome", 3).tolist()[0] == 2
    assert set(find("river Rome", 3).tolist()) == {0, 2, 3}
    tool = search_tool(find, PASSAGES, titles=TITLES, k=1)
    assert ask(tool, query="river Rome").text == "Doc 1(Title: Tiber) a river through Rome"


def test_hybrid_by_hand():
    """Rankings [0, 1] and [1, 2] by reciprocal ranks: 1/61, 1/62 + 1/61, 1/62."""
    by_first = DenseIndex.build(np.array([[3.0, 0], [2, 3], [1, 2]]), embed=lambda texts: np.array([[1.0, 0]]))
    by_second = DenseIndex.build(np.array([[3.0, 0], [2, 3], [1, 2]]), embed=lambda texts: np.array([[0.0, 1]]))
    assert hybrid_search([by_first, by_second], depth=2)("x", 3).tolist() == [1, 0, 2]
    assert hybrid_search([by_second], depth=2)("x", 3).tolist() == [1, 2]
    for fusion in ("reciprocal_rank", "min_max", "z"):  # with all weight on one, its order comes
        for weights, expected in (([1, 0], [0, 1, 2]), ([0, 1], [1, 2, 0])):
            find = hybrid_search([by_first, by_second], fusion=fusion, weights=weights)
            assert find("x", 3).tolist() == expected


def test_bad_input(words, vectors):
    with pytest.raises(ValueError, match="passages must be a sequence with at least one text, got \\[\\]"):
        search_tool(words, [])
    with pytest.raises(ValueError, match="passages must be those of the index, 5, got 1"):
        search_tool(words, ["x"])
    with pytest.raises(ValueError, match="titles must be one for each of the 5 passages, got 1"):
        search_tool(words, PASSAGES, titles=["x"])
    with pytest.raises(ValueError, match=r"1 <= k <= max_k <= 5, the number of passages, got k 3 and max_k 2"):
        search_tool(words, PASSAGES, max_k=2)
    with pytest.raises(ValueError, match="the dense index has no embed"):
        search_tool(DenseIndex.build(np.eye(5)), PASSAGES)
    with pytest.raises(ValueError, match="expected a Bm25Index or a DenseIndex, got str"):
        search_tool("words", PASSAGES)
    with pytest.raises(ValueError, match=r"over the same passages, got 2 of them with \[5, 2\] passages"):
        hybrid_search([words, DenseIndex.build(np.eye(2), embed=embed)])
    with pytest.raises(ValueError, match="over the same passages, got 0 of them"):
        hybrid_search([])
    with pytest.raises(ValueError, match="fusion must be one of .*'reciprocal_rank'.* got 'sum'"):
        hybrid_search([words], fusion="sum")
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        hybrid_search([words], depth=0)
    with pytest.raises(ValueError, match="weights must be one for each of the 2 indices, got 1"):
        hybrid_search([words, vectors], weights=[1])
