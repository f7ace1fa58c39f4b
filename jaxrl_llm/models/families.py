"""Families of decoders as Hugging Face stores them: each a function from its config.json to ours and a map of names.

Defaults of a family are those that transformers takes when config.json leaves a field out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from jaxrl_llm.models.checkpoint import Family, Stored
from jaxrl_llm.models.decoder import make_decoder
from jaxrl_llm.models.decoder_config import Activation, DecoderConfig
from jaxrl_llm.models.rotary import LAYER_TYPES, Rope, read_rope
from jaxrl_llm.models.stacking import stack_stored

ACTIVATION_OF: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
NULLABLE = ("sliding_window", "final_logit_softcapping", "attn_logit_softcapping")  # null is none, not the default

# Names of a layer's norms. What transformers calls post_attention_layernorm stands before the feed-forward network in
# most families, but behind attention in Gemma and OLMo 2.
PRE_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
POST_NORMS = {"attention_post_norm": "post_attention_layernorm", "ffn_post_norm": "post_feedforward_layernorm"}
BOTH_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **POST_NORMS}

# Names of the router and of the gate, up and down matrices of expert {}.
QWEN_EXPERTS = ("mlp.gate", *(f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")))
MIXTRAL_EXPERTS = ("block_sparse_moe.gate", *(f"block_sparse_moe.experts.{{}}.{name}" for name in ("w1", "w3", "w2")))


def _config(hf: Mapping[str, Any], windows: tuple[int | None, ...], **options: Any) -> DecoderConfig:
    """What all families read alike. `options` are fields of ours that only some families have.

    Raises:
      ValueError: a field is missing, or asks for something that is not supported.
    """
    layers, heads = hf["num_hidden_layers"], hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    activation = hf.get("hidden_activation") or hf.get("hidden_act", "silu")
    if activation not in ACTIVATION_OF:
        raise ValueError(
            f"config.json: activation {activation!r} is not supported; supported are {list(ACTIVATION_OF)}"
        )
    if hf.get("use_bidirectional_attention"):
        raise ValueError("config.json: use_bidirectional_attention=True is not supported: a decoder looks back only")
    if hf.get("quantization_config"):
        raise ValueError("config.json: quantization_config is not supported; take the checkpoint before quantization")
    ropes = options.pop("layer_ropes", None) or (read_rope(hf, head_dim),) * layers
    plain = all(rope == Rope(ropes[0].theta) for rope in ropes) if ropes[0] is not None else False
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        ffn_width=hf["intermediate_size"],
        rope_theta=ropes[0].theta if plain else 10_000.0,
        layer_ropes=None if plain else ropes,
        layer_windows=windows if any(windows) else None,
        norm_eps=hf["rms_norm_eps"],
        tie_embeddings=hf["tie_word_embeddings"],
        activation=ACTIVATION_OF[activation],
        **options,
    )


def _windows(hf: Mapping[str, Any], layer_types: list[str] | None) -> tuple[int | None, ...]:
    """The window of each layer; `layer_types` are what the family takes where config.json has none, None: all alike."""
    types = hf.get("layer_types") or layer_types
    if types is None:
        return (hf.get("sliding_window"),) * hf["num_hidden_layers"]
    if unknown := sorted(set(types) - set(LAYER_TYPES)):
        raise ValueError(f"config.json: layer types {unknown} are not supported; supported are {list(LAYER_TYPES)}")
    return tuple(hf.get("sliding_window") if kind == "sliding_attention" else None for kind in types)


def _layer_types(layers: int, slides: Callable[[int], bool]) -> list[str]:
    return ["sliding_attention" if slides(layer) else "full_attention" for layer in range(layers)]


def _llama(hf: Mapping[str, Any]) -> DecoderConfig:
    bias = hf.get("attention_bias", False)
    full = (None,) * hf["num_hidden_layers"]
    return _config(hf, full, attention_bias=bias, attention_out_bias=bias, ffn_bias=hf.get("mlp_bias", False))


def _qwen2(hf: Mapping[str, Any], **options: Any) -> DecoderConfig:
    layers, first = hf["num_hidden_layers"], hf.get("max_window_layers", 28)
    if hf.get("use_sliding_window", False):
        windows = _windows(hf, _layer_types(layers, lambda layer: layer >= first))
    else:
        windows = (None,) * layers
    return _config(hf, windows, **({"attention_bias": True} | options))


def _qwen3(hf: Mapping[str, Any], **options: Any) -> DecoderConfig:
    bias = hf.get("attention_bias", False)
    return _qwen2(hf, attention_bias=bias, attention_out_bias=bias, qk_norm="head", **options)


def _qwen3_moe(hf: Mapping[str, Any]) -> DecoderConfig:
    layers, every = hf["num_hidden_layers"], hf.get("decoder_sparse_step", 1)
    only_dense = hf.get("mlp_only_layers") or ()
    alike = {**hf, "layer_types": None, "max_window_layers": 0}  # this family windows all layers or none
    return _qwen3(
        alike,
        num_experts=hf.get("num_experts") or hf["num_local_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        expert_width=hf["moe_intermediate_size"],
        normalize_experts=hf.get("norm_topk_prob", False),
        dense_layers=tuple(i for i in range(layers) if i in only_dense or (i + 1) % every),
    )


def _mistral(hf: Mapping[str, Any], **options: Any) -> DecoderConfig:
    return _config(hf, _windows({**hf, "layer_types": None}, None), **options)


def _mixtral(hf: Mapping[str, Any]) -> DecoderConfig:
    experts = hf.get("num_local_experts") or hf["num_experts"]
    return _mistral(hf, num_experts=experts, experts_per_token=hf.get("num_experts_per_tok", 2))


def _phi3(hf: Mapping[str, Any]) -> DecoderConfig:
    settings = hf.get("rope_parameters") or hf.get("rope_scaling")
    if settings and settings.get("rope_type", settings.get("type")) in ("su", "yarn"):  # early names of LongRoPE
        settings = {**settings, "rope_type": "longrope"}
    return _mistral({**hf, "rope_parameters": settings})


def _gemma(hf: Mapping[str, Any], layer_types: list[str], **options: Any) -> DecoderConfig:
    bias = hf.get("attention_bias", False)
    return _config(
        hf,
        _windows(hf, layer_types),
        attention_bias=bias,
        attention_out_bias=bias,
        norm_placement="both",
        norm_offset=True,
        embedding_scale=hf["hidden_size"] ** 0.5,
        attention_scale=hf["query_pre_attn_scalar"] ** -0.5,
        logit_softcap=hf.get("final_logit_softcapping"),
        **options,
    )


def _gemma2(hf: Mapping[str, Any]) -> DecoderConfig:
    layer_types = _layer_types(hf["num_hidden_layers"], lambda layer: layer % 2 == 0)
    return _gemma(hf, layer_types, attention_softcap=hf.get("attn_logit_softcapping"))


def _gemma3(hf: Mapping[str, Any]) -> DecoderConfig:
    every = hf.get("sliding_window_pattern", 6)
    types = hf.get("layer_types") or _layer_types(hf["num_hidden_layers"], lambda layer: (layer + 1) % every != 0)
    if not any(name in (hf.get("rope_parameters") or {}) for name in LAYER_TYPES):
        # written before transformers 5: scaling belongs to the layers without a window
        settings = {
            "full_attention": {"rope_theta": hf["rope_theta"], **(hf.get("rope_scaling") or {})},
            "sliding_attention": {"rope_theta": hf.get("rope_local_base_freq", 10_000.0)},
        }
        hf = {**hf, "rope_parameters": settings}
    ropes = {name: read_rope(hf, hf["head_dim"], name) for name in set(types) & set(LAYER_TYPES)}
    return _gemma(hf, types, qk_norm="head", layer_ropes=tuple(ropes.get(name) for name in types))


def _smollm3(hf: Mapping[str, Any]) -> DecoderConfig:
    layers, every = hf["num_hidden_layers"], hf.get("no_rope_layer_interval", 4)
    turned = hf.get("no_rope_layers") or [int((layer + 1) % every != 0) for layer in range(layers)]
    windowed = hf.get("use_sliding_window", False)
    windows = _windows(hf, _layer_types(layers, lambda layer: not turned[layer])) if windowed else (None,) * layers
    rope = read_rope(hf, hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"])
    bias = hf.get("attention_bias", False)
    return _config(
        hf,
        windows,
        layer_ropes=tuple(rope if turns else None for turns in turned),
        attention_bias=bias,
        attention_out_bias=bias,
        ffn_bias=hf.get("mlp_bias", False),
    )


def _olmo2(hf: Mapping[str, Any]) -> DecoderConfig:
    bias = hf.get("attention_bias", False)
    full = (None,) * hf["num_hidden_layers"]
    return _config(hf, full, attention_bias=bias, attention_out_bias=bias, qk_norm="full", norm_placement="post")


def _linear(ours: str, theirs: str, bias: bool = False, rows: tuple[int, int] | None = None) -> dict[str, Stored]:
    stored = {f"{ours}.kernel": Stored((f"{theirs}.weight",), transpose=True, rows=rows)}
    return stored | ({f"{ours}.bias": Stored((f"{theirs}.bias",), rows=rows)} if bias else {})


def _stored(
    config: DecoderConfig,
    *,
    norms: Mapping[str, str] = PRE_NORMS,
    experts: tuple[str, ...] = QWEN_EXPERTS,
    fused: bool = False,
) -> dict[str, Stored]:
    """Where each parameter lies. `fused`: queries, keys and values are rows of one tensor, gate and up of another."""
    found = {"embedding": Stored(("model.embed_tokens.weight",)), "norm.scale": Stored(("model.norm.weight",))}
    if not config.tie_embeddings:
        found["head"] = Stored(("lm_head.weight",))
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        for name, tensor in norms.items():
            found[f"{ours}.{name}.scale"] = Stored((f"{theirs}.{tensor}.weight",))
        found |= _attention(config, f"{ours}.attention", f"{theirs}.self_attn", fused)
        if config.has_experts(layer):
            found |= _linear(f"{ours}.experts.router", f"{theirs}.{experts[0]}")
            for name, tensor in zip(("gate", "up", "down"), experts[1:], strict=True):
                names = tuple(f"{theirs}.{tensor.format(i)}.weight" for i in range(config.num_experts))
                found[f"{ours}.experts.{name}"] = Stored(names, transpose=True)
            continue
        for i, name in enumerate(("gate", "up")):
            rows = (i * config.ffn_width, (i + 1) * config.ffn_width) if fused else None
            tensor = "gate_up_proj" if fused else f"{name}_proj"
            found |= _linear(f"{ours}.{name}", f"{theirs}.mlp.{tensor}", config.ffn_bias, rows)
        found |= _linear(f"{ours}.down", f"{theirs}.mlp.down_proj", config.ffn_bias)
    return found


def _attention(config: DecoderConfig, ours: str, theirs: str, fused: bool) -> dict[str, Stored]:
    head_dim: int = config.head_dim  # type: ignore[assignment]  # set by the config
    start = 0
    found: dict[str, Stored] = {}
    for name, heads in (("query", config.num_heads), ("key", config.num_kv_heads), ("value", config.num_kv_heads)):
        end = start + heads * head_dim
        tensor = f"{theirs}.qkv_proj" if fused else f"{theirs}.{name[0]}_proj"
        found |= _linear(f"{ours}.{name}", tensor, config.attention_bias, (start, end) if fused else None)
        start = end
    found |= _linear(f"{ours}.out", f"{theirs}.o_proj", config.attention_out_bias)
    if config.qk_norm is not None:
        found[f"{ours}.query_norm.scale"] = Stored((f"{theirs}.q_norm.weight",))
        found[f"{ours}.key_norm.scale"] = Stored((f"{theirs}.k_norm.weight",))
    return found


def _config_to(architecture: str, model_type: str, config: DecoderConfig) -> dict[str, Any]:
    """A config.json of a family whose only options are biases or norms of queries and keys.

    Raises:
      ValueError: the decoder has an option that the family lacks.
    """
    written = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 32_768,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if model_type != "qwen2":  # where queries, keys and values always have biases
        written["attention_bias"] = config.attention_bias
    if (back := FAMILIES[architecture].config_from(written)) != config:
        differ = [name for name, value in vars(config).items() if getattr(back, name) != value]
        raise ValueError(f"{architecture} has no place for this decoder's {', '.join(differ)}")
    return written


REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _family(
    read: Callable[[Mapping[str, Any]], DecoderConfig],
    defaults: Mapping[str, Any],
    config_to: Callable[[DecoderConfig], dict[str, Any]] | None = None,
    **names: Any,
) -> Family:
    """A family from how it reads a config.json, that file's defaults and the names of its tensors."""
    common = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False}

    def config_from(hf: dict[str, Any]) -> DecoderConfig:
        if missing := [name for name in REQUIRED if hf.get(name) is None]:
            raise ValueError(f"config.json lacks {missing}")
        given = {name: value for name, value in hf.items() if value is not None or name in NULLABLE}
        return read({**common, **defaults, **given})

    def stored(config: DecoderConfig) -> Mapping[str, Stored]:
        found = _stored(config, **names)
        return stack_stored(found, config) if config.scan_layers else found

    return Family(config_from, stored, make_decoder, config_to)


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": _family(_llama, {}, partial(_config_to, "LlamaForCausalLM", "llama")),
    "Qwen2ForCausalLM": _family(_qwen2, {"sliding_window": 4096}, partial(_config_to, "Qwen2ForCausalLM", "qwen2")),
    "Qwen3ForCausalLM": _family(
        _qwen3, {"sliding_window": 4096, "head_dim": 128}, partial(_config_to, "Qwen3ForCausalLM", "qwen3")
    ),
    "Qwen3MoeForCausalLM": _family(
        _qwen3_moe, {"sliding_window": 4096, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    ),
    "MistralForCausalLM": _family(_mistral, {"sliding_window": 4096}),
    "MixtralForCausalLM": _family(_mixtral, {"rms_norm_eps": 1e-5, "rope_theta": 1e6}, experts=MIXTRAL_EXPERTS),
    "Gemma2ForCausalLM": _family(
        _gemma2,
        {
            "tie_word_embeddings": True,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        norms=BOTH_NORMS,
    ),
    "Gemma3ForCausalLM": _family(
        _gemma3,
        {
            "tie_word_embeddings": True,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "rope_theta": 1e6,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        norms=BOTH_NORMS,
    ),
    "SmolLM3ForCausalLM": _family(_smollm3, {"tie_word_embeddings": True, "rope_theta": 2e6}),
    "Phi3ForCausalLM": _family(_phi3, {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}, fused=True),
    "Olmo2ForCausalLM": _family(_olmo2, {"rms_norm_eps": 1e-5}, norms=POST_NORMS),
}
