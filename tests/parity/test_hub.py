"""What `save` writes, read by transformers: no tensor missing or left over, and the same logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with PyTorch: run by `make parity`")
transformers = pytest.importorskip("transformers")

from jaxrl_llm.models.decoder import make_decoder  # noqa: E402  # after the check for PyTorch
from jaxrl_llm.models.decoder_config import DecoderConfig  # noqa: E402
from jaxrl_llm.models.hub import load, save  # noqa: E402
from tests.parity.make_golden_decoders import CONFIGS, random_model  # noqa: E402
from tests.parity.rounding import assert_same  # noqa: E402


def read_back(folder):
    """The folder as transformers reads it, which must find all that it looks for and nothing else."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def logits_of(tokens):
    def run(model):
        with torch.no_grad():
            return model(input_ids=torch.tensor(tokens)).logits.numpy()

    return run


@pytest.mark.parametrize("name", list(CONFIGS))
def test_saved_models_have_equal_logits(name, seed, tmp_path):
    """All families, in several shards, with the parameters changed on the way."""
    random_model(name, seed).save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs")
    params = jax.tree.map(lambda x: x * 1.1, model.params)
    save(model, params, tmp_path / "ours", max_shard_bytes=40_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    tokens = np.random.default_rng(seed).integers(3, model.config.vocab_size, (2, 12))
    found = jax.jit(model.logits)(params, jnp.asarray(tokens))
    assert_same(found, read_back(tmp_path / "ours"), logits_of(tokens))


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"qk_norm": "head", "tie_embeddings": False}])
def test_decoders_of_ours(changes, seed, tmp_path):
    """A decoder that came from no checkpoint, and is served as the family that has its options."""
    config = DecoderConfig(vocab_size=60, width=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=40)
    model = make_decoder(dataclasses.replace(config, rope_theta=5_000.0, **changes))
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)
    save(model, params, tmp_path / "ours")
    tokens = rng.integers(0, 60, (2, 12))
    found = jax.jit(model.logits)(params, jnp.asarray(tokens))
    assert_same(found, read_back(tmp_path / "ours"), logits_of(tokens))


def test_bfloat16_is_rounded_as_torch_rounds(seed, tmp_path):
    """The folder of a model saved in bfloat16 holds what torch makes of it, and says so in config.json."""
    theirs = random_model("qwen2", seed)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs")
    save(model, model.params, tmp_path / "ours", dtype=jnp.bfloat16)
    again = read_back(tmp_path / "ours")
    expected = theirs.to(torch.bfloat16).state_dict()
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_bfloat16_of_transformers(seed, tmp_path):
    """A checkpoint that transformers wrote in bfloat16 gives both the same numbers in float32."""
    random_model("llama", seed).to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model = load(tmp_path)
    tokens = np.random.default_rng(seed).integers(3, model.config.vocab_size, (2, 12))
    found = jax.jit(model.logits)(model.params, jnp.asarray(tokens))
    assert_same(found, theirs, logits_of(tokens))
