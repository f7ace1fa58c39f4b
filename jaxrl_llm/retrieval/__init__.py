"""Search over passages."""

from jaxrl_llm.retrieval.bm25 import (
    Bm25Arrays,
    Bm25Index,
    bm25_index,
    bm25_scores,
    device_index,
    query_terms,
    search,
    top_passages,
)

__all__ = [
    "Bm25Arrays",
    "Bm25Index",
    "bm25_index",
    "bm25_scores",
    "device_index",
    "query_terms",
    "search",
    "top_passages",
]
