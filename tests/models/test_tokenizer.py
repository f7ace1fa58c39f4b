import json
import shutil
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.models.tokenizer import decode_stream, load_tokenizer, token_bytes

FOLDER = Path(__file__).parent / "golden" / "tokenizers"
TOKENIZERS = {name: load_tokenizer(FOLDER / name) for name in ("chatml", "t5", "llama")}
PLAIN = [
    "Hello  world\n\n\tPopulation of Kenya: 42.",
    "trailing  ",
    "日本の首都 😀 👩‍👩‍👧 Größe Привет مرحبا",
    "combining e\u0301 and full-width \uff21\uff21",
    "don't x 1234\r\n    indented",
    "",
]
MARKED = [
    "<|im_start|>user\nHi<|im_end|>\n<tool_call>\n{}</tool_call>",
    "a</s>b </s> c<unk><pad>x",
    "<s>[INST] Hi [/INST] there </s><s> x",
    "<extra_id_0> walks<extra_id_7>in",
]
texts = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("ab e\n\t 1é日😀")))


def copied(tmp_path, name, **changes):
    """A copy of a tokenizer's folder, and its tokenizer_config.json with changes."""
    folder = tmp_path / name
    shutil.copytree(FOLDER / name, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("name", TOKENIZERS)
def test_same_as_transformers(name):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(FOLDER / name), TOKENIZERS[name]
    for text in PLAIN + MARKED:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert ours.encode(text, add_special_tokens=True) == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), text
    assert ours.encode_batch(PLAIN + MARKED) == [ours.encode(text) for text in PLAIN + MARKED]
    assert ours.pad_id == theirs.pad_token_id
    assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_ids[0] == theirs.eos_token_id


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_of_tokens_are_those_of_the_text(name):
    """Parts of characters, spaces that pieces begin with (SentencePiece puts one first), tokens that were added."""
    tokenizer = TOKENIZERS[name]
    pieces = token_bytes(tokenizer)
    texts = ["Kenya and Peru"] if name == "t5" else [unicodedata.normalize("NFC", text) for text in PLAIN if text]
    for text in texts:
        spelled = b"".join(pieces[i] for i in tokenizer.encode(text))
        assert spelled == (text if name == "chatml" else " " + text).encode(), text
    assert all(pieces[i] == b"" for i in tokenizer.special_ids.values())
    if name == "chatml":
        assert pieces[tokenizer.encode("<tool_call>")[0]] == b"<tool_call>"


@pytest.mark.parametrize(("name", "file"), [("t5", "spiece.model"), ("llama", "tokenizer.model")])
@given(text=texts)
def test_same_as_sentencepiece(name, file, text):
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / name / file))
    ids = TOKENIZERS[name].encode(text)
    assert ids == theirs.encode(text)
    if theirs.unk_id() not in ids:  # it writes a sign for the unknown, which is no special token to it
        assert TOKENIZERS[name].decode(ids) == theirs.decode(ids)
    assert load_tokenizer(FOLDER / name / file).encode(text) == ids


@given(texts)
def test_round_trip_and_spans(text):
    assert TOKENIZERS["llama"].decode(TOKENIZERS["llama"].encode(text)) == text.replace("▁", " ")
    assert TOKENIZERS["chatml"].decode(TOKENIZERS["chatml"].encode(text)) == unicodedata.normalize("NFC", text)
    for name in ("llama", "chatml"):  # these drop nothing, so their spans leave no gap
        ids, spans = TOKENIZERS[name].encode_with_spans(text)
        assert ids == TOKENIZERS[name].encode(text)
        assert len(ids) == len(spans)
        last = 0
        for start, end in spans:
            assert start <= last <= end
            last = end
        assert last == len(text)


def test_spans_keep_white_space():
    """The file asks for spans without it, which would put a line break's token on the text behind."""
    tokenizer = TOKENIZERS["chatml"]
    assert tokenizer.encode_with_spans("<|im_start|>\n x")[1] == [(0, 12), (12, 13), (13, 15)]


