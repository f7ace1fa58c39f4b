"""Search by inner products: against NumPy in float64, the kinds of index against each other, and saved indices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from jaxrl_llm.models.encoder import EncoderConfig, make_encoder
from jaxrl_llm.models.sentence import SentenceSettings, make_embedder
from jaxrl_llm.retrieval import DenseIndex, exact_search

KINDS = ("jax", "faiss_flat", "faiss_ivf", "faiss_hnsw")


def unit_rows(rng, *shape):
    rows = rng.normal(size=shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def oracle(queries, corpus, k):
    """Scores in float64 and the ids by them, equal ones by the lower id."""
    scores = queries.astype(np.float64) @ corpus.T.astype(np.float64)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, ids, axis=1), ids


@pytest.fixture(scope="module")
def corpus():
    return unit_rows(np.random.default_rng(0), 600, 16)


@pytest.fixture(scope="module")
def queries():
    return unit_rows(np.random.default_rng(1), 20, 16)


@pytest.mark.parametrize("together", [20, 7, 0.5])
def test_exact_search_equals_numpy(corpus, queries, together):
    """All queries together, in parts of which the last is smaller, and one by one."""
    search = jax.jit(exact_search, static_argnames=("k", "max_scores"))
    scores, ids = search(queries, corpus, 9, max_scores=int(together * 600))
    expected_scores, expected_ids = oracle(queries, corpus, 9)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)  # float32 sums of 16 products below 1
    np.testing.assert_array_equal(ids, expected_ids)


def test_exact_search_ties_threshold_and_vmap():
    corpus = jnp.array([[0, 1], [1, 0], [1, 0], [-1, 0], [1, 0]], jnp.float32)
    assert exact_search(jnp.array([1.0, 0.0]), corpus, 5)[1].tolist() == [1, 2, 4, 0, 3]
    scores, ids = jax.vmap(lambda q, low: exact_search(q, corpus, 4, low))(
        jnp.array([[2.0, 0], [0, 0.5]]), jnp.array([0.5, 0.5])
    )
    assert ids.tolist() == [[1, 2, 4, -1], [0, -1, -1, -1]]
    assert scores.tolist() == [[2, 2, 2, -np.inf], [0.5, -np.inf, -np.inf, -np.inf]]
    coarse = exact_search(jnp.array([1, 1], jnp.bfloat16), corpus.astype(jnp.bfloat16), 1)
    assert coarse[0].dtype == jnp.float32 and coarse[1].tolist() == [0]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_agree_and_survive_saving(kind, corpus, queries, tmp_path):
    names = [f"doc {i}" for i in range(len(corpus))]
    index = DenseIndex.build(corpus, ids=names, kind=kind)
    index.save(tmp_path / "index")
    again = DenseIndex.load(tmp_path / "index")
    assert (again.ids, again.width, again.kind) == (tuple(names), 16, kind)
    expected_scores, expected_ids = oracle(queries, corpus, 5)
    scores, positions = index.search(queries, 5)
    assert scores.dtype == np.float32 and positions.dtype == np.int32
    for found, known in zip(again.search(queries, 5), (scores, positions), strict=True):
        np.testing.assert_array_equal(found, known)
    if kind in ("jax", "faiss_flat"):
        np.testing.assert_array_equal(positions, expected_ids)
        np.testing.assert_allclose(scores, expected_scores, atol=1e-6)  # float32 sums of 16 products below 1
    else:  # approximate: what is found has its true score, and most neighbors are found
        true = np.einsum("qd,qkd->qk", queries, corpus[positions])
        np.testing.assert_allclose(scores, np.where(positions >= 0, true, -np.inf), atol=1e-6)
        recall = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(positions, expected_ids, strict=True)])
        assert recall > (0.95 if kind == "faiss_hnsw" else 0.25)  # 2 of 15 lists of points without clusters
        everything = DenseIndex.build(corpus, kind=kind, num_lists=15, num_probes=15, search_width=600)
        np.testing.assert_array_equal(everything.search(queries, 5)[1], expected_ids)
    low = float(np.median(expected_scores))
    scores, positions = index.search(queries, 5, min_score=low)
    assert ((positions == -1) == np.isneginf(scores)).all() and scores[positions >= 0].min() >= low
    assert (positions == -1).any()
    assert index.search(queries[:0], 3)[1].shape == (0, 3)


@pytest.fixture(scope="module")
def embedder():
    """A small random encoder with a word to each token, its vectors of length 1."""
    config = EncoderConfig(vocab_size=64, width=16, num_layers=1, num_heads=2, ffn_width=24, num_positions=16)
    model = make_encoder(config)
    words = {f"w{i}": i for i in range(64)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    params = jax.jit(model.init)(jax.random.key(0))
    return make_embedder(model, params, tokenizer, SentenceSettings(normalize=True))


def test_texts_are_embedded(embedder, tmp_path):
    rng = np.random.default_rng(2)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, 64, 6)) for _ in range(30)]
    index = DenseIndex.build(texts, embed=embedder.embed)
    scores, positions = index.search(texts[5:8], 2)
    assert positions[:, 0].tolist() == [5, 6, 7]
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-5)  # length 1, through two paddings in float32
    index.save(tmp_path)
    again = DenseIndex.load(tmp_path, embed=embedder.embed)
    np.testing.assert_array_equal(again.search(texts[5:8], 2)[1], positions)
    with pytest.raises(ValueError, match="the index has no embed"):
        DenseIndex.load(tmp_path).search(["w1"])
    turned = DenseIndex.build(texts, embed=embedder.embed, embed_query=lambda texts: -embedder.embed(texts))
    worst = index.search(texts[:1], 30)[1][0, -1]
    assert turned.search(texts[:1])[1][0, 0] == worst


def test_bad_input(corpus, tmp_path):
    index = DenseIndex.build(corpus[:4])
    with pytest.raises(ValueError, match="passages is empty"):
        DenseIndex.build([])
    with pytest.raises(ValueError, match="passages are texts, so embed is needed"):
        DenseIndex.build(["a text"])
    with pytest.raises(ValueError, match="kind must be one of .*'faiss_flat'.* got 'annoy'"):
        DenseIndex.build(corpus, kind="annoy")
    with pytest.raises(ValueError, match="ids must be 2 different names, one for each passage, got 2, 1 of them"):
        DenseIndex.build(corpus[:2], ids=["a", "a"])
    with pytest.raises(ValueError, match="passages must be finite; row 1 is not, and 1 rows in all"):
        DenseIndex.build(np.array([[0, 1], [0, np.nan]]))
    with pytest.raises(ValueError, match=r"passages must be vectors \[N, D\], got shape \(3,\)"):
        DenseIndex.build(np.ones(3))
    with pytest.raises(ValueError, match="num_probes 3 and num_lists 2"):
        DenseIndex.build(corpus, kind="faiss_ivf", num_lists=2, num_probes=3)
    with pytest.raises(ValueError, match="links >= 2"):
        DenseIndex.build(corpus, kind="faiss_hnsw", links=1)
    with pytest.raises(ValueError, match=r"k must lie in \[1, 4\], the number of passages, got 5"):
        index.search(corpus[:1], 5)
    with pytest.raises(ValueError, match="must have the width of the index, 16, got 3"):
        index.search(np.ones((1, 3)))
    with pytest.raises(ValueError, match="got one string"):
        index.search("text")
    with pytest.raises(ValueError, match=r"query must have the width of corpus, 16, got 2"):
        exact_search(jnp.ones(2), corpus, 1)
    with pytest.raises(ValueError, match="is no saved DenseIndex of format 1: FileNotFoundError"):
        DenseIndex.load(tmp_path)
    index.save(tmp_path)
    about = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(about | {"ids": ["a"]}))
    with pytest.raises(ValueError, match=r"the vectors are \(4, 16\), index.json says \(1, 16\)"):
        DenseIndex.load(tmp_path)


def test_missing_faiss_is_named(corpus, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu, or take kind='jax'"):
        DenseIndex.build(corpus, kind="faiss_flat")
