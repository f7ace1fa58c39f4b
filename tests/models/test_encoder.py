"""Encoders against the states that PyTorch computed for small random checkpoints, and what must hold of any encoder."""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_llm.models.checkpoint import Tensor, rename
from jaxrl_llm.models.encoder import EncoderConfig, make_encoder
from jaxrl_llm.models.encoder_families import FAMILIES
from jaxrl_llm.models.hub import load

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("bert", "roberta", "modernbert")
TINY = EncoderConfig(vocab_size=50, width=16, num_layers=1, num_heads=2, ffn_width=24, num_positions=20)


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    """A model, its apply jitted, and the inputs and outputs of PyTorch."""
    model = load(GOLDEN / request.param)
    return model, jax.jit(model.apply), load_file(GOLDEN / request.param / "expected.safetensors")


def token_types(model, expected):
    return {"token_types": expected["token_types"]} if model.config.num_token_types == 2 else {}


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_states_are_those_of_pytorch(golden, padding):
    model, apply, expected = golden
    mask = expected[padding]
    hidden = apply(model.params, expected["tokens"], mask=mask, **token_types(model, expected))
    # 4 layers of float32 sums in another order
    np.testing.assert_allclose(hidden[mask], expected[f"output_{padding}"][mask], atol=2e-5)


def test_padding_is_never_seen(golden):
    model, apply, expected = golden
    mask = expected["right"]
    hidden = apply(model.params, expected["tokens"], mask=mask)
    other = apply(model.params, np.where(mask, expected["tokens"], 7), mask=mask)
    assert np.array_equal(hidden[mask], other[mask])


def test_packed_rows_equal_separate_ones(golden):
    """Forward and gradient; and what one segment holds changes no bit of the others."""
    model, _, expected = golden
    tokens = expected["tokens"][:2, :7]
    packed = tokens.reshape(1, 14)
    places = jnp.tile(jnp.arange(7), 2)[None]
    segments = jnp.repeat(jnp.arange(2), 7)[None]
    weights = jax.random.normal(jax.random.key(0), (2, 7, model.config.width))

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def separate(params):
        hidden = model.apply(params, tokens)
        return jnp.sum(hidden * weights), hidden

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def together(params, packed):
        hidden = model.apply(params, packed, segment_ids=segments, positions=places).reshape(weights.shape)
        return jnp.sum(hidden * weights), hidden

    (_, alone), alone_grads = separate(model.params)
    (_, hidden), grads = together(model.params, packed)
    np.testing.assert_allclose(hidden, alone, atol=2e-5)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(alone_grads), strict=True):
        # sums over 14 tokens in another order, relative to the largest entry of a parameter
        np.testing.assert_allclose(got, want, atol=2e-5 * max(1.0, float(jnp.abs(want).max())))
    (_, changed), _ = together(model.params, packed + (np.arange(14) < 7))
    assert np.array_equal(changed[1], hidden[1]) and not np.allclose(changed[0], hidden[0])


def test_windows_reach_as_far_as_they_say():
    config = dataclasses.replace(TINY, rope_thetas=(100.0,), layer_windows=(2,), num_token_types=0)
    model = make_encoder(config)
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (1, 12), 0, 50)
    rows = jnp.concatenate([tokens, tokens.at[0, 6].add(1) % 50])
    before, after = jax.jit(model.apply)(params, rows)
    moved = jnp.abs(after - before).max(-1)
    assert np.array_equal(moved > 0, np.abs(np.arange(12) - 6) <= 2)


@pytest.mark.parametrize("name", NAMES)
def test_config_survives_being_written(name):
    hf = json.loads((GOLDEN / name / "config.json").read_text())
    family = FAMILIES[hf["architectures"][0]]
    config = family.config_from(hf)
    written = family.config_to(config)
    assert FAMILIES[written["architectures"][0]].config_from(json.loads(json.dumps(written))) == config


