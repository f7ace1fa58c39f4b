"""Kernels of jaxrl_llm, usable alone: arrays in, arrays out. `dispatch.choose` says which version of one runs where.

Fused log-probs and sampling are written in plain XLA so far; attention, the scan and the policy loss have Pallas
kernels for TPUs and GPUs beside it.
"""

from jaxrl_kernels.attention import flash_attention
from jaxrl_kernels.attention_ring import ring_attention
from jaxrl_kernels.decode_attention import decode_attention
from jaxrl_kernels.logprob import fused_logprob, soft_cap
from jaxrl_kernels.policy_loss import fused_policy_loss
from jaxrl_kernels.sampling import filter_logits, sample_tokens
from jaxrl_kernels.scan import discounted_scan

__all__ = [
    "decode_attention",
    "discounted_scan",
    "filter_logits",
    "flash_attention",
    "fused_logprob",
    "fused_policy_loss",
    "ring_attention",
    "sample_tokens",
    "soft_cap",
]
