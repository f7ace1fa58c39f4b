"""A LoRA adapter as PEFT writes it, with the base model and the logits that PEFT computes from both.

    python -m tests.parity.make_golden_adapters

writes `tests/models/golden/lora/`: config.json and model.safetensors of a small random Qwen2, `adapter/` with the two
files of an adapter, and expected.safetensors with `tokens` [2, 9] and `logits` [2, 9, V]. Needs torch, transformers and
peft; the tests that read the folder do not.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file

from tests.parity.make_golden_decoders import random_model

GOLDEN = Path(__file__).resolve().parents[1] / "models" / "golden" / "lora"


def random_adapter(model: torch.nn.Module, config: peft.PeftConfig, seed: int) -> peft.PeftModel:
    """The model with an adapter whose every number is random: fresh ones start at values that change nothing."""
    adapted = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted


def main() -> None:
    """Writes the folder anew."""
    model = random_model("qwen2", seed=3)
    shutil.rmtree(GOLDEN, ignore_errors=True)
    model.save_pretrained(GOLDEN)
    (GOLDEN / "generation_config.json").unlink(missing_ok=True)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "v_proj", "gate_proj"]
    )
    adapted = random_adapter(model, config, seed=4)
    tokens = torch.randint(3, 80, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = adapted(tokens).logits
    adapted.save_pretrained(GOLDEN / "adapter")
    (GOLDEN / "adapter" / "README.md").unlink(missing_ok=True)
    save_file({"tokens": tokens.int(), "logits": logits.contiguous()}, GOLDEN / "expected.safetensors")


if __name__ == "__main__":
    main()
