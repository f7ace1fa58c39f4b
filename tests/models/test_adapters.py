"""LoRA, IA3, prefixes and prompts: what they compute, merged and beside the weights, and what they refuse."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file

from jaxrl_llm.models import DecoderConfig, make_decoder
from jaxrl_llm.models.adapters import (
    apply_prefix,
    init_ia3,
    init_prefix,
    init_prompt,
    merge_ia3,
    prompt_prefix,
    trainable_count,
)
from jaxrl_llm.models.functional import split_module
from jaxrl_llm.models.heads import Head
from jaxrl_llm.models.hub import load
from jaxrl_llm.models.lora import LoraConfig, add_lora, apply_lora, init_lora, load_lora, merge_lora, save_lora

CONFIG = DecoderConfig(50, width=32, num_heads=4, num_kv_heads=2, ffn_width=48, attention_bias=True)
MODEL = dataclasses.replace(make_decoder(CONFIG), family="Qwen2ForCausalLM")
LORA = LoraConfig(rank=3, alpha=6.0, targets=("query", "key", "value", "out", "gate", "up", "down"))
BESIDE = apply_lora(MODEL, LORA)
SOFT = jnp.array([7, 1, 30])  # what prefixes and prompts start from


@partial(jax.jit, static_argnums=0)
def states(model, params, tokens, positions=None, cache=None):
    return model.apply(params, tokens, positions=positions, cache=cache)


@jax.jit
def shaken(tree):
    """The tree with noise on every leaf: biases, scales and lora_b start at constants that would hide mistakes."""
    leaves, form = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    return jax.tree.unflatten(
        form, [x + 0.2 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


make_lora = jax.jit(init_lora, static_argnames="config")
start_prefix = jax.jit(init_prefix, static_argnums=0)


def initial(model):
    return shaken(jax.jit(model.init)(jax.random.key(0)))


@pytest.fixture(scope="module")
def params():
    return initial(MODEL)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 9), 0, 50)


@pytest.fixture(scope="module")
def fresh(params):
    return make_lora(jax.random.key(2), params, config=LORA)


@pytest.fixture(scope="module")
def adapter(fresh):
    return shaken(fresh)


# ---------------------------------------------------------------------------------------------------------------- LoRA


def test_worked_example():
    """W = I, A = [[1, 2]], B = [[0.5], [-0.5]] as torch writes them, alpha 8, rank 1: [1, 1] goes to [13, -11]."""
    base = {"query": {"kernel": jnp.eye(2)}}
    adapter = {"query": {"lora_a": jnp.array([[1.0], [2.0]]), "lora_b": jnp.array([[0.5, -0.5]])}}
    merged = merge_lora(base, adapter, LoraConfig(rank=1, alpha=8.0, targets=("query",)))
    np.testing.assert_array_equal(jnp.ones(2) @ merged["query"]["kernel"], [13, -11])


def test_counts():
    base = {name: {"kernel": jnp.zeros((64, 64))} for name in ("query", "value")}
    assert trainable_count(init_lora(jax.random.key(0), base, LoraConfig())) == 2048 and trainable_count(base) == 8192
    assert LoraConfig(16, 8.0).scale == 0.5 and LoraConfig(16, 8.0, rank_stabilized=True).scale == 2.0


def test_a_fresh_adapter_changes_nothing(params, tokens, fresh):
    before, _ = states(MODEL, params, tokens)
    np.testing.assert_array_equal(states(MODEL, merge_lora(params, fresh, LORA), tokens)[0], before)
    beside, _ = states(BESIDE, {"base": params, "lora": fresh}, tokens)
    np.testing.assert_allclose(beside, before, atol=1e-6)  # compiled apart: sums may be taken in another order


def test_merged_equals_beside_forward_and_gradient(params, tokens, adapter):
    weights = jax.random.normal(jax.random.key(4), (2, 9, 50)) / 450

    def beside(lora):
        logits = BESIDE.logits({"base": params, "lora": lora}, tokens)
        return jnp.sum(weights * logits), logits

    def merged(lora):
        logits = MODEL.logits(merge_lora(params, lora, LORA), tokens)
        return jnp.sum(weights * logits), logits

    slopes, outputs = zip(*(jax.jit(jax.grad(f, has_aux=True))(adapter) for f in (beside, merged)), strict=True)
    scale = jnp.abs(outputs[0]).max()
    np.testing.assert_allclose(outputs[0] / scale, outputs[1] / scale, atol=1e-5)
    assert jnp.abs(outputs[0] - states(MODEL, params, tokens)[0] @ params["embedding"].T).max() > 0.1 * scale
    for ours, other in zip(*map(jax.tree.leaves, slopes), strict=True):
        assert jnp.abs(other).max() > 0
        np.testing.assert_allclose(ours / jnp.abs(other).max(), other / jnp.abs(other).max(), atol=1e-5)


def test_beside_works_with_a_cache(params, tokens, adapter):
    both = {"base": params, "lora": adapter}
    whole, _ = states(BESIDE, both, tokens[:, :8])
    cache, parts = BESIDE.init_cache(2, 8), []
    for cut in (slice(0, 4), slice(4, 8)):
        positions = jnp.broadcast_to(jnp.arange(8)[cut], tokens[:, cut].shape)
        hidden, cache = states(BESIDE, both, tokens[:, cut], positions, cache)
        parts.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=2e-5)


def test_the_gradient_beside_holds_no_array_of_a_matrix_size():
    config = DecoderConfig(50, width=128, num_layers=1, num_heads=4, num_kv_heads=2, ffn_width=1024)
    lora = LoraConfig(4, targets=("gate", "up", "down"))
    model, row = make_decoder(config), jnp.arange(4)[None]
    base = jax.eval_shape(model.init, jax.random.key(0))
    adapter = jax.eval_shape(lambda key: init_lora(key, base, lora), jax.random.key(0))
    beside = apply_lora(model, lora)

    def temporary(hidden):
        gradient = jax.jit(jax.grad(lambda a, p: hidden(a, p).sum())).lower(adapter, base).compile()
        return gradient.memory_analysis().temp_size_in_bytes

    matrix = 128 * 1024 * 4
    assert temporary(lambda a, p: beside.apply({"base": p, "lora": a}, row)[0]) < matrix / 2
    assert temporary(lambda a, p: model.apply(merge_lora(p, a, lora), row)[0]) > matrix  # what is saved


def test_merging_into_bfloat16_rounds_once(params, tokens, adapter):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    kernel = merge_lora(half, adapter, LORA)["layers"]["0"]["down"]["kernel"]
    part = adapter["layers"]["0"]["down"]
    exact = half["layers"]["0"]["down"]["kernel"].astype(jnp.float32) + 2.0 * part["lora_a"] @ part["lora_b"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_allclose(kernel.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)  # half a step of 8 bits
    hidden, _ = jax.eval_shape(partial(BESIDE.apply, {"base": half, "lora": adapter}), tokens)
    assert hidden.dtype == jnp.bfloat16


def test_experts_take_a_stack_of_adapters_when_merged():
    config = dataclasses.replace(CONFIG, num_experts=4, attention_bias=False, num_layers=1)
    model, lora = make_decoder(config), LoraConfig(2, targets=("experts.up",))
    base = initial(model)
    adapter = shaken(make_lora(jax.random.key(1), base, config=lora))
    parts = adapter["layers"]["0"]["experts"]["up"]
    assert parts["lora_a"].shape == (4, 32, 2) and parts["lora_b"].shape == (4, 2, 48)
    change = merge_lora(base, adapter, lora)["layers"]["0"]["experts"]["up"] - base["layers"]["0"]["experts"]["up"]
    np.testing.assert_allclose(change[3], 8.0 * parts["lora_a"][3] @ parts["lora_b"][3], atol=1e-5)
    with pytest.raises(ValueError, match=r"layers\.0\.experts\.up is a stack of experts.*merge_lora"):
        apply_lora(model, lora)


def test_lora_in_modules_of_another_kind():
    lora = LoraConfig(2, 4.0, ("hidden.0", "out"))
    _, plain = split_module(lambda rngs: Head(8, 3, 2, jax.nn.relu, rngs))
    init, apply = split_module(lambda rngs: add_lora(Head(8, 3, 2, jax.nn.relu, rngs), lora))
    both = shaken(jax.jit(init)(jax.random.key(0)))
    layers = {"hidden": both["hidden"]["0"], "out": both["out"]}
    base = {name: {part: layer[part] for part in ("kernel", "bias")} for name, layer in layers.items()}
    adapter = {name: {part: layer[part] for part in ("lora_a", "lora_b")} for name, layer in layers.items()}
    base, adapter = ({"hidden": {"0": tree["hidden"]}, "out": tree["out"]} for tree in (base, adapter))
    x = jax.random.normal(jax.random.key(1), (4, 8))
    np.testing.assert_allclose(apply(both, x), plain(merge_lora(base, adapter, lora), x), rtol=1e-4, atol=1e-5)


def test_what_lora_refuses(params, fresh, tokens):
    with pytest.raises(ValueError, match="'q_proj' matches no matrix of the model; there are .*layers.attention.query"):
        init_lora(jax.random.key(0), params, LoraConfig(targets=("query", "q_proj")))
    with pytest.raises(ValueError, match="matches no matrix"):
        apply_lora(MODEL, LoraConfig(targets=("uery",)))  # whole parts of a name
    with pytest.raises(ValueError, match=r"rank 20 exceeds layers\.0\.attention\.key, a matrix \[32, 16\]"):
        init_lora(jax.random.key(0), params, LoraConfig(rank=20, targets=("key",)))
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        LoraConfig(rank=0)
    with pytest.raises(ValueError, match="alpha must be positive"):
        LoraConfig(alpha=0)
    with pytest.raises(ValueError, match="targets must be a tuple"):
        LoraConfig(targets="query")
    with pytest.raises(ValueError, match=r"has shapes \(32, 3\) and \(3, 16\).*rank 4 want \(32, 4\)"):
        merge_lora(params, fresh, LoraConfig(rank=4))
    with pytest.raises(ValueError, match="was the adapter made for another model"):
        merge_lora(params, {"layers": {"7": fresh["layers"]["0"]}}, LORA)
    with pytest.raises(ValueError, match=r'must be \{"base": ..., "lora": ...\}, got .*embedding'):
        BESIDE.apply(params, tokens)


# ------------------------------------------------------------------------------------------------------ files of PEFT


@pytest.mark.parametrize(
    ("targets", "outside"),
    [
        (("query", "down"), ["down_proj", "q_proj"]),
        (("layers.1.attention.value",), ["model.layers.1.self_attn.v_proj"]),
    ],
)
def test_files_round_trip(params, tmp_path, targets, outside):
    config = LoraConfig(rank=2, alpha=5.0, targets=targets, rank_stabilized=True)
    adapter = shaken(make_lora(jax.random.key(0), params, config=config))
    save_lora(adapter, config, MODEL, tmp_path / "new" / "folder", base="some/model")
    written = json.loads((tmp_path / "new" / "folder" / "adapter_config.json").read_text())
    assert written["target_modules"] == outside and written["base_model_name_or_path"] == "some/model"
    loaded, read_config = load_lora(tmp_path / "new" / "folder", MODEL)
    assert dataclasses.replace(read_config, targets=targets) == config
    assert set(read_config.targets) == {name.rpartition(".")[2] if len(targets) > 1 else name for name in targets}
    assert jax.tree.structure(loaded) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)


def test_golden_adapter_of_peft():
    """Written by tests/parity/make_golden_adapters.py; logits of size 5 agree to 2e-5 of it."""
    folder = Path(__file__).parent / "golden" / "lora"
    model = load(folder)
    adapter, config = load_lora(folder / "adapter", model)
    assert config == LoraConfig(rank=3, alpha=7.0, targets=("gate", "query", "value"), rank_stabilized=True)
    expected = load_file(folder / "expected.safetensors")
    scale = jnp.abs(expected["logits"]).max()
    logits = jax.jit(model.logits)(merge_lora(model.params, adapter, config), expected["tokens"])
    np.testing.assert_allclose(logits / scale, expected["logits"] / scale, atol=2e-5)
    assert jnp.abs(jax.jit(model.logits)(model.params, expected["tokens"]) - expected["logits"]).max() > 0.1 * scale


def test_a_short_name_never_means_more_than_was_adapted(tmp_path):
    """In a model with experts, `gate_proj` is also theirs: the one dense layer's is named in full."""
    config = dataclasses.replace(CONFIG, num_experts=2, attention_bias=False, qk_norm="head", dense_layers=(1,))
    model = dataclasses.replace(make_decoder(config), family="Qwen3MoeForCausalLM")
    lora = LoraConfig(2, targets=("layers.1.gate", "key"))
    shapes = jax.eval_shape(lambda key: init_lora(key, model.init(key), lora), jax.random.key(0))
    adapter = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    save_lora(adapter, lora, model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == ["k_proj", "model.layers.1.mlp.gate_proj"]


def test_what_files_refuse(params, fresh, tmp_path):
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        load_lora(tmp_path, MODEL)
    with pytest.raises(ValueError, match="family is None.*LlamaForCausalLM"):
        save_lora(fresh, LORA, make_decoder(CONFIG), tmp_path)
    save_lora(fresh, LORA, MODEL, tmp_path)
    smaller = dataclasses.replace(make_decoder(dataclasses.replace(CONFIG, num_layers=1)), family=MODEL.family)
    with pytest.raises(ValueError, match=r"has 14 tensors .*model\.layers\.1\.mlp.*another model"):
        load_lora(tmp_path, smaller)
    wider = dataclasses.replace(make_decoder(dataclasses.replace(CONFIG, ffn_width=64)), family=MODEL.family)
    with pytest.raises(ValueError, match=r"layers\.0\.down has shapes \(48, 3\)"):
        load_lora(tmp_path, wider)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, message in (
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"r": None}, "r must be a number, got None"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=message):
            load_lora(tmp_path, MODEL)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is cut short"):
        load_lora(tmp_path, MODEL)
    fused = dataclasses.replace(
        make_decoder(dataclasses.replace(CONFIG, attention_bias=False)), family="Phi3ForCausalLM"
    )
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.key.* share a tensor .*merge_lora"):
        save_lora(fresh, LORA, fused, tmp_path / "fused")


