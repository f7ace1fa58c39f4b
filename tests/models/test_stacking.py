"""Layers in a scan: the numbers of unrolled ones, in training, through caches of both kinds, and in files."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import (
    DecoderConfig,
    LoraConfig,
    apply_lora,
    init_lora,
    load,
    load_lora,
    make_decoder,
    merge_lora,
    previous_token_head,
    save,
    save_lora,
    stack_layers,
    unstack_layers,
)
from jaxrl_llm.models.decoder import init_pages, with_page_table
from jaxrl_llm.models.rotary import Rope

GOLDEN = Path(__file__).parent / "golden"
SIZES = {"vocab_size": 50, "width": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_width": 48}
CONFIGS = {
    "dense": DecoderConfig(**SIZES, num_layers=3, attention_bias=True, qk_norm="head", remat="dots"),
    "alternating": DecoderConfig(
        **SIZES, num_layers=4, norm_placement="both", norm_offset=True, layer_windows=(4, None) * 2,
        layer_ropes=(Rope(), Rope(theta=5.0)) * 2, attention_softcap=5.0,
    ),
    "experts": DecoderConfig(
        **SIZES, num_layers=4, num_experts=4, expert_width=16, dense_layers=(0, 2), tie_embeddings=False, remat="full"
    ),
}  # fmt: skip
BATCH, LENGTH = 3, 20
TOKENS = np.random.default_rng(0).integers(0, 50, (BATCH, LENGTH))
# float32: a loop's programs fuse and sum in another order than unrolled layers, about 1e-6 of numbers of size 1
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@functools.cache
def both(name):
    """The unrolled and the scanned model, and parameters of the first."""
    plain = make_decoder(CONFIGS[name])
    return plain, make_decoder(dataclasses.replace(plain.config, scan_layers=True)), plain.init(jax.random.key(0))


def assert_close(got, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), got, expected)


@pytest.mark.parametrize("name", [slow("dense"), slow("alternating"), "experts"])
def test_a_scan_has_the_numbers_of_unrolled_layers(name):
    plain, scanned, params = both(name)
    experts = bool(plain.config.num_experts)

    def loss(model, params):
        hidden, _, *rest = model.apply(params, TOKENS, router_logits=experts)
        return jnp.mean(jnp.sin(hidden)), (hidden, rest)

    step = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True), static_argnums=0)
    stacked = stack_layers(params, plain.config)
    (_, expected), grads = step(plain, params)
    (_, got), own = step(scanned, stacked)
    assert_close(got, expected)
    assert_close(unstack_layers(own, plain.config), grads)
    # the same draws, in the same order
    drawn = jax.jit(scanned.init)(jax.random.key(0))
    assert jax.tree.structure(drawn) == jax.tree.structure(stacked)
    assert_close(drawn, stacked)


@pytest.mark.parametrize(
    ("name", "paged"),
    [
        *(("dense", False), ("alternating", True)),
        *(slow(*case) for case in (("dense", True), ("alternating", False), ("experts", False), ("experts", True))),
    ],
)
def test_a_scan_through_a_cache(name, paged):
    """A prompt side by side, then tokens one by one, with padding in one row."""
    plain, scanned, params = both(name)

    @functools.partial(jax.jit, static_argnums=0)
    def run(model, params):
        if paged:
            table = jnp.array([[4, 1, 9], [3, 0, 9], [2, 5, 9]])  # behind the end: read by nobody
            cache = with_page_table(init_pages(model, 6, 16), table)
        else:
            cache = model.init_cache(BATCH, LENGTH + 3)
        positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH)).at[2, -2:].set(-1)
        first, cache = model.apply(params, TOKENS[:, :17], positions=positions[:, :17], cache=cache)

        def step(cache, i):
            where = jax.lax.dynamic_slice_in_dim(positions, i, 1, axis=1)
            hidden, cache = model.apply(params, jnp.asarray(TOKENS)[:, i][:, None], positions=where, cache=cache)
            return cache, hidden

        cache, rest = jax.lax.scan(step, cache, jnp.arange(17, LENGTH))
        return first, rest, cache

    expected, got = run(plain, params), run(scanned, stack_layers(params, plain.config))
    assert_close(got[:2], expected[:2])
    period = plain.config.period
    for layer, entry in enumerate(expected[2]):
        stack = got[2][layer % period]
        assert_close(
            {name: stack[name][:, layer // period] for name in ("keys", "values")},
            {name: entry[name] for name in ("keys", "values")},
        )


def test_layers_without_a_period_are_refused():
    with pytest.raises(ValueError, match="no group of layers comes again .* num_layers=4 .* leave scan_layers False"):
        dataclasses.replace(CONFIGS["experts"], dense_layers=(0,), scan_layers=True)
    assert [config.period for config in CONFIGS.values()] == [1, 2, 2]


def assert_same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


# one tensor for each matrix, fused ones, experts
@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_checkpoints_in_and_out(family, tmp_path):
    folder = GOLDEN / f"decoder_{family}"
    plain, scanned = load(folder), load(folder, scan_layers=True)
    assert scanned.config == dataclasses.replace(plain.config, scan_layers=True)
    assert_same(scanned.params, stack_layers(plain.params, plain.config))
    save(
        dataclasses.replace(scanned, config=dataclasses.replace(scanned.config, remat="full")), scanned.params, tmp_path
    )
    again = load(tmp_path)
    assert again.config == plain.config
    assert_same(again.params, plain.params)


def test_what_cannot_be_scanned_is_not_loaded_so():
    with pytest.raises(ValueError, match="scan_layers=True is for decoders"):
        load(GOLDEN / "bert", scan_layers=True)
    with pytest.raises(ValueError, match="no group of layers comes again"):
        load(GOLDEN / "decoder_gemma3", scan_layers=True)


def test_lora_of_stacked_layers(tmp_path):
    """Beside the weights, merged, and in files, an adapter of a stack is those of its layers."""
    plain, scanned, params = both("alternating")
    stacked, config = stack_layers(params, plain.config), LoraConfig(rank=2, targets=("query", "layers.1.down"))
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, init_lora(jax.random.key(1), stacked, config))
    assert adapter["layers"]["1"]["down"]["lora_a"].shape == (2, 48, 2) and "down" not in adapter["layers"]["0"]
    merged = merge_lora(stacked, adapter, config)
    got, _ = jax.jit(apply_lora(scanned, config).apply)({"base": stacked, "lora": adapter}, TOKENS)
    expected, _ = jax.jit(scanned.apply)(merged, TOKENS)
    assert_close(got, expected)

    whole = LoraConfig(rank=2, targets=("layers.1.attention.query", "layers.3.attention.query"))
    one_by_one = init_lora(jax.random.key(1), params, whole)
    family = {"family": "LlamaForCausalLM"}
    plain, scanned = dataclasses.replace(plain, **family), dataclasses.replace(scanned, **family)
    save_lora(one_by_one, whole, plain, tmp_path / "plain")
    read, targets = load_lora(tmp_path / "plain", scanned)
    assert targets == dataclasses.replace(whole, targets=("layers.1.attention.query",))
    assert_same(read, stack_layers(one_by_one, plain.config))
    save_lora(read, targets, scanned, tmp_path / "scanned")
    assert_same(load_lora(tmp_path / "scanned", plain)[0], one_by_one)
    save_lora({"layers": {"1": one_by_one["layers"]["1"]}}, whole, plain, tmp_path / "one")
    with pytest.raises(ValueError, match="layers 1, 3 cannot be stacked"):
        load_lora(tmp_path / "one", scanned)


def test_previous_token_head_in_a_stack():
    config = DecoderConfig(**SIZES, attention_bias=True)
    scanned = dataclasses.replace(config, scan_layers=True)
    params = make_decoder(scanned).init(jax.random.key(0))
    expected = previous_token_head(unstack_layers(params, config), config, layer=1)
    assert_same(unstack_layers(previous_token_head(params, scanned, layer=1), config), expected)
