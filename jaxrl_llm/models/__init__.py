"""Flax NNX modules behind the functional seam, checkpoints of Hugging Face in and out, tokenizers, heads, adapters.

| to | look at |
| --- | --- |
| read and write a checkpoint | `load`, `save`; `python -m jaxrl_llm.models.inspect PATH` |
| build a model of one's own | `make_decoder`, `make_encoder`, `make_seq2seq` with their configs |
| embed sentences | `load_embedder` |
| put something on hidden states | `heads`, `pool_hidden` |
| train a few numbers beside a model | `lora`, `adapters` |
| turn text and conversations into tokens | `load_tokenizer`, `encode_chat`, `extend_chat` |
"""

from jaxrl_llm.models.adapters import (
    AdaptedModel,
    apply_prefix,
    init_ia3,
    init_prefix,
    init_prompt,
    merge_ia3,
    prompt_prefix,
    trainable_count,
)
from jaxrl_llm.models.chat import encode_chat, extend_chat, render_chat, text_behind_turn
from jaxrl_llm.models.decoder import DecoderConfig, Model, make_decoder
from jaxrl_llm.models.encoder import EncoderConfig, EncoderModel, make_encoder
from jaxrl_llm.models.heads import hidden_at, make_classifier_head, make_projection_head, make_scalar_head
from jaxrl_llm.models.hub import load, save
from jaxrl_llm.models.lora import LoraConfig, add_lora, apply_lora, init_lora, load_lora, merge_lora, save_lora
from jaxrl_llm.models.moe import load_balancing_loss
from jaxrl_llm.models.nucleus import NucleusModel, nucleus_model
from jaxrl_llm.models.pooling import pool_hidden
from jaxrl_llm.models.previous_token import induction_head, previous_token_head
from jaxrl_llm.models.rotary import Rope
from jaxrl_llm.models.sentence import Embedder, load_embedder
from jaxrl_llm.models.seq2seq import Seq2SeqConfig, Seq2SeqModel, make_seq2seq, relative_position_buckets, shift_right
from jaxrl_llm.models.stacking import stack_layers, unstack_layers
from jaxrl_llm.models.tokenizer import Tokenizer, decode_stream, load_tokenizer, stop_sequences
from jaxrl_llm.models.weights import count_params, load_params, save_params

__all__ = [
    "AdaptedModel",
    "DecoderConfig",
    "Embedder",
    "EncoderConfig",
    "EncoderModel",
    "LoraConfig",
    "Model",
    "NucleusModel",
    "Rope",
    "Seq2SeqConfig",
    "Seq2SeqModel",
    "Tokenizer",
    "add_lora",
    "apply_lora",
    "apply_prefix",
    "count_params",
    "decode_stream",
    "encode_chat",
    "extend_chat",
    "hidden_at",
    "induction_head",
    "init_ia3",
    "init_lora",
    "init_prefix",
    "init_prompt",
    "load",
    "load_balancing_loss",
    "load_embedder",
    "load_lora",
    "load_params",
    "load_tokenizer",
    "make_classifier_head",
    "make_decoder",
    "make_encoder",
    "make_projection_head",
    "make_scalar_head",
    "make_seq2seq",
    "merge_ia3",
    "merge_lora",
    "nucleus_model",
    "pool_hidden",
    "previous_token_head",
    "prompt_prefix",
    "relative_position_buckets",
    "render_chat",
    "save",
    "save_lora",
    "save_params",
    "shift_right",
    "stack_layers",
    "stop_sequences",
    "text_behind_turn",
    "trainable_count",
    "unstack_layers",
]
