"""BM25 over short passages: on the host through `bm25s`, and the same weights as JAX arrays for use inside `jit`.

Both forms return the same passages. What makes that possible whatever the device and the order of a sum: the weights of
`bm25s` are rounded to multiples of 2^-12, so that every score is exact in float32; and ties go to the lowest passage.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_llm.rewards.qa import plain_words

_WEIGHT_STEP = 2.0**-12


@dataclasses.dataclass(frozen=True)
class Bm25Index:
    """An index over passages.

    Attributes:
      passages: the texts, in the order of their ids.
      terms: id of every indexed word; words in too many passages are left out, as are unknown words of a query.
      max_terms: a query is its first `max_terms` indexed words, repetitions counted; None for all.
      backend: the `bm25s.BM25` with the weights.
    """

    passages: tuple[str, ...]
    terms: Mapping[str, int]
    max_terms: int | None
    backend: Any


def bm25_index(
    passages: Sequence[str],
    *,
    titles: Sequence[str] | None = None,
    k1: float = 1.5,
    b: float = 0.75,
    stop_share: float = 0.25,
    max_terms: int | None = None,
) -> Bm25Index:
    """Index of `passages` by their `plain_words`, with Lucene's BM25 weights (the default of `bm25s`).

    Args:
      titles: a title for each passage, whose words are indexed as if they stood in front of it.
      stop_share: a word in more than this share of the passages is dropped.

    Raises:
      ValueError: no passages, another number of titles, or no word is left to index.
    """
    import bm25s  # costs most of a second to import

    if not passages:
        raise ValueError("passages is empty; an index needs at least one passage")
    if titles is not None and len(titles) != len(passages):
        raise ValueError(f"titles must be one for each of the {len(passages)} passages, got {len(titles)}")
    documents = [plain_words(passage) for passage in passages]
    if titles is not None:
        documents = [plain_words(title) + words for title, words in zip(titles, documents, strict=True)]
    frequency = Counter(word for words in documents for word in set(words))
    indexed = sorted(word for word, count in frequency.items() if count <= stop_share * len(documents))
    if not indexed:
        raise ValueError(f"every word stands in more than a share of {stop_share} of the passages; raise stop_share")
    terms = {word: i for i, word in enumerate(indexed)}
    ids = [[terms[word] for word in words if word in terms] for words in documents]
    backend = bm25s.BM25(k1=k1, b=b, method="lucene", dtype="float32", int_dtype="int32", backend="numpy")
    documents_as_ids = bm25s.tokenization.Tokenized(ids=ids, vocab=dict(terms))
    backend.index(documents_as_ids, create_empty_token=False, show_progress=False)
    steps = np.round(backend.scores["data"] / _WEIGHT_STEP)
    backend.scores["data"] = (steps * _WEIGHT_STEP).astype(np.float32)
    return Bm25Index(tuple(passages), terms, max_terms, backend)


def query_terms(index: Bm25Index, query: str) -> list[int]:
    """Term ids of the indexed words of `query`, in order, at most `index.max_terms`."""
    return [index.terms[word] for word in plain_words(query) if word in index.terms][: index.max_terms]


def bm25_scores(index: Bm25Index, query: str) -> Float[np.ndarray, "N"]:
    """Score of every passage; higher is better, 0 where no word of the query occurs."""
    return index.backend.get_scores_from_ids(query_terms(index, query))


def top_passages(index: Bm25Index, query: str, k: int = 1) -> Int[np.ndarray, "k"]:
    """Ids of the `k` best passages, best first, equal scores by the lower id, -1 where fewer than `k` match.

    Raises:
      ValueError: `k` is below 1 or above the number of passages.
    """
    if not 1 <= k <= len(index.passages):
        raise ValueError(f"k must lie in [1, {len(index.passages)}], the number of passages, got {k}")
    scores = bm25_scores(index, query)
    best = np.argsort(-scores, kind="stable")[:k] if k > 1 else np.array([np.argmax(scores)])  # the usual case is fast
    return np.where(scores[best] > 0, best, -1).astype(np.int32)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["starts", "counts", "passages", "weights"],
    meta_fields=["num_passages", "window"],
)
@dataclasses.dataclass(frozen=True)
class Bm25Arrays:
    """The weights of an index as arrays, made by `device_index`: the passages of each term, list behind list."""

    starts: Int[Array, "M"]  # where a term's list starts
    counts: Int[Array, "M"]  # its length
    passages: Int[Array, "E"]
    weights: Float[Array, "E"]
    num_passages: int
    window: int  # the longest list


def device_index(index: Bm25Index) -> Bm25Arrays:
    """The weights of `bm25s` as JAX arrays for `search`."""
    scores = index.backend.scores
    counts = np.diff(scores["indptr"])
    window = int(counts.max())
    return Bm25Arrays(
        starts=jnp.array(scores["indptr"][:-1], jnp.int32),
        counts=jnp.array(counts, jnp.int32),
        passages=jnp.array(np.pad(scores["indices"], (0, window)), jnp.int32),
        weights=jnp.array(np.pad(scores["data"], (0, window)), jnp.float32),
        num_passages=len(index.passages),
        window=window,
    )


def search(arrays: Bm25Arrays, term_ids: Int[Array, "W"], k: int = 1) -> Int[Array, "k"]:
    """The device form of `top_passages`: ids of the `k` best passages for one query, -1 where fewer than `k` match.

    Costs `W * window` scattered additions and `k` passes over the scores. For the geography world, 64 queries of 8
    frequent words under `vmap` took 1.8 ms on two CPU cores; adding up the frequent terms by a matrix product took 1.1
    ms, at the price of a dense row for each of them.

    Args:
      term_ids: the query's terms, repetitions counted; -1 for none. Use `vmap` for several queries.
    """
    terms = jnp.maximum(term_ids, 0)
    offset = jnp.arange(arrays.window)
    entry = arrays.starts[terms][:, None] + offset
    listed = (term_ids >= 0)[:, None] & (offset < arrays.counts[terms][:, None])
    weights = jnp.where(listed, arrays.weights[entry], 0.0)
    scores = jnp.zeros(arrays.num_passages, jnp.float32).at[arrays.passages[entry].ravel()].add(weights.ravel())

    position = jnp.arange(arrays.num_passages)
    found = []
    for _ in range(k):  # a few passes over the scores are cheaper than sorting them
        best = jnp.max(scores)
        place = jnp.min(jnp.where(scores == best, position, arrays.num_passages - 1))
        found.append(jnp.where(best > 0, place, -1))
        scores = jnp.where(position == place, 0.0, scores)
    return jnp.stack(found)
