"""Adapters against PEFT, live: fresh random models and adapters in every run."""

import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with PyTorch; `make parity` installs it")
peft = pytest.importorskip("peft", reason="compares with peft; `make parity` installs it")
transformers = pytest.importorskip("transformers", reason="compares with transformers; `make parity` installs it")

from jaxrl_llm.models.adapters import apply_prefix, init_ia3, merge_ia3, prompt_prefix  # noqa: E402
from jaxrl_llm.models.hub import load, save  # noqa: E402
from jaxrl_llm.models.lora import LoraConfig, apply_lora, init_lora, load_lora, merge_lora, save_lora  # noqa: E402
from tests.parity.make_golden_adapters import random_adapter  # noqa: E402
from tests.parity.make_golden_decoders import random_model  # noqa: E402
from tests.parity.rounding import assert_same  # noqa: E402

SEED = secrets.randbelow(10_000)
TOKENS = np.random.default_rng(SEED).integers(3, 80, (2, 9))


@pytest.fixture(autouse=True)
def named_seed():
    print(f"random models and adapters of seed {SEED}")  # pytest shows it where a test fails


def checkpoint(name, folder):
    """A random model of transformers, and what we load of it."""
    theirs = random_model(name, seed=SEED)
    theirs.save_pretrained(folder)
    return theirs, load(folder)


def logits_of(theirs):
    with torch.no_grad():
        return theirs(torch.as_tensor(TOKENS)).logits.numpy()


def normal(rng, shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ("query", "key", "value", "out", "gate", "up", "down")),
        ("qwen2", ("layers.1.attention.query", "down")),
        ("gemma2", ("query", "value")),
        ("phi3", ("out", "down")),
        ("qwen3_moe", ("query", "out")),
    ],
)
def test_our_adapter_in_peft(name, targets, tmp_path):
    theirs, model = checkpoint(name, tmp_path / "base")
    before = logits_of(theirs)
    config = LoraConfig(rank=4, alpha=10.0, targets=targets, rank_stabilized=SEED % 2 == 0)
    rng = np.random.default_rng(SEED)
    fresh = init_lora(jax.random.key(SEED), model.params, config)
    adapter = jax.tree.map(lambda x: x + 0.2 * normal(rng, x.shape), fresh)
    save_lora(adapter, config, model, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    assert np.abs(logits_of(adapted) - before).max() > 0.05 * np.abs(before).max()
    assert_same(apply_lora(model, config).logits({"base": model.params, "lora": adapter}, TOKENS), adapted, logits_of)
    merged = merge_lora(model.params, adapter, config)
    assert_same(model.logits(merged, TOKENS), adapted, logits_of)
    if name == "qwen2":  # the other way out: a whole model
        save(model, merged, tmp_path / "merged")
        whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
        assert_same(logits_of(whole.eval()), adapted, logits_of)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "layers.0.mlp.up_proj"], r".*\.1\.self_attn\..*_proj"])
def test_pefts_adapter_here(targets, tmp_path):
    theirs, model = checkpoint("llama", tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=5, lora_dropout=0.1, target_modules=targets)
    adapted = random_adapter(theirs, config, SEED)
    adapted.save_pretrained(tmp_path / "adapter")
    adapter, ours = load_lora(tmp_path / "adapter", model)
    assert_same(model.logits(merge_lora(model.params, adapter, ours), TOKENS), adapted, logits_of)
    # the targets read back mean the same matrices
    again = init_lora(jax.random.key(0), model.params, ours)
    assert jax.tree.structure(again) == jax.tree.structure(adapter)


def test_ia3_is_pefts(tmp_path):
    theirs, model = checkpoint("qwen3", tmp_path / "base")  # keys are scaled before their norm in both
    names = ["k_proj", "v_proj", "down_proj"]
    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=names, feedforward_modules=["down_proj"])
    adapted = random_adapter(theirs, config, SEED)
    adapter = init_ia3(model.params)
    for index, layer in enumerate(adapted.base_model.model.model.layers):
        own = adapter["layers"][str(index)]
        for name, part in (("key", layer.self_attn.k_proj), ("value", layer.self_attn.v_proj)):
            own["attention"][name]["output_scale"] = jnp.asarray(part.ia3_l["default"].detach().numpy()[:, 0])
        own["down"]["input_scale"] = jnp.asarray(layer.mlp.down_proj.ia3_l["default"].detach().numpy()[0])
    assert_same(model.logits(merge_ia3(model.params, adapter), TOKENS), adapted, logits_of)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2"])
def test_prompts_are_pefts(name, tmp_path):
    """With scaled embeddings, rotary positions of two kinds and windows shorter than the sequence, too."""
    theirs, model = checkpoint(name, tmp_path / "base")
    adapted = random_adapter(theirs, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), SEED)
    prompt = jnp.asarray(adapted.prompt_encoder["default"].embedding.weight.detach().numpy())
    prompt = prompt / model.config.embedding_scale  # PEFT's prompt comes in behind Gemma's scale, ours before it
    both = {"base": model.params, "prefix": prompt_prefix(model, model.params, prompt)}
    assert_same(apply_prefix(model, 3).logits(both, TOKENS), adapted, lambda theirs: logits_of(theirs)[:, 3:])


def test_prefixes_are_pefts(tmp_path):
    theirs, model = checkpoint("llama", tmp_path / "base")
    adapted = random_adapter(theirs, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), SEED)
    table = adapted.prompt_encoder["default"].embedding.weight.detach().numpy()
    kv_heads, dim = model.config.num_kv_heads, model.config.head_dim
    table = jnp.asarray(table.reshape(3, model.config.num_layers, 2, kv_heads, dim))
    layers = {
        str(i): {"keys": jnp.moveaxis(table[:, i, 0], 0, 2), "values": jnp.moveaxis(table[:, i, 1], 0, 1)}
        for i in range(model.config.num_layers)
    }
    both = {"base": model.params, "prefix": {"layers": layers}}
    assert_same(apply_prefix(model, 3).logits(both, TOKENS), adapted, logits_of)
