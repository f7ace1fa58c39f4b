"""The Pallas kernels that JAX ships, as alternatives for `jaxrl_kernels.bench`; each gets its own layout beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_kernels.bench.timing import BOTH, Alternative, alternative

Found = tuple[list[Alternative], dict[str, str]]


def _elsewhere(names: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The kernels of other platforms, with that as the reason."""
    here = jax.default_backend()
    return {
        f"pallas.ops.{platform}.{name}": f"runs on a {platform.upper()}"
        for platform, listed in names.items()
        for name in listed
        if platform != here
    }


def attention_kernels(arrays: tuple[Any, ...], cotangent: Any, causal: bool, scale: float) -> Found:
    """For q [B, T, H, D], k and v [B, T, KV, D] and perhaps segment ids [B, T]."""
    names = {"tpu": ("flash_attention", "splash_attention"), "gpu": ("attention (Triton)", "attention_mgpu")}
    not_run = _elsewhere(names)
    if jax.default_backend() == "tpu":
        return _attention_on_tpus(arrays, cotangent, causal, scale), not_run
    if jax.default_backend() != "gpu":
        return [], not_run
    entries, reasons = _attention_on_gpus(arrays, cotangent, causal, scale)
    return entries, not_run | reasons


def _attention_on_gpus(arrays: tuple[Any, ...], cotangent: Any, causal: bool, scale: float) -> Found:
    from jax.experimental.pallas.ops.gpu import attention as triton
    from jax.experimental.pallas.ops.gpu import attention_mgpu as hopper

    q, k, v, *ids = arrays
    backward = {"block_q_dkv": 32, "block_kv_dkv": 64, "block_q_dq": 64, "block_kv_dq": 32}
    blocks = triton.BlockSizes(block_q=128, block_k=64, **backward)

    def mha(q: Any, k: Any, v: Any, ids: Any = None) -> Any:
        return triton.mha(q, k, v, ids, sm_scale=scale, causal=causal, block_sizes=blocks)

    group = q.shape[2] // k.shape[2]  # it has as many key heads as query heads
    many = q, jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2), *ids
    entries = [alternative("pallas.ops.gpu.attention (Triton)", mha, many, cotangent, differentiated=3)]
    name = "pallas.ops.gpu.attention_mgpu"
    if ids:
        return entries, {name: "has no segments"}
    squares: dict[str, Any] = (
        {} if causal else {"block_q_dkv": 64, "block_kv_dkv": 64, "block_q_dq": 64, "block_kv_dq": 64}
    )
    config = hopper.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=causal, **squares)

    def mosaic(q: Any, k: Any, v: Any) -> Any:  # it does not scale
        return hopper.attention(q * jnp.asarray(scale, q.dtype), k, v, config)

    entries.append(alternative(name, mosaic, (q, k, v), cotangent, differentiated=0 if causal else 3))
    return entries, {f"{name}, {BOTH}": "has no causal backward pass"} if causal else {}


def _attention_on_tpus(arrays: tuple[Any, ...], cotangent: Any, causal: bool, scale: float) -> list[Alternative]:
    from jax.experimental.pallas.ops.tpu import flash_attention as flash
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    q, k, v, pull = (array.swapaxes(1, 2) for array in (*arrays[:3], cotangent))
    ids, length, group = arrays[3:], q.shape[2], q.shape[1] // k.shape[1]

    def plain(q: Any, k: Any, v: Any, ids: Any = None) -> Any:
        segments = None if ids is None else flash.SegmentIds(ids, ids)
        return flash.flash_attention(q, k, v, segment_ids=segments, causal=causal, sm_scale=scale)

    mask = splash.CausalMask((length, length)) if causal else splash.FullMask((length, length))
    kernel = splash.make_splash_mha_single_device(splash.MultiHeadMask([mask] * q.shape[1]))

    def sparse(q: Any, k: Any, v: Any, *ids: Any) -> Any:
        def row(q: Any, k: Any, v: Any, *ids: Any) -> Any:
            return kernel(q, k, v, *(splash.SegmentIds(row, row) for row in ids))

        return jax.vmap(row)(q * jnp.asarray(scale, q.dtype), k, v, *ids)

    def result(output: Any) -> Any:
        return output.swapaxes(1, 2)

    many = q, jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1), *ids
    few = q, k, v, *ids
    return [
        alternative("pallas.ops.tpu.flash_attention", plain, many, pull, differentiated=3, result=result),
        alternative("pallas.ops.tpu.splash_attention", sparse, few, pull, differentiated=3, result=result),
    ]


