"""Kernels of jaxrl_llm, usable alone: arrays in, arrays out. Written in plain XLA so far."""

from jaxrl_kernels.logprob import fused_logprob
from jaxrl_kernels.sampling import filter_logits, sample_tokens

__all__ = ["filter_logits", "fused_logprob", "sample_tokens"]
