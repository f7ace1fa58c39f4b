"""Decoder families against logits of transformers (`tests/parity/make_golden_decoders.py`), without torch."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from jaxrl_llm.models import count_params
from jaxrl_llm.models.families import FAMILIES
from jaxrl_llm.models.hub import load
from jaxrl_llm.models.moe import load_balancing_loss
from jaxrl_llm.ops import token_logprobs

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.name.removeprefix("decoder_") for path in GOLDEN.glob("decoder_*"))
# float32 sums in another order, on logits of size 1; the same bound for the gradient of a mean log-prob
TOLERANCE = 2e-5


@functools.cache
def golden(name):
    """A family's model, its parameters, its inputs and logits, and the jitted function from rows to logits."""
    folder = GOLDEN / f"decoder_{name}"
    model = load(folder)
    expected = load_file(folder / "expected.safetensors")
    logits = jax.jit(
        lambda params, tokens, positions, segments: model.logits(
            params, tokens, positions=positions, segment_ids=segments
        )
    )
    return model, model.params, expected, logits


def packed_rows(expected):
    """Rows of two segments cut out of the padded ones: tokens, positions, segment ids, and the logits they should
    have."""
    tokens, logits = expected["tokens"], expected["logits"]
    pieces = [  # (row, first token, tokens): the row's text up to there is all the segment has
        [(1, 5, 11), (0, 0, 5)],
        [(2, 0, 12), (0, 0, 4)],
        [(0, 0, 8), (1, 5, 8)],
    ]
    rows = []
    for row in pieces:
        places = [(index, slice(start, start + length)) for index, start, length in row]
        rows.append(
            (
                np.concatenate([tokens[index, place] for index, place in places]),
                np.concatenate([np.arange(length) for _, _, length in row]),
                np.concatenate([np.full(length, segment) for segment, (_, _, length) in enumerate(row)]),
                np.concatenate([logits[index, place] for index, place in places]),
            )
        )
    return [jnp.asarray(np.stack(column)) for column in zip(*rows, strict=True)]


def test_there_is_a_checkpoint_of_every_family():
    found = {json.loads((GOLDEN / f"decoder_{name}" / "config.json").read_text())["architectures"][0] for name in NAMES}
    assert found == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_padded_rows(name):
    """Padding on either side is a segment of its own."""
    _, params, expected, logits = golden(name)
    mask = expected["mask"]
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    found = logits(params, expected["tokens"], positions, np.where(mask, 0, -1))
    np.testing.assert_allclose(np.asarray(found)[mask], expected["logits"][mask], atol=TOLERANCE)
    assert expected["logits"][mask].std() > 0.5  # nothing vanishes in the tolerance


@pytest.mark.parametrize("name", NAMES)
def test_packed_rows(name):
    """Two texts in a row have the logits they have alone, and neither's change reaches the other by a single bit."""
    _, params, expected, logits = golden(name)
    tokens, positions, segments, wanted = packed_rows(expected)
    found = logits(params, tokens, positions, segments)
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)
    for segment in (0, 1):
        other = logits(params, jnp.where(segments == segment, (tokens + 1) % 80, tokens), positions, segments)
        assert np.array_equal(other[segments != segment], found[segments != segment])
        assert np.abs(other - found)[segments == segment].max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_cache_step_by_step(name):
    """Prompts of different lengths in two goes of up to 4 tokens, then token by token until the texts end."""
    model, params, expected, _ = golden(name)
    texts = [expected["tokens"][i][expected["mask"][i]] for i in range(3)]
    wanted = [expected["logits"][i][expected["mask"][i]] for i in range(3)]
    ends = np.asarray([len(text) for text in texts])
    cache = jax.tree.map(lambda x: x + 5.0, model.init_cache(3, 18))  # left behind by other sequences: never seen
    step = jax.jit(lambda *args: model.apply(args[0], args[1], positions=args[2], cache=args[3]))
    fed = np.zeros(3, int)
    for width in ([4, 2, 3], [4, 4, 1], *[[1, 1, 1]] * 13):
        positions = fed[:, None] + np.arange(4)
        fed = np.minimum(fed + width, ends)
        positions = np.where(positions < fed[:, None], positions, -1)
        tokens = np.stack([text[np.maximum(row, 0)] for text, row in zip(texts, positions, strict=True)])
        hidden, cache = step(params, tokens, positions, cache)
        found = np.asarray(hidden) @ np.asarray(model.head(params)).T
        if cap := model.config.logit_softcap:
            found = cap * np.tanh(found / cap)
        for row, place in enumerate(positions):
            np.testing.assert_allclose(found[row][place >= 0], wanted[row][place[place >= 0]], atol=TOLERANCE)
    assert np.array_equal(fed, ends)


