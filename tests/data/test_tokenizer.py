from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.data.worlds import train_tokenizer
from jaxrl_llm.data.worlds.geography import CORRECTION, geography_passages, make_questions
from jaxrl_llm.data.worlds.tokenizer import geography_tokenizer
from jaxrl_llm.models.tokenizer import load_tokenizer

TURNS = (
    "<think> I need the country.</think><search> Nairobi</search><information> Nairobi is a city in Kenya, time "
    "zone Africa/Nairobi.</information><answer> .ke</answer><eos>"
)


def committed():
    return resources.files("jaxrl_llm.data") / "geography" / "tokenizer.json"


def test_special_tokens():
    tokenizer = geography_tokenizer()
    assert tokenizer.vocab_size == len(tokenizer.pieces) == 8192
    assert tokenizer.special_ids == {token: i for i, token in enumerate(train_tokenizer.SPECIAL_TOKENS)}
    assert tokenizer.special_ids["<pad>"] == 0
    for token, i in tokenizer.special_ids.items():
        assert tokenizer.encode(token) == [i]


def test_round_trip_of_the_worlds_text():
    tokenizer = geography_tokenizer()
    titles, passages = geography_passages()
    questions = [question.question for hops in (1, 2, 3) for question in make_questions("test", hops, 500)]
    texts = [*passages, *titles, *questions, TURNS, CORRECTION]
    rows = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(row) for row in rows] == texts
    byte = tokenizer.pieces.index("<0x00>")
    assert not any(byte <= token < byte + 256 for row in rows for token in row)  # no bytes are needed
    names = [len(row) for row in tokenizer.encode_batch(titles)]
    assert sum(names) / len(names) < 4.2


@given(st.text())
def test_every_text_encodes(text):
    tokenizer = geography_tokenizer()
    text = text.replace("▁", " ")  # the sign for a space in the vocabulary reads as one
    decoded = tokenizer.decode(tokenizer.encode(text))
    assert decoded == text or decoded == text.removeprefix(" ")


def test_spelled_out_bytes_are_text():
    tokenizer = geography_tokenizer()
    assert tokenizer.decode(tokenizer.encode("see <0x41> and <eos")) == "see <0x41> and <eos"


def test_words_have_one_form():
    """A text behind a tag encodes alike with and without a space, and joined passages encode piece by piece."""
    tokenizer = geography_tokenizer()
    assert tokenizer.encode("<search>Kenya</search>") == tokenizer.encode("<search> Kenya</search>")
    _, passages = geography_passages()
    assert tokenizer.encode(" ".join(passages[:3])) == sum(tokenizer.encode_batch(passages[:3]), [])


def test_retraining_gives_the_committed_file(tmp_path):
    train_tokenizer.main(str(tmp_path / "tokenizer.json"))
    assert (tmp_path / "tokenizer.json").read_text(encoding="utf-8") == committed().read_text(encoding="utf-8")


def test_transformers_reads_the_file():
    transformers = pytest.importorskip("transformers")
    tokenizer = geography_tokenizer()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(committed()))
    assert len(theirs) == tokenizer.vocab_size
    for text in [TURNS, *geography_passages()[1][:200]]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert theirs.decode(theirs.encode(text), clean_up_tokenization_spaces=False) == text


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer file"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="vocab_size must exceed"):
        train_tokenizer.train_tokenizer(300)
