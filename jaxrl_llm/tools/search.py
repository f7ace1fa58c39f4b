"""Search as a tool: by words, by vectors, or by both; passages are written as in Search-R1 (Jin et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxrl_llm.retrieval.bm25 import Bm25Index, bm25_scores, top_passages
from jaxrl_llm.retrieval.dense import DenseIndex
from jaxrl_llm.retrieval.fusion import rankings_as_rows, reciprocal_rank_fusion, score_fusion
from jaxrl_llm.tools.tool import Tool, ToolError

Find = Callable[[str, int], Sequence[int] | Int[np.ndarray, "k"]]
Fusion = Literal["reciprocal_rank", "min_max", "z"]

_DESCRIPTION = "Searches a collection of passages and returns those that match the query best."


def search_tool(
    index: Bm25Index | DenseIndex | Find,
    passages: Sequence[str],
    *,
    titles: Sequence[str] | None = None,
    k: int = 3,
    max_k: int | None = None,
    name: str = "search",
    description: str = _DESCRIPTION,
) -> Tool:
    """A tool with the argument `query`, and `k` if the policy may choose it. It returns the text of `render_passages`,
    or says that nothing was found; an empty query is a `ToolError`. It may be called from several threads.

    Args:
      index: over these passages, in their order; or a function `(query, k) -> at most k positions, best first`, such as
        `hybrid_search` makes. Negative positions are skipped.
      passages, titles: what is shown; titles are one for each passage, None for none.
      k: passages that are returned.
      max_k: lets the policy choose `k` up to this: more is cut to it, and the text says so. None: `k` is fixed.

    Raises:
      ValueError: no passages, another number of titles or of indexed passages, a dense index without `embed`, or not
        `1 <= k <= max_k <= len(passages)`.
    """
    if isinstance(passages, str) or not len(passages):
        raise ValueError(f"passages must be a sequence with at least one text, got {passages!r}")
    if titles is not None and len(titles) != len(passages):
        raise ValueError(f"titles must be one for each of the {len(passages)} passages, got {len(titles)}")
    find = _find_of(index)
    if (count := _count(index)) not in (None, len(passages)):
        raise ValueError(f"passages must be those of the index, {count}, got {len(passages)}")
    most = k if max_k is None else max_k
    if not 1 <= k <= most <= len(passages):
        raise ValueError(f"expected 1 <= k <= max_k <= {len(passages)}, the number of passages, got k {k} and max_k "
                         f"{max_k}")  # fmt: skip

    def call(query: str, k: int = k) -> str:
        if not query.strip():
            raise ToolError("The query is empty. Write what to search for.")
        if k < 1:
            raise ToolError(f"k must be at least 1, got {k}.")
        found = [int(position) for position in find(query, min(k, most)) if position >= 0][: min(k, most)]
        if not found:
            return f"No passage matches {query!r}. Try other words."
        text = render_passages([passages[i] for i in found], None if titles is None else [titles[i] for i in found])
        return text if k <= most else f"{text}\n(k is at most {most}.)"

    properties: dict[str, Any] = {"query": {"type": "string", "description": "What to search for."}}
    if max_k is not None:
        properties["k"] = {
            "type": "integer",
            "minimum": 1,
            "default": k,
            "description": f"How many passages to return, at most {max_k}.",
        }
    parameters = {"type": "object", "properties": properties, "required": ["query"], "additionalProperties": False}
    return Tool(name=name, description=description, parameters=parameters, call=call)


def render_passages(passages: Sequence[str], titles: Sequence[str] | None = None) -> str:
    """Search-R1's text of search results: a line `Doc 1(Title: ...) ...` for each, `Doc 1: ...` without titles. Line
    breaks inside a passage become spaces."""
    heads = [":"] * len(passages) if titles is None else [f"(Title: {' '.join(title.split())})" for title in titles]
    texts = [" ".join(passage.split()) for passage in passages]
    return "\n".join(f"Doc {i}{head} {text}" for i, (head, text) in enumerate(zip(heads, texts, strict=True), 1))


def hybrid_search(
    indices: Sequence[Bm25Index | DenseIndex],
    *,
    depth: int = 100,
    fusion: Fusion = "reciprocal_rank",
    weights: Sequence[float] | None = None,
) -> Find:
    """A function for `search_tool`: the `depth` best passages of every index, made into one ranking by
    `reciprocal_rank_fusion` or by `score_fusion` with the normalization `min_max` or `z`. Equal ones stay in the order
    of the first index that has them.

    Args:
      indices: over the same passages in the same order.
      weights: one for each index; None for equal ones.

    Raises:
      ValueError: no indices, indices of different length, a dense one without `embed`, or an option out of range.
    """
    counts = [_count(index) for index in indices]
    if not indices or len(set(counts)) != 1:
        raise ValueError(f"expected indices over the same passages, got {len(indices)} of them with {counts} passages")
    if fusion not in get_args(Fusion):
        raise ValueError(f"fusion must be one of {list(get_args(Fusion))}, got {fusion!r}")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    if weights is not None and len(weights) != len(indices):
        raise ValueError(f"weights must be one for each of the {len(indices)} indices, got {len(weights)}")
    rankers = [_ranker(index) for index in indices]
    reach = min(depth, counts[0] or depth)
    if fusion == "reciprocal_rank":
        fuse = jax.jit(partial(reciprocal_rank_fusion, weights=weights))
    else:
        fuse = jax.jit(partial(score_fusion, normalize=fusion, weights=weights))

    def find(query: str, k: int) -> Int[np.ndarray, "k"]:
        rankings, scores = zip(*(rank(query, reach) for rank in rankers), strict=True)
        ids, ranks, values, present = rankings_as_rows(rankings, scores, size=reach * len(rankers))
        fused = np.asarray(fuse(ranks if fusion == "reciprocal_rank" else values, present))
        order = np.argsort(-np.where(ids >= 0, fused, -np.inf), kind="stable")
        return ids[order[:k]]

    return find


def _count(index: Bm25Index | DenseIndex | Find) -> int | None:
    """How many passages an index has; None for a function."""
    if isinstance(index, Bm25Index):
        return len(index.passages)
    return len(index.ids) if isinstance(index, DenseIndex) else None


def _ranker(
    index: Bm25Index | DenseIndex,
) -> Callable[[str, int], tuple[Int[np.ndarray, "k"], Float[np.ndarray, "k"]]]:
    """`(query, k) -> (positions, scores)`, best first, positions -1 where fewer are found."""
    if isinstance(index, Bm25Index):

        def by_words(query: str, k: int) -> tuple[Int[np.ndarray, "k"], Float[np.ndarray, "k"]]:
            found = top_passages(index, query, k)
            return found, bm25_scores(index, query)[found]

        return by_words
    if isinstance(index, DenseIndex):
        if index.embed is None:
            raise ValueError("the dense index has no embed, so it cannot read a query; build or load it with one")

        def by_vectors(query: str, k: int) -> tuple[Int[np.ndarray, "k"], Float[np.ndarray, "k"]]:
            scores, found = index.search([query], k)
            return found[0], scores[0]

        return by_vectors
    raise ValueError(f"expected a Bm25Index or a DenseIndex, got {type(index).__name__}")


def _find_of(index: Bm25Index | DenseIndex | Find) -> Find:
    if callable(index):
        return index
    rank = _ranker(index)
    return lambda query, k: rank(query, k)[0]
