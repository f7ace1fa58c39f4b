"""T5 against the logits that PyTorch computed for small random checkpoints, and its cache, packing and buckets."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_llm.models.encoder_families import FAMILIES
from jaxrl_llm.models.hub import load
from jaxrl_llm.models.seq2seq import Seq2SeqConfig, make_seq2seq, relative_position_buckets, shift_right

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("t5", "t5_gated")


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    """A model with its functions jitted, and the inputs and outputs of PyTorch."""
    model = load(GOLDEN / request.param)
    jitted = {name: jax.jit(getattr(model, name)) for name in ("encode", "decode")}
    return dataclasses.replace(model, **jitted), load_file(GOLDEN / request.param / "expected.safetensors")


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_logits_are_those_of_pytorch(golden, padding):
    model, expected = golden
    logits = model.logits(model.params, expected["tokens"], expected["decoder_tokens"], mask=expected[padding])
    # two layers on each side, float32 sums in another order
    np.testing.assert_allclose(logits, expected[f"output_{padding}"], atol=2e-5)


def test_cache_step_by_step_equals_one_pass(golden):
    """Also where rows are at different places and the cache has room to spare."""
    model, expected = golden
    tokens, mask = expected["decoder_tokens"], expected["right"]
    batch, length = tokens.shape
    encoded = model.encode(model.params, expected["tokens"], mask=mask)
    whole, none = model.decode(model.params, tokens, encoded, mask=mask)
    assert none is None
    cache = model.init_cache(model.params, encoded, length=length + 3, mask=mask)
    # what an earlier sequence left behind must not be seen
    cache["layers"] = [layer | {name: layer[name] + 7.0 for name in ("keys", "values")} for layer in cache["layers"]]
    states = np.zeros(whole.shape, np.float32)
    done = np.zeros(batch, int)
    for step in range(length + 2):
        # row i starts i steps late: until then, and after its end, it reads padding
        at = np.array([step - row if 0 <= step - row < length else -1 for row in range(batch)])
        read = tokens[np.arange(batch), at][:, None]
        hidden, cache = model.decode(model.params, read, positions=at[:, None], cache=cache)
        for row in np.flatnonzero(at >= 0):
            states[row, at[row]] = hidden[row, 0]
            done[row] += 1
    assert np.all(done == length)
    np.testing.assert_allclose(states, whole, atol=2e-5)  # hidden states of size 1, sums in another order
    # several tokens at a time
    cache = model.init_cache(model.params, encoded, length=length, mask=mask)
    first, cache = model.decode(model.params, tokens[:, :4], positions=np.tile(np.arange(4), (batch, 1)), cache=cache)
    np.testing.assert_allclose(first, whole[:, :4], atol=2e-5)


def test_a_step_computes_nothing_of_the_encoder_again(golden):
    """The products of a decode step with a cache do not grow with the encoder's keys being computed: its operations
    are less than those of the keys and values alone."""
    model, _ = golden
    config, batch, memory = model.config, 1, 512
    encoded = jax.ShapeDtypeStruct((batch, memory, config.width), jnp.float32)
    cache = jax.eval_shape(lambda states: model.init_cache(model.params, states, length=4), encoded)
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    step = jax.jit(lambda tokens, at, cache: model.decode(model.params, tokens, positions=at, cache=cache))
    flops = step.lower(tokens, tokens, cache).compile().cost_analysis()["flops"]
    keys_and_values = 2 * 2 * memory * config.width * config.num_heads * config.head_dim * config.num_decoder_layers
    assert flops < keys_and_values / 2


def test_packed_rows_equal_separate_ones(golden):
    model, expected = golden
    tokens, decoder_tokens = expected["tokens"][:2, :7], expected["decoder_tokens"][:2, :4]
    alone, _ = model.decode(model.params, decoder_tokens, model.encode(model.params, tokens))
    segments, decoder_segments = (jnp.repeat(jnp.arange(2), length)[None] for length in (7, 4))

    @jax.jit
    def together(tokens):
        encoded = model.encode(model.params, jnp.reshape(tokens, (1, 14)), segment_ids=segments)
        hidden, _ = model.decode(
            model.params, decoder_tokens.reshape(1, 8), encoded,
            segment_ids=decoder_segments, encoded_segment_ids=segments,
        )  # fmt: skip
        return hidden.reshape(alone.shape)

    packed = together(tokens)
    np.testing.assert_allclose(packed, alone, atol=2e-5)
    changed = together(tokens + np.array([[1], [0]]))
    assert np.array_equal(changed[1], packed[1]) and not np.allclose(changed[0], packed[0])


def test_gradients_reach_every_parameter(golden):
    model, expected = golden

    def loss(params):
        logits = model.logits(params, expected["tokens"][:1], shift_right(expected["decoder_tokens"][:1]))
        return jnp.mean(jax.nn.log_softmax(logits)[..., 5])

    grads = jax.jit(jax.grad(loss))(model.params)
    assert all(np.isfinite(g).all() and g.any() for g in jax.tree.leaves(grads))


def test_buckets():
    """T5's own: 32 buckets, distances up to 128. Half of a direction's buckets hold one distance each."""
    options = {"num_buckets": 32, "max_distance": 128}
    relative = jnp.array([0, -1, -7, -8, -11, -12, -20, -100, -127, -128, -5000, 1, 7, 8, 5000])
    both = relative_position_buckets(relative, bidirectional=True, **options)
    # 8 + floor(8 ln(d / 8) / ln(16)): d = 11 gives 8.9, d = 12 gives 9.2, d = 20 gives 10.6, d = 100 gives 15.3
    assert both.tolist() == [0, 1, 7, 8, 8, 9, 10, 15, 15, 15, 15, 17, 23, 24, 31]
    behind = relative_position_buckets(relative, bidirectional=False, **options)
    # 16 + floor(16 ln(d / 16) / ln(8)): d = 20 gives 17.7, d = 100 gives 30.1; keys ahead count as distance 0
    assert behind.tolist() == [0, 1, 7, 8, 11, 12, 17, 30, 31, 31, 31, 0, 0, 0, 0]


@pytest.mark.parametrize("name", NAMES)
def test_config_survives_being_written(name):
    hf = json.loads((GOLDEN / name / "config.json").read_text())
    family = FAMILIES["T5ForConditionalGeneration"]
    config = family.config_from(hf)
    assert config.tie_embeddings == (name == "t5") and config.gated == (name == "t5_gated")
    assert family.config_from(json.loads(json.dumps(family.config_to(config)))) == config
    # files written before transformers 5 say it in so many words
    del hf["scale_decoder_outputs"]
    assert family.config_from(hf | {"tie_word_embeddings": name == "t5"}) == config
    with pytest.raises(ValueError, match="feed_forward_proj 'maxout' is not supported"):
        family.config_from(hf | {"feed_forward_proj": "gated-maxout"})


def test_published_sizes():
    """google-t5/t5-small has 60,506,624 parameters and google/flan-t5-small 76,961,152."""
    small = Seq2SeqConfig(32128, 512, head_dim=64, num_heads=8, ffn_width=2048, num_layers=6, num_decoder_layers=6)
    flan = dataclasses.replace(
        small, num_heads=6, ffn_width=1024, num_layers=8, num_decoder_layers=8,
        gated=True, activation="gelu_tanh", tie_embeddings=False,
    )  # fmt: skip
    for config, count in ((small, 60_506_624), (flan, 76_961_152)):
        shapes = jax.eval_shape(make_seq2seq(config).init, jax.random.key(0))
        assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == count


def test_fresh_parameters_give_logits_of_moderate_size():
    """Scores are not scaled and the states before the head are: the first parameters make up for it."""
    for tie in (True, False):
        model = make_seq2seq(Seq2SeqConfig(97, num_layers=1, num_decoder_layers=1, tie_embeddings=tie))
        tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 97)
        logits = jax.jit(lambda key, tokens, model=model: model.logits(model.init(key), tokens, tokens))
        assert 0.3 < float(logits(jax.random.key(0), tokens).std()) < 3.0


def test_shift_right():
    assert shift_right(jnp.array([[5, 6, 1]])).tolist() == [[0, 5, 6]]
    assert shift_right(jnp.array([[5, 6, 1]]), start_id=9).tolist() == [[9, 5, 6]]


def test_bad_input(golden):
    model, expected = golden
    tokens = expected["tokens"][:, :3]
    encoded = jnp.zeros((3, 4, model.config.width))
    cache = model.init_cache(model.params, encoded, length=4)
    with pytest.raises(ValueError, match="either the encoded states or a cache"):
        model.decode(model.params, tokens)
    with pytest.raises(ValueError, match="either the encoded states or a cache"):
        model.decode(model.params, tokens, encoded, cache=cache)
    with pytest.raises(ValueError, match="needs positions"):
        model.decode(model.params, tokens, cache=cache)
    with pytest.raises(ValueError, match="both segment_ids"):
        model.decode(model.params, tokens, encoded, segment_ids=tokens)
    with pytest.raises(ValueError, match="activation must be one of .* got 'tanh'"):
        Seq2SeqConfig(9, activation="tanh")
    with pytest.raises(ValueError, match="num_buckets=6 must be a multiple of 4"):
        Seq2SeqConfig(9, num_buckets=6)
    with pytest.raises(ValueError, match="max_distance=16 must exceed"):
        Seq2SeqConfig(9, max_distance=16)