# ----------------------------------------------------------------------------------------------------------------- IA3


def test_ia3_scales_outputs_and_inputs(params, tokens):
    fresh = init_ia3(params)
    assert trainable_count(fresh) == 2 * (2 * 16 + 48)
    adapter = shaken(fresh)
    jax.tree.map(np.testing.assert_array_equal, merge_ia3(params, fresh), params)
    before, after = (tree["layers"]["1"] for tree in (params, merge_ia3(params, adapter)))
    x = jax.random.normal(jax.random.key(3), (5, 32))
    for name in ("key", "value"):
        old, new = before["attention"][name], after["attention"][name]
        scaled = adapter["layers"]["1"]["attention"][name]["output_scale"] * (x @ old["kernel"] + old["bias"])
        np.testing.assert_allclose(x @ new["kernel"] + new["bias"], scaled, rtol=1e-4, atol=1e-5)
    units = jax.random.normal(jax.random.key(3), (5, 48))
    scaled = (adapter["layers"]["1"]["down"]["input_scale"] * units) @ before["down"]["kernel"]
    np.testing.assert_allclose(units @ after["down"]["kernel"], scaled, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(after["gate"]["kernel"], before["gate"]["kernel"])
    slope = jax.jit(jax.grad(lambda a: MODEL.apply(merge_ia3(params, a), tokens)[0].std(-1).sum()))(fresh)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slope))
    with pytest.raises(ValueError, match=r"layers\.0\.down\.input_scale of shape \(7,\) does not fit \(48, 32\)"):
        merge_ia3(params, {"layers": {"0": {"down": {"input_scale": jnp.ones(7)}}}})


