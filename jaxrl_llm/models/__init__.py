"""Flax NNX modules behind the functional seam, tokenizers and weights."""

from jaxrl_llm.models.decoder import DecoderConfig, Model, make_decoder, previous_token_head
from jaxrl_llm.models.heads import make_scalar_head
from jaxrl_llm.models.tokenizer import Tokenizer, load_tokenizer
from jaxrl_llm.models.weights import count_params, load_params, save_params

__all__ = [
    "DecoderConfig",
    "Model",
    "Tokenizer",
    "count_params",
    "load_params",
    "load_tokenizer",
    "make_decoder",
    "make_scalar_head",
    "previous_token_head",
    "save_params",
]