def test_modernbert_config_of_older_files():
    """The two bases and the rhythm of layers were numbers of their own."""
    hf = json.loads((GOLDEN / "modernbert" / "config.json").read_text())
    for key in ("rope_parameters", "layer_types"):
        del hf[key]
    hf |= {"global_rope_theta": 500.0, "local_rope_theta": 50.0, "global_attn_every_n_layers": 2, "local_attention": 10}
    config = FAMILIES["ModernBertForMaskedLM"].config_from(hf)
    assert config.rope_thetas == (500.0, 50.0, 500.0, 50.0)
    assert config.layer_windows == (None, 5, None, 5)


def test_names_of_the_first_checkpoints_of_bert():
    names = ("bert.embeddings.LayerNorm.gamma", "bert.encoder.layer.0.output.LayerNorm.beta", "cls.predictions.bias")
    tensors = {name: Tensor(Path(), "F32", (1,), 0) for name in names}
    family = FAMILIES["BertForMaskedLM"]
    renamed = set(rename(tensors, family.renamed))
    assert renamed == {"embeddings.LayerNorm.weight", "encoder.layer.0.output.LayerNorm.bias", names[2]}
    beyond = renamed - {place.names[0] for place in family.stored(dataclasses.replace(TINY, num_layers=1)).values()}
    assert beyond == {names[2]} and any(re.fullmatch(pattern, names[2]) for pattern in family.ignored)


def test_bert_base_has_its_published_size():
    """bert-base-uncased without pooler and head: 109,482,240 less the pooler's 590,592."""
    config = EncoderConfig(vocab_size=30522, width=768, num_layers=12, num_heads=12, ffn_width=3072)
    shapes = jax.eval_shape(make_encoder(config).init, jax.random.key(0))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == 109_482_240 - 590_592


def test_every_parameter_matters(golden):
    model, _, _ = golden
    grads = jax.jit(jax.grad(lambda params: model.apply(params, jnp.arange(2, 10)[None])[0, 3, 0]))(model.params)
    silent = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not g.any()]
    # softmax does not change when all scores of a query do, so rounding alone decides whether that gradient is 0
    assert all("['key']['bias']" in path for path in silent), silent


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "xielu"}, "hidden_act 'xielu' is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"is_decoder": True}, "is_decoder=true"),
    ],
)
def test_unsupported_configs_are_named(changes, message):
    hf = json.loads((GOLDEN / "bert" / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        FAMILIES["BertModel"].config_from(hf | changes)
    with pytest.raises(ValueError, match="pad_token_id is null"):
        FAMILIES["RobertaModel"].config_from(hf | {"pad_token_id": None})
    with pytest.raises(ValueError, match="rope type 'yarn' is not supported for ModernBERT"):
        FAMILIES["ModernBertModel"].config_from(hf | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}})


def test_bad_sizes_and_inputs():
    with pytest.raises(ValueError, match="width=16 must be a multiple of num_heads=3"):
        dataclasses.replace(TINY, num_heads=3)
    with pytest.raises(ValueError, match="activation must be one of .* got 'tanh'"):
        dataclasses.replace(TINY, activation="tanh")
    with pytest.raises(ValueError, match="rope_thetas has 2 entries"):
        dataclasses.replace(TINY, rope_thetas=(1.0, 2.0))
    with pytest.raises(ValueError, match="layer_windows has 3 entries"):
        dataclasses.replace(TINY, layer_windows=(1, 2, 3))
    with pytest.raises(ValueError, match="heads of width 1 cannot be turned"):
        dataclasses.replace(TINY, num_heads=16, rope_thetas=(1.0,))
    model = make_encoder(dataclasses.replace(TINY, position_offset=2, num_token_types=0))
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jnp.zeros((1, 19), jnp.int32)
    with pytest.raises(ValueError, match="rows of 19 tokens do not fit the 18 learned positions"):
        model.apply(params, tokens)
    with pytest.raises(ValueError, match="packed rows need positions"):
        model.apply(params, tokens[:, :4], segment_ids=tokens[:, :4])
    with pytest.raises(ValueError, match="no token types"):
        model.apply(params, tokens[:, :4], token_types=tokens[:, :4])
