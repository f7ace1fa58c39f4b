"""Search over passages: by words (BM25), by vectors, and several rankings made into one."""

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
from jaxrl_llm.retrieval.dense import DenseIndex, exact_search
from jaxrl_llm.retrieval.fusion import (
    min_max_normalize,
    rankings_as_rows,
    reciprocal_rank_fusion,
    score_fusion,
    z_normalize,
)

__all__ = [
    "Bm25Arrays",
    "Bm25Index",
    "DenseIndex",
    "bm25_index",
    "bm25_scores",
    "device_index",
    "exact_search",
    "min_max_normalize",
    "query_terms",
    "rankings_as_rows",
    "reciprocal_rank_fusion",
    "score_fusion",
    "search",
    "top_passages",
    "z_normalize",
]