# --------------------------------------------------------------------------------------------------- prefix and prompt


def test_a_prefix_of_tokens_is_those_tokens(params, tokens):
    """Started from tokens, prefix and prompt give the states behind those tokens; so do steps with a cache."""
    before = jnp.broadcast_to(SOFT, (2, 3))
    expected = states(MODEL, params, jnp.concatenate([before, tokens], 1))[0][:, 3:]
    prefixed = apply_prefix(MODEL, 3)
    prompt = init_prompt(params, SOFT)
    prefix = start_prefix(MODEL, params, SOFT)
    assert trainable_count(prompt) == 3 * 32 and trainable_count(prefix) == 2 * 3 * 16 * 2
    for own in (prefix, jax.jit(prompt_prefix, static_argnums=0)(MODEL, params, prompt)):
        hidden, none = states(prefixed, {"base": params, "prefix": own}, tokens)
        assert none is None
        np.testing.assert_allclose(hidden, expected, atol=2e-5)
    assert prefixed.head({"base": params, "prefix": prefix}).shape == (50, 32)
    cache, parts = prefixed.init_cache(2, 12), []
    for cut in (slice(0, 5), slice(5, 10)):  # the last step ends with padding, which is not to be written
        steps = jnp.arange(10)[cut]
        positions = jnp.broadcast_to(jnp.where(steps < 9, steps, -1), (2, 5))
        row = jnp.pad(tokens, ((0, 0), (0, 1)))[:, cut]
        hidden, cache = states(prefixed, {"base": params, "prefix": prefix}, row, positions, cache)
        parts.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, 1)[:, :9], expected, atol=2e-5)
    assert np.all(cache[0]["values"][:, :, 12:] == 0)


