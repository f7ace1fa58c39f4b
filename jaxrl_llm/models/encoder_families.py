"""Encoders and T5 as Hugging Face stores them: from their config.json to ours, and where each parameter lies.

A checkpoint of a masked language model (`BertForMaskedLM` and its like, which is what most encoders are published as)
gives its encoder; the prediction head and BERT's pooler are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.models.checkpoint import Family, Stored
from jaxrl_llm.models.encoder import EncoderConfig, make_encoder
from jaxrl_llm.models.seq2seq import Seq2SeqConfig, make_seq2seq

# Names in config.json, and ours. `gelu_new`, `gelu_fast` and `gelu_pytorch_tanh` are one formula.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_WRITTEN_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu"}


def _activation(name: str, key: str) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f"config.json: {key} {name!r} is not supported; supported are {sorted(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _linear(ours: str, theirs: str, bias: bool, rows: tuple[int, int] | None = None) -> dict[str, Stored]:
    stored = {f"{ours}.kernel": Stored((f"{theirs}.weight",), transpose=True, rows=rows)}
    return stored | ({f"{ours}.bias": Stored((f"{theirs}.bias",), rows=rows)} if bias else {})


def _norm(ours: str, theirs: str, bias: bool) -> dict[str, Stored]:
    stored = {f"{ours}.scale": Stored((f"{theirs}.weight",))}
    return stored | ({f"{ours}.bias": Stored((f"{theirs}.bias",))} if bias else {})


# --- BERT and RoBERTa ---


def _bert_config(hf: dict[str, Any]) -> EncoderConfig:
    if (kind := hf.get("position_embedding_type") or "absolute") != "absolute":
        raise ValueError(f"config.json: position_embedding_type {kind!r} is not supported; supported is 'absolute'")
    if hf.get("is_decoder"):
        raise ValueError("config.json: is_decoder=true (a causal BERT) is not supported; encoders are")
    return EncoderConfig(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        ffn_width=hf["intermediate_size"],
        num_positions=hf["max_position_embeddings"],
        num_token_types=hf.get("type_vocab_size", 2),
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        activation=_activation(hf.get("hidden_act", "gelu"), "hidden_act"),
    )


def _roberta_config(hf: dict[str, Any]) -> EncoderConfig:
    padding_id = hf.get("pad_token_id", 1)
    if padding_id is None:
        raise ValueError("config.json: pad_token_id is null; positions of a RoBERTa start behind it: give its number")
    return dataclasses.replace(_bert_config(hf), position_offset=padding_id + 1)


def _bert_stored(config: EncoderConfig) -> Mapping[str, Stored]:
    stored = {
        "embedding": Stored(("embeddings.word_embeddings.weight",)),
        "position_embedding": Stored(("embeddings.position_embeddings.weight",)),
        "token_type_embedding": Stored(("embeddings.token_type_embeddings.weight",)),
    } | _norm("embedding_norm", "embeddings.LayerNorm", True)
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            stored |= _linear(f"{ours}.attention.{name}", f"{theirs}.attention.self.{name}", True)
        stored |= _linear(f"{ours}.attention.out", f"{theirs}.attention.output.dense", True)
        stored |= _norm(f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm", True)
        stored |= _linear(f"{ours}.ffn.up", f"{theirs}.intermediate.dense", True)
        stored |= _linear(f"{ours}.ffn.down", f"{theirs}.output.dense", True)
        stored |= _norm(f"{ours}.ffn_norm", f"{theirs}.output.LayerNorm", True)
    return stored


def _bert_config_to(config: EncoderConfig) -> dict[str, Any]:
    roberta = config.position_offset > 0
    return {
        "architectures": ["RobertaModel" if roberta else "BertModel"],
        "model_type": "roberta" if roberta else "bert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_width,
        "max_position_embeddings": config.num_positions,
        "type_vocab_size": config.num_token_types,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": _WRITTEN_ACTIVATIONS[config.activation],
        "pad_token_id": max(config.position_offset - 1, 0),
    }


# --- ModernBERT ---


def _modernbert_config(hf: dict[str, Any]) -> EncoderConfig:
    depth = hf["num_hidden_layers"]
    every = hf.get("global_attn_every_n_layers", 3)
    kinds = hf.get("layer_types") or ["sliding_attention" if i % every else "full_attention" for i in range(depth)]
    # older files have two numbers, newer ones a dict for each kind of layer
    thetas = {
        "full_attention": hf.get("global_rope_theta", 160_000.0),
        "sliding_attention": hf.get("local_rope_theta", 10_000.0),
    }
    scaling = [hf.get("rope_scaling") or {}]
    for kind, rope in (hf.get("rope_parameters") or {}).items():
        if rope:
            thetas[kind] = rope.get("rope_theta", thetas[kind])
            scaling.append(rope)
    for rope in scaling:
        if (rope_type := rope.get("rope_type", rope.get("type", "default"))) != "default":
            raise ValueError(f"config.json: rope type {rope_type!r} is not supported for ModernBERT; supported is "
                             "'default'")  # fmt: skip
    window = hf.get("local_attention", 128) // 2  # to either side
    return EncoderConfig(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        num_layers=depth,
        num_heads=hf["num_attention_heads"],
        ffn_width=hf["intermediate_size"],
        num_positions=hf.get("max_position_embeddings", 8192),
        num_token_types=0,
        norm_eps=hf.get("norm_eps", 1e-5),
        activation=_activation(hf.get("hidden_activation", "gelu"), "hidden_activation"),
        pre_norm=True,
        gated=True,
        attention_bias=hf.get("attention_bias", False),
        ffn_bias=hf.get("mlp_bias", False),
        norm_bias=hf.get("norm_bias", False),
        rope_thetas=tuple(thetas[kind] for kind in kinds),
        layer_windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
    )


def _modernbert_stored(config: EncoderConfig) -> Mapping[str, Stored]:
    width, ffn_width, norm_bias = config.width, config.ffn_width, config.norm_bias
    stored = {"embedding": Stored(("embeddings.tok_embeddings.weight",))}
    stored |= _norm("embedding_norm", "embeddings.norm", norm_bias) | _norm("norm", "final_norm", norm_bias)
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        for part, name in enumerate(("query", "key", "value")):
            rows = (part * width, (part + 1) * width)
            stored |= _linear(f"{layer}.attention.{name}", f"{layer}.attn.Wqkv", config.attention_bias, rows)
        stored |= _linear(f"{layer}.attention.out", f"{layer}.attn.Wo", config.attention_bias)
        stored |= _linear(f"{layer}.ffn.gate", f"{layer}.mlp.Wi", config.ffn_bias, (0, ffn_width))
        stored |= _linear(f"{layer}.ffn.up", f"{layer}.mlp.Wi", config.ffn_bias, (ffn_width, 2 * ffn_width))
        stored |= _linear(f"{layer}.ffn.down", f"{layer}.mlp.Wo", config.ffn_bias)
        if i:
            stored |= _norm(f"{layer}.attention_norm", f"{layer}.attn_norm", norm_bias)
        stored |= _norm(f"{layer}.ffn_norm", f"{layer}.mlp_norm", norm_bias)
    return stored


def _modernbert_config_to(config: EncoderConfig) -> dict[str, Any]:
    assert config.rope_thetas is not None  # what a config of this family has
    windows = config.layer_windows or (None,) * config.num_layers
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    thetas = dict(zip(kinds, config.rope_thetas, strict=True))
    widths = [window for window in windows if window is not None]
    return {
        "architectures": ["ModernBertModel"],
        "model_type": "modernbert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_width,
        "max_position_embeddings": config.num_positions,
        "norm_eps": config.norm_eps,
        "hidden_activation": _WRITTEN_ACTIVATIONS[config.activation],
        "attention_bias": config.attention_bias,
        "mlp_bias": config.ffn_bias,
        "norm_bias": config.norm_bias,
        "layer_types": kinds,
        "local_attention": 2 * widths[0] if widths else 128,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()},
        **{f"{name}_token_id": None for name in ("pad", "bos", "eos", "cls", "sep")},
    }


# --- T5 ---


def _t5_config(hf: dict[str, Any]) -> Seq2SeqConfig:
    kind = hf.get("feed_forward_proj", "relu")
    gated, name = kind.startswith("gated-"), kind.removeprefix("gated-")
    # T5's "gated-gelu" has always meant the approximation by tanh
    activation = "gelu_tanh" if kind == "gated-gelu" else _activation(name, "feed_forward_proj")
    # Only a T5 whose head is the embedding scales its states. transformers 5 writes tie_word_embeddings=true whatever
    # the model, and what it had read before into scale_decoder_outputs.
    tied = hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings", True) is not False)
    return Seq2SeqConfig(
        vocab_size=hf["vocab_size"],
        width=hf["d_model"],
        head_dim=hf["d_kv"],
        num_heads=hf["num_heads"],
        ffn_width=hf["d_ff"],
        num_layers=hf["num_layers"],
        num_decoder_layers=hf.get("num_decoder_layers") or hf["num_layers"],
        num_buckets=hf.get("relative_attention_num_buckets", 32),
        max_distance=hf.get("relative_attention_max_distance", 128),
        norm_eps=hf.get("layer_norm_epsilon", 1e-6),
        activation=activation,
        gated=gated,
        tie_embeddings=tied,
    )


def _t5_stored(config: Seq2SeqConfig) -> Mapping[str, Stored]:
    stored = {"embedding": Stored(("shared.weight",))}
    if not config.tie_embeddings:
        stored["head"] = Stored(("lm_head.weight",))
    for stack, depth in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        stored[f"{stack}.position_bias"] = Stored((bias,))
        stored |= _norm(f"{stack}.norm", f"{stack}.final_layer_norm", False)
        parts = [("attention", "attention_norm", "SelfAttention")]
        if stack == "decoder":
            parts.append(("cross_attention", "cross_norm", "EncDecAttention"))
        for i in range(depth):
            ours = f"{stack}.layers.{i}"
            for place, (part, norm, their_part) in enumerate(parts):
                theirs = f"{stack}.block.{i}.layer.{place}"
                stored |= _norm(f"{ours}.{norm}", f"{theirs}.layer_norm", False)
                for name in ("query", "key", "value", "out"):
                    stored |= _linear(f"{ours}.{part}.{name}", f"{theirs}.{their_part}.{name[0]}", False)
            theirs = f"{stack}.block.{i}.layer.{len(parts)}"
            stored |= _norm(f"{ours}.ffn_norm", f"{theirs}.layer_norm", False)
            linears = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if config.gated else {"up": "wi", "down": "wo"}
            for name, their_name in linears.items():
                stored |= _linear(f"{ours}.ffn.{name}", f"{theirs}.DenseReluDense.{their_name}", False)
    return stored


def _t5_config_to(config: Seq2SeqConfig) -> dict[str, Any]:
    kind = _WRITTEN_ACTIVATIONS[config.activation]
    if config.gated:
        kind = "gated-gelu" if config.activation == "gelu_tanh" else f"gated-{kind}"
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "d_kv": config.head_dim,
        "num_heads": config.num_heads,
        "d_ff": config.ffn_width,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": kind,
        "tie_word_embeddings": config.tie_embeddings,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


_BERT = Family(
    _bert_config,
    _bert_stored,
    make_encoder,
    _bert_config_to,
    ignored=(r"embeddings\.position_ids", r"pooler\..*", r"cls\..*", r"lm_head\..*"),
    # the first checkpoints of BERT still have the names of TensorFlow
    renamed=((r"^(bert|roberta)\.", ""), (r"LayerNorm\.gamma$", "LayerNorm.weight"),
             (r"LayerNorm\.beta$", "LayerNorm.bias")),
)  # fmt: skip
_ROBERTA = _BERT._replace(config_from=_roberta_config)
_MODERNBERT = Family(
    _modernbert_config,
    _modernbert_stored,
    make_encoder,
    _modernbert_config_to,
    ignored=(r"head\..*", r"decoder\..*"),
    renamed=((r"^model\.", ""),),
)
_T5 = Family(
    _t5_config,
    _t5_stored,
    make_seq2seq,
    _t5_config_to,
    ignored=(
        r"(encoder|decoder)\.embed_tokens\.weight",
        r"lm_head\.weight",  # a copy of the embedding, where the head is tied
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ),
)

FAMILIES: dict[str, Family] = {
    "BertModel": _BERT,
    "BertForMaskedLM": _BERT,
    "RobertaModel": _ROBERTA,
    "RobertaForMaskedLM": _ROBERTA,
    "XLMRobertaModel": _ROBERTA,
    "XLMRobertaForMaskedLM": _ROBERTA,
    "ModernBertModel": _MODERNBERT,
    "ModernBertForMaskedLM": _MODERNBERT,
    "T5ForConditionalGeneration": _T5,
}
