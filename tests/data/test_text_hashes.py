import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.data import answer_hash, answer_text_hash, geography_tokenizer, token_hashes, word_table
from jaxrl_llm.data.worlds.geography import geography_index, geography_passages
from jaxrl_llm.rewards import exact_match, normalize_answer

WIDTH = 24
TOKENIZER = geography_tokenizer()
TABLE = token_hashes(TOKENIZER)
BYTES = TOKENIZER.pieces.index("<0x00>")
device_hash = jax.jit(lambda tokens, stop, start: answer_hash(TABLE, tokens, stop, start))


def hash_of(tokens, before=()):
    row = np.full(WIDTH, 5, np.int32)  # what lies outside must not matter
    row[: len(before) + len(tokens)] = [*before, *tokens]
    return np.asarray(device_hash(jnp.array(row), len(before) + len(tokens), len(before)))


def matches(pred, golds):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # golds that normalize to nothing
        return exact_match(pred, golds) == 1.0


def spelled(draw, text):
    """Tokens of `text`, some letters replaced by others that normalize alike, cut in a random way."""
    out = []
    for word in text.split(" "):
        if draw(st.booleans()):
            word = word.upper() if draw(st.booleans()) else word + draw(st.sampled_from([".", "'s", ",-", "_"]))
        if draw(st.booleans()):
            out += TOKENIZER.encode(word)
        else:  # letter by letter, ASCII ones as bytes
            out += [TOKENIZER.pieces.index("▁")] + [
                BYTES + ord(c) if c.isascii() else TOKENIZER.pieces.index(c)
                for c in word
                if c.isascii() or c in TOKENIZER.pieces
            ]
        if draw(st.integers(0, 3)) == 0:
            out += TOKENIZER.encode(draw(st.sampled_from(["the", "a", "An", "...", "A.", "x"])))
    return out[: WIDTH - 1]


@given(st.data())
def test_answers_that_look_different_match_as_on_the_host(data):
    titles, _ = geography_passages()
    gold = data.draw(st.sampled_from(titles))
    tokens = spelled(data.draw, gold)
    expected = matches(TOKENIZER.decode(tokens), [gold])
    assert (hash_of(tokens) == answer_text_hash(gold)).all() == expected


token_lists = st.lists(
    st.one_of(
        st.integers(0, BYTES + 127),
        st.integers(BYTES + 256, TOKENIZER.vocab_size - 1),
        st.sampled_from([TOKENIZER.pieces.index(piece) for piece in ("▁", "▁the", "▁a", "a", "n", ".", "▁in")]),
    ),
    max_size=8,
)


@given(token_lists, token_lists, st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=4))
def test_random_tokens_match_as_on_the_host(tokens, others, before):
    """All tokens but the broken pieces of characters; the text behind other tokens is the same text."""
    texts = [TOKENIZER.decode(row) for row in (tokens, others)]
    same = normalize_answer(texts[0]) == normalize_answer(texts[1])
    assert (hash_of(tokens, before) == hash_of(others)).all() == same
    assert (hash_of(tokens, before) == answer_text_hash(texts[0])).all()


@given(
    st.lists(st.integers(BYTES, BYTES + 255), min_size=1, max_size=12), st.sampled_from(["The", "Bogotá", "Ürümqi", ""])
)
def test_broken_characters_never_match_by_accident(tokens, gold):
    """A device match is a host match. The reverse need not hold: bytes may spell a character that the host decodes."""
    tokens = TOKENIZER.encode(gold)[:-1] + tokens
    if (hash_of(tokens) == answer_text_hash(gold)).all():
        assert matches(TOKENIZER.decode(tokens), [gold])


def test_known_cases():
    def same(text, gold):
        return bool((hash_of(TOKENIZER.encode(text)) == answer_text_hash(gold)).all())

    assert same(" The Yuan renminbi.", "Yuan Renminbi")
    assert same("port-AU-prince", "Port-au-Prince")
    assert same("Netherlands", "The Netherlands")
    assert same("", "the") and same("the a an.", "") and same("a. THE", "")
    assert same("BOGOTÁ", "Bogotá")
    assert not same("Yuan", "Yuan Renminbi") and not same("Renminbi Yuan", "Yuan Renminbi")
    assert not same("Yuan Yuan", "Yuan") and not same("YuanRenminbi", "Yuan Renminbi")
    assert not same("Bogota", "Bogotá")


def test_no_two_texts_of_the_world_collide():
    titles, passages = geography_passages()
    texts = {normalize_answer(text) for text in (*titles, *passages[:500])}
    assert len({tuple(answer_text_hash(text).tolist()) for text in texts}) == len(texts)
    index = geography_index()
    table = word_table(sorted(index.terms))
    assert (np.diff(np.asarray(table.hashes[:, 0], np.int64)) > 0).all()


def test_bad_input():
    with pytest.raises(ValueError, match="words 'x' and 'x' share a hash"):
        word_table(["x", "y", "x"])

    class Spanning:
        vocab_size = 2

        def encode(self, text):
            return [0]

        def decode(self, ids):
            return "".join(["x", "of the"][i] for i in ids)

    with pytest.raises(ValueError, match="token 1 is 'of the'"):
        token_hashes(Spanning())
