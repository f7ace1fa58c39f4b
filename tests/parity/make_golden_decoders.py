"""Small random checkpoints of all decoder families with the logits that transformers computes from them.

    python -m tests.parity.make_golden_decoders

writes `tests/models/golden/decoder_<name>/`: config.json and model.safetensors as `save_pretrained` writes them, and
expected.safetensors with `tokens` and `mask` [3, 16] (a whole row, one padded on the left, one padded on the right) and
`logits` [3, 16, V]. Needs torch and transformers; the tests that read the folders do not.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parents[1] / "models" / "golden"
SIZES = dict(
    vocab_size=80, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64,
    rope_theta=10_000.0,
)  # fmt: skip
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=1_000.0, beta_fast=4.0)
LONGROPE = dict(
    rope_type="longrope", short_factor=[1.0, 1.1, 1.3, 2.0], long_factor=[1.0, 1.5, 4.0, 9.0], rope_theta=10_000.0,
    partial_rotary_factor=0.5,
)  # fmt: skip
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}

# Windows are shorter than the sequences, caps low enough to bend, and no option has the value that leaves it unseen.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", dict(rope_parameters=LLAMA3, max_position_embeddings=256)),
    "smollm": ("Llama", dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "qwen2": (
        "Qwen2",
        dict(rope_parameters=YARN, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3_moe": (
        "Qwen3Moe",
        dict(
            num_hidden_layers=3,
            head_dim=8,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=12,
            norm_topk_prob=False,
            mlp_only_layers=[1],
        ),
    ),  # fmt: skip
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=24)),
    "mistral": ("Mistral", dict(sliding_window=5, num_attention_heads=8)),
    "gemma2": (
        "Gemma2",
        dict(
            head_dim=8,
            sliding_window=5,
            query_pre_attn_scalar=20,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=2.0,
        ),
    ),  # fmt: skip
    "gemma3": (
        "Gemma3Text",
        dict(
            num_hidden_layers=3,
            head_dim=8,
            sliding_window=5,
            query_pre_attn_scalar=20,
            rope_parameters=GEMMA3_ROPES,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
    ),  # fmt: skip
    "smollm3": ("SmolLM3", dict(num_hidden_layers=3, no_rope_layer_interval=2)),
    "phi3": (
        "Phi3",
        dict(
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=6,
            rope_parameters=LONGROPE,
            original_max_position_embeddings=32,
        ),
    ),  # fmt: skip
    "olmo2": ("Olmo2", dict()),
}


def random_model(name: str, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """A model of a family of `CONFIGS` with every parameter random, norms too, so that a wrong one shows."""
    kind, options = CONFIGS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm, is_router = "norm" in parameter_name, ".mlp.gate.weight" in parameter_name
            draw = torch.randn(parameter.shape, generator=generator)
            center = 1.0 if is_norm and not kind.startswith("Gemma") else 0.0
            parameter.copy_(center + (0.3 if is_norm else 0.8 if is_router else 0.2) * draw)
    return model


def padded_inputs(vocab_size: int, seed: int, length: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask [3, length]: a whole row, one padded on the left by 5 and one padded on the right by 4."""
    tokens = torch.randint(3, vocab_size, (3, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[1, :5] = False
    mask[2, -4:] = False
    return torch.where(mask, tokens, 0), mask


def logits_of(model: transformers.PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What transformers makes of padded rows whose positions start at 0 with the first token."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask.long(), position_ids=positions, use_cache=False).logits


def write(model: transformers.PreTrainedModel, folder: Path) -> None:
    """config.json and model.safetensors, as transformers writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes((Path(scratch) / name).read_bytes())


def main() -> None:
    for seed, name in enumerate(CONFIGS):
        model = random_model(name, seed)
        tokens, mask = padded_inputs(SIZES["vocab_size"], seed)
        folder = GOLDEN / f"decoder_{name}"
        write(model, folder)
        logits = logits_of(model, tokens, mask)
        save_file({"tokens": tokens.int(), "mask": mask, "logits": logits}, folder / "expected.safetensors")
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{name:10} {model.num_parameters():8} parameters {size / 1e3:6.0f} kB, logits {logits[mask].std():.2f}")


if __name__ == "__main__":
    main()
