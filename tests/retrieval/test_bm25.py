import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.text_hashes import known_words, token_hashes, word_table
from jaxrl_llm.data.worlds.geography import geography_index, geography_passages
from jaxrl_llm.data.worlds.tokenizer import geography_tokenizer
from jaxrl_llm.retrieval import bm25_index, bm25_scores, device_index, query_terms, search, top_passages


def test_scores_are_lucenes():
    passages = ["red fish", "blue fish fish", "green bird", "old bird sings"]
    index = bm25_index(passages, k1=1.5, b=0.75, stop_share=0.5)
    average = (2 + 3 + 2 + 3) / 4

    def weight(count, df, length):
        idf = np.log(1 + (4 - df + 0.5) / (df + 0.5))
        return idf * count / (count + 1.5 * (0.25 + 0.75 * length / average))

    expected = [weight(1, 2, 2), weight(2, 2, 3) + weight(1, 1, 3), 0, 0]
    # Weights are rounded to multiples of 2^-12, so each of the two terms may be off by half of that.
    np.testing.assert_allclose(bm25_scores(index, "Blue FISH!"), expected, atol=2**-12)
    assert top_passages(index, "blue fish", 2).tolist() == [1, 0]
    assert top_passages(index, "fish", 4).tolist() == [1, 0, -1, -1]
    assert top_passages(index, "unknown word")[0] == -1


def test_titles_stop_words_and_limits():
    passages = ["is a town by Rome", "is a town", "is a town", "is a road"]
    index = bm25_index(passages, titles=["Ostia", "Rome", "Veii", "Appia"], stop_share=0.5, max_terms=2)
    assert "town" not in index.terms and "is" not in index.terms  # in more than half of the passages
    assert len(query_terms(index, "rome rome ostia")) == 2
    assert top_passages(index, "town")[0] == -1
    assert top_passages(index, "rome")[0] == 1  # equally often in both, but the first is longer
    assert top_passages(bm25_index(["same words", "same words", "x", "y"], stop_share=0.5), "words")[0] == 0  # a tie


def test_bad_input():
    with pytest.raises(ValueError, match="passages is empty"):
        bm25_index([])
    with pytest.raises(ValueError, match="titles must be one for each of the 1"):
        bm25_index(["x"], titles=["a", "b"])
    with pytest.raises(ValueError, match="raise stop_share"):
        bm25_index(["x", "x"])
    with pytest.raises(ValueError, match=r"k must lie in \[1, 2\]"):
        top_passages(bm25_index(["x", "y"], stop_share=0.5), "x", 3)


def some_queries(rng):
    titles, _ = geography_passages()
    words = sorted(geography_index().terms)
    yield from titles
    for _ in range(1500):
        extra = [str(rng.choice(words)) for _ in range(rng.integers(0, 4))]
        yield " ".join([titles[rng.integers(len(titles))], *extra, "the country", "nowhere"][rng.integers(0, 2) :])
    for _ in range(500):
        word = str(rng.choice(words))
        yield " ".join([word] * int(rng.integers(1, 4)) + [str(w) for w in rng.choice(words, rng.integers(0, 9))])
    yield from ["", "is", "qqq", "capital capital capital", "United States United", "...", "san san jose"]


@pytest.mark.parametrize("k", [1, 3])
def test_device_search_equals_host_search(k):
    index, tokenizer = geography_index(), geography_tokenizer()
    table, arrays = token_hashes(tokenizer), device_index(index)
    words = word_table(sorted(index.terms, key=index.terms.__getitem__))

    @jax.jit
    def find(table, arrays, words, tokens, lengths):
        def one(tokens, length):
            terms = known_words(table, words, tokens, 0, length, index.max_terms)
            return terms, search(arrays, terms, k)

        return jax.vmap(one)(tokens, lengths)

    queries = list(some_queries(np.random.default_rng(0)))[:: 3 if k == 1 else 9]
    tokens = np.zeros((len(queries), 80), np.int32)
    rows = tokenizer.encode_batch(queries)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    lengths = np.array([len(row) for row in rows])
    assert len(queries) > (2500 if k == 1 else 900) and lengths.max() <= 80
    found = [
        find(table, arrays, words, jnp.array(tokens[i : i + 256]), jnp.array(lengths[i : i + 256]))
        for i in range(0, len(queries) // 256 * 256, 256)
    ]
    terms, ids = (np.concatenate(parts) for parts in zip(*found, strict=True))
    for query, query_ids, device in zip(queries, terms, ids, strict=False):
        assert query_ids[query_ids >= 0].tolist() == query_terms(index, query)
        assert device.tolist() == top_passages(index, query, k).tolist()
