"""What PyTorch and Liger offer for the same work, for `jaxrl_kernels.bench --torch`; imported only then."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_kernels.bench.timing import BOTH, FORWARD, Alternative, Call

# Read when torch is imported: its threads would else spin after a call, through the times of what comes next.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def problem() -> str | None:
    """Why PyTorch cannot be timed beside JAX here, or None."""
    try:
        import torch
    except ImportError as error:
        return f"PyTorch is not installed ({error})"
    backend = jax.default_backend()
    if backend == "tpu" or (backend == "gpu" and not torch.cuda.is_available()):
        return f"PyTorch does not see the {backend.upper()}"
    return None


def _tensor(array: Any, gradient: bool = False) -> Any:
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    values = np.asarray(array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array)
    tensor = torch.tensor(values, device=device)
    tensor = tensor.to(torch.bfloat16) if array.dtype == jnp.bfloat16 else tensor
    return tensor.requires_grad_(gradient)


def _alternative(
    name: str,
    function: Callable[..., Any],
    inputs: list[Any],
    cotangent: Any,
    result: Callable[[Any], Any] | None = None,
) -> Alternative:
    """A function of tensors, and its gradients in all inputs that require one; without `result`, only both at once."""
    import torch

    on_gpu = inputs[0].is_cuda
    leaves = [tensor for tensor in inputs if tensor.requires_grad]

    def forward() -> Any:
        with torch.no_grad():
            return function(*inputs)

    def both() -> Any:
        output = function(*inputs)
        return output, torch.autograd.grad(output, leaves, cotangent)

    def wait(output: Any) -> Any:
        if on_gpu:
            torch.cuda.synchronize()
        return output

    def ready(start: Callable[[], Any]) -> Call:
        if not on_gpu:
            return Call(start, wait, None)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = wait(start())
        held = sum(leaf.numel() * leaf.element_size() for leaf in _leaves(output))
        return Call(start, wait, max(0, torch.cuda.max_memory_allocated() - before - held))

    passes = {FORWARD: lambda: ready(forward), BOTH: lambda: ready(both)}
    return Alternative(name, passes if result else {BOTH: passes[BOTH]}, result or (lambda output: output))


def _leaves(output: Any) -> list[Any]:
    return [leaf for part in output for leaf in _leaves(part)] if isinstance(output, tuple) else [output]


def _to_numpy(tensor: Any) -> np.ndarray:
    return tensor.float().cpu().numpy()


def attentions(q: Any, k: Any, v: Any, cotangent: Any, segment_ids: Any, causal: bool) -> tuple[list, dict[str, str]]:
    """`scaled_dot_product_attention` on [B, T, H, D]; packed segments as a boolean mask."""
    name = "PyTorch scaled_dot_product_attention"
    if reason := problem():
        return [], {name: reason}
    import torch

    inputs = [_tensor(array.swapaxes(1, 2), gradient=True) for array in (q, k, v)]
    options: dict[str, Any] = {"is_causal": causal, "enable_gqa": q.shape[2] != k.shape[2]}
    if segment_ids is not None:
        ids = _tensor(segment_ids)
        seen = (ids[:, None, :, None] == ids[:, None, None, :]).tril()
        options |= {"is_causal": False, "attn_mask": seen}

    def attend(q: Any, k: Any, v: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    weights = _tensor(cotangent.swapaxes(1, 2))
    return [_alternative(name, attend, inputs, weights, lambda out: _to_numpy(out.transpose(1, 2)))], {}


def cross_entropies(hidden: Any, head: Any, targets: Any) -> tuple[list[Alternative], dict[str, str]]:
    """`cross_entropy` on all logits, and Liger's fused one: per row, as a policy's loss needs it, and summed over rows,
    which takes one matmul less since the gradient is known in the forward pass."""
    plain, liger = "PyTorch cross_entropy(h @ W.T)", "Liger fused_linear_cross_entropy"
    if reason := problem():
        return [], {plain: reason, liger: reason}
    import torch

    inputs = [_tensor(hidden, gradient=True), _tensor(head, gradient=True), _tensor(targets).long()]

    def naive(hidden: Any, head: Any, targets: Any) -> Any:
        return torch.nn.functional.cross_entropy((hidden @ head.T).float(), targets, reduction="none")

    weights = torch.ones(len(targets), device=inputs[0].device)
    entries = [_alternative(plain, naive, inputs, weights, lambda losses: -_to_numpy(losses))]
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        return entries, {liger: f"not installed ({error})"}
    if jax.default_backend() != "gpu":
        return entries, {liger: "runs on a GPU"}

    def fused(reduction: str) -> Callable[..., Any]:
        loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction)
        return lambda hidden, head, targets: loss(head, hidden, targets)

    entries.append(_alternative(f"{liger}, per row", fused("none"), inputs, weights, lambda losses: -_to_numpy(losses)))
    entries.append(_alternative(f"{liger}, sum", fused("sum"), inputs, None))
    return entries, {}
