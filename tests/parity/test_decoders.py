"""Decoder families against transformers on fresh random checkpoints: other sizes, weights and inputs on every run.

PARITY_SEED=<number> in the environment repeats a run; a failure names the number.
"""

import dataclasses
import os

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="parity is checked against PyTorch: make parity installs it")
pytest.importorskip("transformers", reason="parity is checked against transformers: make parity installs it")

import torch

from jaxrl_llm.models import make_decoder
from jaxrl_llm.models.hub import load
from jaxrl_llm.models.moe import load_balancing_loss
from tests.parity.make_golden_decoders import CONFIGS, LONGROPE, SIZES, logits_of, padded_inputs, random_model, write
from tests.parity.rounding import exact

SEED = int(os.environ.get("PARITY_SEED", int.from_bytes(os.urandom(3), "little")))


def compare(model, name, folder, seed, length=16, **config_changes):
    """The largest difference of logits between a transformers model and ours that is read from its checkpoint."""
    write(model, folder)
    ours = load(folder)
    if config_changes:
        ours = dataclasses.replace(make_decoder(dataclasses.replace(ours.config, **config_changes)), params=ours.params)
    tokens, mask = padded_inputs(model.config.vocab_size, seed, length)

    def each_row(model):  # padding left away: in float64 transformers' mask overflows to NaN on it
        rows = zip(tokens, mask, strict=True)
        return np.concatenate([logits_of(model, row[real][None], real[real][None])[0].numpy() for row, real in rows])

    wanted, tolerance = exact(model, each_row)
    real = mask.numpy()
    positions = np.maximum(real.cumsum(-1) - 1, 0)
    found = jax.jit(ours.logits)(ours.params, tokens.numpy(), positions=positions, segment_ids=np.where(real, 0, -1))
    message = f"{name}, PARITY_SEED={SEED}"
    np.testing.assert_allclose(np.asarray(found)[real], wanted, rtol=0, atol=tolerance, err_msg=message)


@pytest.mark.parametrize("name", CONFIGS)
def test_fresh_checkpoint(name, tmp_path):
    rng = np.random.default_rng([SEED, *name.encode()])
    changes = dict(
        vocab_size=int(rng.integers(60, 120)),
        intermediate_size=int(rng.integers(3, 15)) * 4,  # torch's grouped product wants rows of 16 bytes
        rms_norm_eps=float(10.0 ** rng.integers(-7, -4)),
    )
    if name != "gemma3":  # it names the type of each layer
        changes["num_hidden_layers"] = int(rng.integers(2, 5))
    if SIZES.get("num_attention_heads") == CONFIGS[name][1].get("num_attention_heads", 4):
        changes["num_key_value_heads"] = int(rng.choice([1, 2, 4]))
    if "sliding_window" in CONFIGS[name][1]:
        changes["sliding_window"] = int(rng.integers(2, 12))
    seed = int(rng.integers(1 << 30))
    compare(random_model(name, seed, **changes), name, tmp_path, seed)


def test_longrope_beyond_the_first_context(tmp_path):
    """Transformers takes the long factors once a position lies beyond 8; ours when the config says so."""
    rope = LONGROPE | {"original_max_position_embeddings": 8}
    model = random_model("phi3", SEED, rope_parameters=rope, original_max_position_embeddings=8)
    compare(model, "phi3", tmp_path, SEED, long_context=True)


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="linear", factor=3.0, rope_theta=500.0),
        dict(
            rope_type="yarn", factor=8.0, rope_theta=1e4, original_max_position_embeddings=32, mscale=0.7,
            mscale_all_dim=1.3, truncate=False,
        ),
        dict(
            rope_type="llama3", factor=8.0, rope_theta=100.0, original_max_position_embeddings=128,
            low_freq_factor=2.0, high_freq_factor=8.0,
        ),
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rope_types(rope, tmp_path):
    model = random_model("llama", SEED, rope_parameters=rope, hidden_size=64, max_position_embeddings=512)
    compare(model, rope["rope_type"], tmp_path, SEED, length=40)


def test_load_balancing_loss():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(3, 10, 6, generator=torch.Generator().manual_seed(SEED))
    wanted = load_balancing_loss_func(tuple(logits), num_experts=6, top_k=2)
    np.testing.assert_allclose(load_balancing_loss(logits.numpy(), experts_per_token=2), wanted, rtol=1e-5)