def decode_kernels(q: Any, cache: tuple[Any, ...], dense: tuple[Any, Any], scale: float) -> Found:
    """For q [S, T, H, D]; the cache of `decode_attention`, which ends with a table if it is in pages; and its keys and
    values in one piece, [S, C, KV, D]."""
    not_run = _elsewhere({
        "tpu": ("paged_attention", "ragged_paged_attention"),
        "gpu": ("paged_attention", "decode_attention"),
    })  # fmt: skip
    k_pages, v_pages, lengths, *table = cache
    slots, tokens, heads, width = q.shape
    pages = k_pages.transpose(1, 0, 3, 2), v_pages.swapaxes(0, 1)  # [KV, P, page, D]
    platform = jax.default_backend()
    entries: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = []
    if platform == "gpu":
        from jax.experimental.pallas.ops.gpu import decode_attention as contiguous
        from jax.experimental.pallas.ops.gpu import paged_attention as paged_gpu

        def whole(q: Any, keys: Any, values: Any, lengths: Any) -> Any:
            return contiguous.gqa(q, keys, values, kv_seq_len=lengths, sm_scale=scale)

        def by_page(q: Any, keys: Any, values: Any, table: Any, lengths: Any) -> Any:
            q, block = q * jnp.asarray(scale, q.dtype), max(1, 128 // keys.shape[2])
            options = {"k_splits": 4, "pages_per_compute_block": block}
            return paged_gpu.paged_attention(q, keys, values, table, lengths, **options)

        entries.append(("decode_attention", whole, (q[:, 0], *dense, lengths)))
        if table:
            entries.append(("paged_attention", by_page, (q[:, 0], *pages, *table, lengths)))
    elif platform == "tpu" and table:
        from jax.experimental.pallas.ops.tpu import paged_attention as paged_tpu
        from jax.experimental.pallas.ops.tpu import ragged_paged_attention as ragged

        def paged_kernel(q: Any, keys: Any, values: Any, lengths: Any, table: Any) -> Any:
            q = q * jnp.asarray(scale, q.dtype)
            return paged_tpu.paged_attention(q, keys, values, lengths, table, pages_per_compute_block=4)

        def ragged_kernel(q: Any, pages: Any, lengths: Any, table: Any) -> Any:
            starts, number = jnp.arange(slots + 1, dtype=jnp.int32) * tokens, jnp.full(1, slots, jnp.int32)
            return ragged.ragged_paged_attention(q, pages, lengths, table, starts, number, sm_scale=scale)

        # [P, page, 2 KV, D], keys and values of a head beside each other
        joined = jnp.stack([k_pages.transpose(0, 3, 1, 2), v_pages.swapaxes(1, 2)], axis=3)
        joined = joined.reshape(*joined.shape[:2], -1, width)
        entries.append(
            ("ragged_paged_attention", ragged_kernel, (q.reshape(-1, heads, width), joined, lengths, *table))
        )
        entries.append(("paged_attention", paged_kernel, (q[:, 0], *pages, lengths, *table)))
    if platform in ("gpu", "tpu") and not table:
        not_run[f"pallas.ops.{platform}, paged kernels"] = "take pages"
    kept = []
    for name, function, arrays in entries:
        label = f"pallas.ops.{platform}.{name}"
        if tokens > 1 and name != "ragged_paged_attention":
            not_run[label] = "takes one query a slot"
        else:
            kept.append(alternative(label, function, arrays, result=lambda output: output.reshape(q.shape)))
    return kept, not_run