@pytest.mark.parametrize("name", ["llama", "chatml"])
@given(text=texts)
def test_stream_shows_no_part_of_a_character(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    parts = list(decode_stream(tokenizer, ids))
    assert "".join(parts) == tokenizer.decode(ids)
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


@given(st.lists(st.integers(0, 819)))
def test_stream_of_any_bytes_loses_nothing(ids):
    tokenizer = TOKENIZERS["chatml"]
    assert "".join(decode_stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_stream_is_as_early_as_it_can_be():
    tokenizer = TOKENIZERS["chatml"]
    ids = tokenizer.encode("a😀b")
    assert len(ids) == 6
    assert list(decode_stream(tokenizer, ids)) == ["a", "😀", "b"]
    assert list(decode_stream(tokenizer, ids[:3])) == ["a", "\ufffd"]


def test_gaps_in_the_vocabulary():
    tokenizer = TOKENIZERS["chatml"]
    assert tokenizer.vocab_size == 820
    assert [i for i, piece in enumerate(tokenizer.pieces) if not piece] == [799, *range(805, 819)]
    assert tokenizer.decode([*tokenizer.encode("one"), 810, 5000, *tokenizer.encode(" two")]) == "one two"
    assert TOKENIZERS["llama"].decode([5000]) == ""


def test_roles():
    chatml, t5 = TOKENIZERS["chatml"], TOKENIZERS["t5"]
    assert chatml.special_ids == {"<|endoftext|>": 800, "<|im_start|>": 801, "<|im_end|>": 802}
    assert chatml.eos_ids == (802, 800)  # its own first, then those of generation_config.json
    assert chatml.names == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert chatml.bos_id is None
    assert [t5.special_ids[f"<extra_id_{n}>"] for n in (0, 7)] == [607, 600]
    assert t5.encode("x", add_special_tokens=True)[-1] == t5.eos_ids[0] == 1
    assert [Path(file).name for file in chatml.files] == [
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
    ]  # fmt: skip
    bare = load_tokenizer(FOLDER / "chatml" / "tokenizer.json")
    assert bare.names == {} and bare.eos_ids == () and bare.chat_template is None


def test_tokens_that_only_the_config_has(tmp_path):
    token = {"content": "<tool_response>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    listed = {"805": token | {"special": False}}
    tokenizer = load_tokenizer(copied(tmp_path, "chatml", added_tokens_decoder=listed, bos_token="<bos>"))
    assert tokenizer.encode("<tool_response><bos>") == [805, 806]
    assert tokenizer.bos_id == 806
    assert "<tool_response>" not in tokenizer.special_ids
    shutil.rmtree(tmp_path / "chatml")
    with pytest.raises(ValueError, match="'<tool_response>' the id 812.* as 805"):
        load_tokenizer(copied(tmp_path, "chatml", added_tokens_decoder={"812": token}))
    tokenizer = load_tokenizer(copied(tmp_path, "llama", added_tokens_decoder={"601": token}))
    assert tokenizer.vocab_size == 602
    assert tokenizer.decode(tokenizer.encode("a<tool_response>b")) == "a<tool_response>b"


def test_roles_in_a_file_of_their_own(tmp_path):
    folder = copied(tmp_path, "chatml", eos_token="<|endoftext|>")
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>", "lstrip": false}}')
    assert load_tokenizer(folder).eos_ids == (802, 800)


def test_templates(tmp_path):
    listed = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    folder = copied(tmp_path, "llama", chat_template=listed)
    assert (load_tokenizer(folder).chat_template, load_tokenizer(folder).tool_template) == ("A", "B")
    (folder / "chat_template.jinja").write_text("C")
    assert load_tokenizer(folder).chat_template == "C"
    shutil.rmtree(folder)
    tokenizer = load_tokenizer(copied(tmp_path, "llama", chat_template="D"))
    assert (tokenizer.chat_template, tokenizer.tool_template) == ("D", None)


def test_padding_and_truncation_of_the_file_are_off(tmp_path):
    folder = copied(tmp_path, "chatml")
    value = json.loads((folder / "tokenizer.json").read_text())
    value["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    value["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None} | {
        "pad_id": 800, "pad_type_id": 0, "pad_token": "<|endoftext|>"
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(value))
    assert load_tokenizer(folder).encode(PLAIN[0]) == TOKENIZERS["chatml"].encode(PLAIN[0])


def test_legacy_llama_begins_each_part_like_a_text(tmp_path):
    tokenizer = load_tokenizer(copied(tmp_path, "llama", legacy=True))
    assert tokenizer.encode("a</s>b") == [*tokenizer.encode("a"), 2, *tokenizer.encode("b")]
    for each, expected in ((TOKENIZERS["llama"], "▁a</s>b"), (tokenizer, "▁a</s>▁b")):
        assert "".join(each.pieces[i] for i in each.encode("a</s>b")) == expected


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer file at"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"expected one of tokenizer.json, tokenizer.model, spiece.model.*vocab.txt"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_text("{")
        with pytest.raises(ValueError, match=name):
            load_tokenizer(tmp_path / name)
    folder = copied(tmp_path, "llama")
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json holds a JSON list, expected an object"):
        load_tokenizer(folder)
    with pytest.raises(ValueError, match="at least 0, got -100 at 1"):
        TOKENIZERS["chatml"].decode([5, -100])
