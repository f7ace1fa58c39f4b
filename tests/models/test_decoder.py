"""The decoder behind its seam: the cache, packed rows, parameters in and out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import (
    DecoderConfig,
    count_params,
    induction_head,
    load_params,
    make_decoder,
    previous_token_head,
    save_params,
)
from jaxrl_llm.models.rotary import Rope

CONFIG = DecoderConfig(vocab_size=50, width=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=48)
MODEL = make_decoder(CONFIG)
APPLY = jax.jit(MODEL.apply)
BATCH, LENGTH = 3, 12


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, CONFIG.vocab_size)


def test_cache_step_by_step_equals_one_pass(params, tokens):
    whole, none = APPLY(params, tokens)
    assert none is None
    cache = MODEL.init_cache(BATCH, LENGTH + 5)
    # what an earlier sequence left behind must not be seen
    cache = jax.tree.map(lambda x: x + 7.0, cache)
    states = []
    for start, width in ((0, 5), (5, 1), (6, 4), (10, 2)):
        positions = jnp.broadcast_to(jnp.arange(start, start + width), (BATCH, width))
        hidden, cache = APPLY(params, tokens[:, start : start + width], positions=positions, cache=cache)
        states.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(states, 1), whole, atol=2e-5)


def test_padding_is_not_written_to_the_cache(params, tokens):
    cache = MODEL.init_cache(BATCH, LENGTH)
    _, written = APPLY(params, tokens, positions=jnp.full((BATCH, LENGTH), -1), cache=cache)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(written), strict=True))


def test_packed_segments_do_not_leak(params, tokens):
    """Perturbing one segment leaves the other's states unchanged bit for bit, and they equal those of the segment
    alone."""
    segments = jnp.where(jnp.arange(LENGTH) < 5, 0, 1)[None]
    positions = jnp.concatenate([jnp.arange(5), jnp.arange(LENGTH - 5)])[None]
    apply = jax.jit(lambda row: MODEL.apply(params, row, positions=positions, segment_ids=segments)[0])
    packed = apply(tokens[:1])
    other_first = apply(tokens[:1].at[:, :5].add(1))
    assert np.array_equal(packed[:, 5:], other_first[:, 5:])
    other_second = apply(tokens[:1].at[:, 5:].add(-1))
    assert np.array_equal(packed[:, :5], other_second[:, :5])
    alone, _ = APPLY(params, tokens[:1, 5:])
    np.testing.assert_allclose(packed[:, 5:], alone, atol=2e-5)


def test_is_causal(params, tokens):
    before, _ = APPLY(params, tokens)
    after, _ = APPLY(params, tokens.at[:, 7].add(1))
    np.testing.assert_allclose(after[:, :7], before[:, :7], atol=1e-6)
    assert np.all(np.abs(after[:, 7:] - before[:, 7:]).max(-1) > 1e-4)


def test_only_relative_positions_matter(params, tokens):
    near, _ = APPLY(params, tokens)
    far, _ = APPLY(params, tokens, positions=jnp.broadcast_to(jnp.arange(LENGTH) + 100, tokens.shape))
    np.testing.assert_allclose(near, far, atol=1e-4)  # angles of 100 radians carry an error of 1e-5


def test_previous_token_head_reads_the_token_before():
    """With every other head silenced, a state depends on its own token and the one before, and on no other."""
    config = DecoderConfig(
        vocab_size=50, width=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=64, ffn_width=48,
        rope_theta=100.0, attention_bias=True,
    )  # fmt: skip
    model = make_decoder(config)
    params = previous_token_head(jax.jit(model.init)(jax.random.key(0)), config, kv_head=1)
    layer = params["layers"]["0"]
    out = layer["attention"]["out"]["kernel"]
    layer["attention"]["out"]["kernel"] = jnp.zeros_like(out).at[128:192].set(out[128:192])  # head 2, the first of two
    row = jax.random.randint(jax.random.key(1), (1, LENGTH), 0, config.vocab_size)
    apply = jax.jit(model.apply)

    def change(position):
        """How far each state moves when the token at `position` changes."""
        moved, _ = apply(params, row.at[0, position].add(1) % 50)
        return jnp.abs(moved - apply(params, row)[0])[0].max(-1)

    moved = change(5)
    # the score beside the peak is 8 nats lower, so e^-8 = 3e-4 of the weight goes there
    assert moved[6] > 0.05 and moved[7:].max() < 0.01 * moved[6] and moved[:5].max() == 0
    with pytest.raises(ValueError, match="attention_bias=True"):
        previous_token_head(params, CONFIG)
    with pytest.raises(ValueError, match="leave qk_norm and layer_ropes None"):
        previous_token_head(params, dataclasses.replace(config, qk_norm="head"))


def test_untied_head_and_count(params):
    untied = make_decoder(
        DecoderConfig(vocab_size=50, width=32, num_heads=4, num_kv_heads=4, ffn_width=48, tie_embeddings=False)
    )
    own = jax.jit(untied.init)(jax.random.key(0))
    assert untied.head(own).shape == (50, 32) and untied.head(own) is not own["embedding"]
    attention, ffn = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 48
    assert count_params(params) == 50 * 32 + 2 * (attention + ffn + 2 * 32) + 32


def test_parameters_round_trip(params, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_params(params, path, metadata={"command": "test"})
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    loaded = load_params(path, shapes)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(loaded), strict=True))
    wider = make_decoder(DecoderConfig(vocab_size=51, width=32, num_heads=4, num_kv_heads=2, ffn_width=48))
    with pytest.raises(ValueError, match=r"embedding has shape .*50, 32.* wants .*51, 32"):
        load_params(path, jax.eval_shape(wider.init, jax.random.key(0)))
    deeper = make_decoder(
        DecoderConfig(vocab_size=50, width=32, num_layers=3, num_heads=4, num_kv_heads=2, ffn_width=48)
    )
    with pytest.raises(ValueError, match=r"lacks .*layers\.2"):
        load_params(path, jax.eval_shape(deeper.init, jax.random.key(0)))
    with pytest.raises(ValueError, match="do not fit the module"):
        MODEL.apply({"embedding": params["embedding"]}, jnp.zeros((1, 2), jnp.int32))


def test_bad_sizes():
    with pytest.raises(ValueError, match="num_heads=4 must be a multiple of num_kv_heads=3"):
        DecoderConfig(50, num_kv_heads=3)
    with pytest.raises(ValueError, match="width=30 must be a multiple of num_heads=4"):
        DecoderConfig(50, width=30)
    with pytest.raises(ValueError, match="head_dim=3 must be even"):
        DecoderConfig(50, head_dim=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu"}, "activation='relu' must be one of .*silu"),
        ({"qk_norm": "heads"}, "qk_norm='heads' must be one of"),
        ({"logit_softcap": 0.0}, "logit_softcap=0.0 must be positive; for none, leave it None"),
        ({"num_experts": 4, "experts_per_token": 5}, "experts_per_token=5 must lie between 1 and num_experts=4"),
        ({"layer_windows": (4,)}, "layer_windows has 1 entries, but there are num_layers=2"),
        ({"layer_windows": (4, 0)}, "a window must be at least 1"),
        ({"dense_layers": (2,)}, "must name layers below num_layers=2"),
        ({"layer_ropes": (Rope(rotary_dim=7), None)}, "rotary_dim=7 must be even, positive and at most head_dim=32"),
        ({"layer_ropes": (None, Rope(divisors=(1.0,)))}, "divisors has 1 numbers, but 32 dimensions turn in 16 pairs"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(50, **options)


def test_long_context_takes_the_other_divisors():
    ropes = (Rope(divisors=(1.0,) * 16, long_divisors=(4.0,) * 16), Rope(theta=5.0))
    config = DecoderConfig(50, layer_ropes=ropes)
    assert config.rope(0) == ropes[0] and config.rope(1) == ropes[1]
    config = dataclasses.replace(config, long_context=True)
    assert config.rope(0).divisors == (4.0,) * 16 and config.rope(1) == ropes[1]


def test_induction_head_looks_at_what_followed_its_token():
    """The state behind a token's second coming depends on what followed the first, and hardly on anything else."""
    config = DecoderConfig(
        vocab_size=50, width=64, num_layers=2, num_heads=2, num_kv_heads=2, ffn_width=64, rope_theta=1e6,
        attention_bias=True,
    )  # fmt: skip
    model = make_decoder(config)
    params = induction_head(jax.jit(model.init)(jax.random.key(0)), config, key=jax.random.key(1))
    second = params["layers"]["1"]["attention"]["out"]
    second["kernel"] = second["kernel"].at[32:].set(0)  # the other head
    row = jax.random.permutation(jax.random.key(2), 40)[None]
    row = row.at[0, 39].set(row[0, 10])
    apply = jax.jit(model.apply)
    hidden = apply(params, row)[0][0, 39]
    moved = {place: jnp.abs(apply(params, row.at[0, place].set(45))[0][0, 39] - hidden).max() for place in (5, 11, 20)}
    assert moved[11] > 0.1 and max(moved[5], moved[20]) < 0.2 * moved[11]  # matches by chance get the rest
    with pytest.raises(ValueError, match="wants 2 layers"):
        induction_head(params, dataclasses.replace(config, num_layers=1), key=jax.random.key(1))