def test_gradients_reach_prefix_and_prompt_at_every_position(params, tokens):
    prefixed = apply_prefix(MODEL, 3)
    loss = lambda prefix: prefixed.apply({"base": params, "prefix": prefix}, tokens)[0].std(-1).sum()  # noqa: E731
    slope = jax.jit(jax.grad(loss))(start_prefix(MODEL, params, SOFT))
    for layer in slope["layers"].values():
        assert np.all(np.abs(layer["keys"]).max((0, 1)) > 0) and np.all(np.abs(layer["values"]).max((0, 2)) > 0)
    slope = jax.jit(jax.grad(lambda prompt: loss(prompt_prefix(MODEL, params, prompt))))(init_prompt(params, SOFT))
    assert slope.shape == (3, 32) and np.all(np.abs(slope).max(1) > 0)


def test_adapters_nest(params, tokens, adapter):
    """A prefix before a model with LoRA beside it."""
    both = {"base": params, "lora": adapter}
    prefixed = apply_prefix(BESIDE, 3)
    hidden, _ = states(prefixed, {"base": both, "prefix": start_prefix(BESIDE, both, SOFT)}, tokens)
    expected, _ = states(BESIDE, both, jnp.concatenate([jnp.broadcast_to(SOFT, (2, 3)), tokens], 1))
    np.testing.assert_allclose(hidden, expected[:, 3:], atol=2e-5)
    assert prefixed.head({"base": both, "prefix": None}) is params["embedding"]


def test_what_prefixes_refuse(params, tokens):
    both = {"base": params, "prefix": start_prefix(MODEL, params, SOFT)}
    prefixed = apply_prefix(MODEL, 3)
    with pytest.raises(ValueError, match="cannot stand before each packed segment"):
        prefixed.apply(both, tokens, segment_ids=jnp.zeros_like(tokens))
    with pytest.raises(ValueError, match="without a cache, positions are 0, 1"):
        prefixed.apply(both, tokens, positions=jnp.zeros_like(tokens))
    with pytest.raises(ValueError, match="prefix has 3 positions, the model was made for 2"):
        apply_prefix(MODEL, 2).apply(both, tokens)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        apply_prefix(MODEL, 0)
    with pytest.raises(ValueError, match="tokens must be below 50"):
        init_prompt(params, jnp.array([50]))
    with pytest.raises(ValueError, match=r"at least one token id, got shape \[2, 9\]"):
        init_prefix(MODEL, params, tokens)
    with pytest.raises(ValueError, match=r"prompt must have shape \[N, 32\], got \[3, 8\]"):
        prompt_prefix(MODEL, params, jnp.zeros((3, 8)))