# two that use most options between them; the others by hand, as compiling a gradient takes seconds
@pytest.mark.parametrize(
    "name", [name if name in ("gemma3", "qwen3_moe") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_gradient_of_packed_rows(name):
    """The gradient of a mean over packed texts is that over the texts in rows of their own."""
    model, params, expected, _ = golden(name)

    def loss(params, tokens, positions, segments):
        hidden, _ = model.apply(params, tokens[:, :-1], positions=positions[:, :-1], segment_ids=segments[:, :-1])
        mask = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0)
        logprobs, _ = token_logprobs(hidden, model.head(params), tokens[:, 1:], mask=mask)
        return jnp.sum(logprobs) / 14

    gradient = jax.jit(jax.grad(loss))
    texts = np.stack([expected["tokens"][1, 5:13], expected["tokens"][0, :8]])
    nothing, steps = np.zeros((2, 8), np.int32), np.tile(np.arange(8), (2, 1))
    in_own_rows = gradient(
        params, np.hstack([texts, nothing]), np.hstack([steps, nothing]), np.hstack([nothing, nothing - 1])
    )
    one_row = (texts.reshape(1, 16), steps.reshape(1, 16), np.repeat([[0, 1]], 8, axis=1))
    padding = (np.zeros((1, 16), np.int32), np.zeros((1, 16), np.int32), np.full((1, 16), -1))
    packed = gradient(params, *(np.vstack(pair) for pair in zip(one_row, padding, strict=True)))
    for alone, found in zip(jax.tree.leaves(in_own_rows), jax.tree.leaves(packed), strict=True):
        np.testing.assert_allclose(found, alone, atol=TOLERANCE * max(1.0, float(jnp.abs(alone).max())))
        assert np.any(np.asarray(alone) != 0)


def test_load_balancing_loss():
    """As many experts as a token has when all are alike, all experts' number when one takes everything; masked tokens
    count for nothing."""
    model, params, expected, _ = golden("qwen3_moe")
    hidden, _, logits = jax.jit(functools.partial(model.apply, router_logits=True))(params, expected["tokens"])
    assert hidden.shape == (3, 16, 32) and logits.shape == (2, 3, 16, 6)  # two of three layers have experts
    mask = np.broadcast_to(expected["mask"], (2, 3, 16))
    found = load_balancing_loss(logits, experts_per_token=2, mask=mask)
    rows = np.asarray(logits, np.float64)[mask]
    probabilities = np.exp(rows) / np.exp(rows).sum(-1, keepdims=True)
    sent = np.bincount(np.argsort(-rows)[:, :2].ravel(), minlength=6) / len(rows)
    np.testing.assert_allclose(found, 6 * np.sum(sent * probabilities.mean(0)), rtol=1e-6)
    one_takes_all = jnp.zeros((5, 4)).at[:, 2].set(100.0)
    np.testing.assert_allclose(load_balancing_loss(one_takes_all, experts_per_token=1), 4.0)
    balanced = 100.0 * jnp.eye(4)
    np.testing.assert_allclose(load_balancing_loss(balanced, experts_per_token=1), 1.0)
    with pytest.raises(ValueError, match=r"mask must have shape \(5,\)"):
        load_balancing_loss(one_takes_all, experts_per_token=1, mask=jnp.ones((4,), bool))
    with pytest.raises(ValueError, match="experts_per_token=5 must lie between 1 and the 4 experts"):
        load_balancing_loss(one_takes_all, experts_per_token=5)
    dense, dense_params, *_ = golden("qwen3")
    with pytest.raises(ValueError, match="this decoder has no experts"):
        dense.apply(dense_params, expected["tokens"], router_logits=True)


# What a config.json of these models says about sizes, typed in from memory, and the parameters their authors publish.
QWEN25_7B = dict(
    architectures=["Qwen2ForCausalLM"], vocab_size=152064, hidden_size=3584, intermediate_size=18944,
    num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32768,
    rope_theta=1e6, sliding_window=131072, use_sliding_window=False, max_window_layers=28, tie_word_embeddings=False,
)  # fmt: skip
QWEN3_30B_A3B = dict(
    architectures=["Qwen3MoeForCausalLM"], vocab_size=151936, hidden_size=2048, intermediate_size=6144,
    num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128, moe_intermediate_size=768,
    num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
    rope_theta=1e6, rope_scaling=None, sliding_window=None, tie_word_embeddings=False,
)  # fmt: skip
MIXTRAL_8X7B = dict(
    architectures=["MixtralForCausalLM"], vocab_size=32000, hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, rope_theta=1e6,
    sliding_window=None, tie_word_embeddings=False,
)  # fmt: skip
LLAMA_32_1B = dict(
    architectures=["LlamaForCausalLM"], vocab_size=128256, hidden_size=2048, intermediate_size=8192,
    num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=131072,
    rope_theta=500000.0, tie_word_embeddings=True, rope_scaling=dict(
        factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
        rope_type="llama3",
    ),
)  # fmt: skip
GEMMA2_2B = dict(
    architectures=["Gemma2ForCausalLM"], vocab_size=256000, hidden_size=2304, intermediate_size=9216,
    num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, head_dim=256, sliding_window=4096,
)  # fmt: skip
GEMMA3_1B = dict(
    architectures=["Gemma3ForCausalLM"], vocab_size=262144, hidden_size=1152, intermediate_size=6912,
    num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512,
    sliding_window_pattern=6, rope_theta=1_000_000, rope_local_base_freq=10_000,
)  # fmt: skip
PHI3_MINI = dict(
    architectures=["Phi3ForCausalLM"], vocab_size=32064, hidden_size=3072, intermediate_size=8192,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, sliding_window=2047,
)  # fmt: skip
PUBLISHED = {
    "Qwen2.5-7B": (QWEN25_7B, 7_615_616_512),
    "Qwen3-30B-A3B": (QWEN3_30B_A3B, 30_532_122_624),
    "Mixtral-8x7B": (MIXTRAL_8X7B, 46_702_792_704),
    "Llama-3.2-1B": (LLAMA_32_1B, 1_235_814_400),
    "gemma-2-2b": (GEMMA2_2B, 2_614_341_888),
    "gemma-3-1b": (GEMMA3_1B, 999_885_952),
    "Phi-3-mini": (PHI3_MINI, 3_821_079_552),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_build_abstractly(name):
    """No array is made; every parameter has a place in the checkpoint and the other way around, and there are as many
    as published."""
    source, count = PUBLISHED[name]
    family = FAMILIES[source["architectures"][0]]
    config = family.config_from(source)
    shapes = jax.eval_shape(family.make_model(config).init, jax.random.key(0))
    assert count_params(shapes) == count
    assert set(flatten_dict(shapes, sep=".")) == set(family.stored(config))


def test_old_and_new_files_say_the_same():
    """Rope settings as transformers 4 and 5 write them, and the patterns that layer types replaced."""
    new = {key: value for key, value in LLAMA_32_1B.items() if not key.startswith("rope_")}
    new["rope_parameters"] = {**LLAMA_32_1B["rope_scaling"], "rope_theta": 500000.0}
    llama = FAMILIES["LlamaForCausalLM"].config_from
    assert llama(new) == llama(LLAMA_32_1B)
    divisors = llama(LLAMA_32_1B).layer_ropes[0].divisors
    assert divisors[0] == 1 and divisors[-1] == pytest.approx(32) and sorted(divisors) == list(divisors)
    gemma3 = FAMILIES["Gemma3ForCausalLM"].config_from
    old = GEMMA3_1B | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000},
    }
    types = [("full" if layer % 6 == 5 else "sliding") + "_attention" for layer in range(26)]
    config = gemma3(GEMMA3_1B | {"rope_parameters": parameters, "layer_types": types})
    assert config == gemma3(old)
    assert config.layer_windows[4:7] == (512, None, 512)
    assert config.rope(5).divisors == (8.0,) * 128 and config.rope(4).theta == 10_000 and not config.rope(4).divisors


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("LlamaForCausalLM", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' .* 'llama3'"),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "linear"}}, "'linear' needs 'factor'"),
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs 'original_max"),
        ("Qwen2ForCausalLM", {"hidden_act": "relu2"}, "activation 'relu2' is not supported; supported are"),
        ("Qwen2ForCausalLM", {"hidden_size": None}, r"lacks \['hidden_size', "),
        ("Gemma2ForCausalLM", {"layer_types": ["chunked_attention"] * 2}, r"\['chunked_attention'\] are not supported"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("MistralForCausalLM", {"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "su", "short_factor": [1.0]}}, "'longrope' needs 'long_factor'"),
        ("Qwen3ForCausalLM", {"num_key_value_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
    ],
)
def test_what_is_not_supported_is_named(architecture, change, message):
    sizes = dict(
        vocab_size=80, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, **change
    ) if "hidden_size" not in change else change | dict(vocab_size=80)  # fmt: skip
    with pytest.raises(ValueError, match=message):
        FAMILIES[architecture].config_from(sizes)


def test_config_to_is_the_inverse_or_refuses():
    config = FAMILIES["Qwen2ForCausalLM"].config_from(QWEN25_7B)
    for architecture in ("Qwen2ForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM"):
        family = FAMILIES[architecture]
        fitting = config
        if architecture != "Qwen2ForCausalLM":
            qk_norm = "head" if architecture == "Qwen3ForCausalLM" else None
            fitting = dataclasses.replace(config, attention_bias=False, qk_norm=qk_norm)
        assert family.config_from(family.config_to(fitting)) == fitting
    with pytest.raises(ValueError, match="LlamaForCausalLM has no place for this decoder's attention_out_bias"):
        FAMILIES["LlamaForCausalLM"].config_to(config)  # biases of queries, keys and values alone
