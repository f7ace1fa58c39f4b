"""Kernels of jaxrl_llm, usable alone: arrays in, arrays out. `dispatch.choose` says which version of one runs where;
kernels/README.md what each does."""

from jaxrl_kernels.attention import flash_attention
from jaxrl_kernels.attention_ring import ring_attention
from jaxrl_kernels.cache_write import cache_write
from jaxrl_kernels.decode_attention import decode_attention
from jaxrl_kernels.logprob import fused_logprob, fused_top_k, soft_cap
from jaxrl_kernels.logprob_filtered import filtered_logprob
from jaxrl_kernels.policy_loss import fused_policy_loss
from jaxrl_kernels.sampling import filter_logits, sample_tokens
from jaxrl_kernels.scan import discounted_scan

__all__ = [
    "cache_write",
    "decode_attention",
    "discounted_scan",
    "filter_logits",
    "filtered_logprob",
    "flash_attention",
    "fused_logprob",
    "fused_policy_loss",
    "fused_top_k",
    "ring_attention",
    "sample_tokens",
    "soft_cap",
]
