"""The cases of `jaxrl_kernels.bench` with attention, beside what JAX ships for it and PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_kernels.attention import flash_attention
from jaxrl_kernels.bench import pytorch
from jaxrl_kernels.bench import shipped as shipped_kernels
from jaxrl_kernels.bench.cases import normal, our_versions
from jaxrl_kernels.bench.timing import (
    BACKWARD,
    BOTH,
    FORWARD,
    Case,
    Work,
    alternative,
    copy_alternative,
    least_work,
    size_of,
)
from jaxrl_kernels.decode_attention import decode_attention


def attention_case(
    torch: bool,
    *,
    batch: int,
    length: int,
    heads: int,
    num_kv: int,
    width: int,
    dtype: str,
    causal: bool = True,
    segments: int = 0,
) -> Case:
    """Self-attention over whole rows, or over rows packed with `segments` segments of different lengths."""
    q, cotangent = (normal(index, (batch, length, heads, width), jnp.dtype(dtype)) for index in (0, 1))
    k, v = (normal(index, (batch, length, num_kv, width), jnp.dtype(dtype)) for index in (2, 3))
    ids, pairs = None, float(batch * length**2)
    if segments:
        rng = np.random.default_rng(0)
        borders = np.sort(rng.choice(length - 1, (batch, segments - 1), replace=False), axis=1) + 1
        marks = np.stack([np.searchsorted(row, np.arange(length), side="right") for row in borders])
        ids = jnp.asarray(marks, jnp.int32)
        pairs = sum(int(size) ** 2 for row in marks for size in np.bincount(row))
    pairs = (pairs + batch * length) / 2 if causal else pairs

    arrays = (q, k, v) if ids is None else (q, k, v, ids)

    def ours(name: str | None) -> Callable[..., Any]:
        def attend(q: Any, k: Any, v: Any, ids: Any = None) -> Any:
            return flash_attention(q, k, v, segment_ids=ids, causal=causal, implementation=name)

        return attend

    def product(name: Any) -> Callable[..., Any]:
        def attend(q: Any, k: Any, v: Any, ids: Any = None) -> Any:
            mask = None if ids is None else ids[:, None, :, None] == ids[:, None, None, :]
            return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation=name)

        return attend

    here = jax.default_backend()
    more = ("cudnn",) if here == "gpu" and ids is None else ()
    entries, not_run = our_versions(ours, arrays, cotangent, differentiated=3, more=more)
    entries.append(alternative(_product("xla"), product("xla"), arrays, cotangent, differentiated=3))
    if here == "gpu":
        entries.append(alternative(_product("cudnn"), product("cudnn"), arrays, cotangent, differentiated=3))
    else:
        not_run[_product("cudnn")] = "runs on a GPU"
    shipped, reasons = shipped_kernels.attention_kernels(arrays, cotangent, causal, width**-0.5)
    entries, not_run = entries + shipped, not_run | reasons
    if torch:
        shipped, reasons = pytorch.attentions(q, k, v, cotangent, ids, causal)
        entries, not_run = entries + shipped, not_run | reasons
    # Two products of 2 * D for a pair of tokens forward; five backward, one of them the weights' again.
    flops = 4.0 * pairs * heads * width
    work = least_work((flops, 3.5 * flops), arrays, (q,), (q, k, v))
    work[BACKWARD] = Work(2.5 * flops, work[BOTH].bytes - work[FORWARD].bytes)
    rows = f"{segments} segments a row" if segments else "whole rows"
    shape = f"[B {batch}, T {length}, H {heads}, D {width}], KV {num_kv}, {dtype}, {rows}"
    return Case("flash_attention", f"{shape}, {'causal' if causal else 'not causal'}", work, entries, not_run)


def _product(name: str) -> str:
    return f"jax.nn.dot_product_attention, {name}"


def decode_case(
    torch: bool,
    *,
    slots: int,
    tokens: int,
    heads: int,
    num_kv: int,
    width: int,
    context: int,
    page: int | None,
    dtype: str,
    full: bool = False,
) -> Case:
    """A decode step over ragged lengths from half of `context` up to it (all of it if `full`). Without `page` the cache
    is one piece a slot."""
    size = page or context
    per_slot = context // size
    q = normal(0, (slots, tokens, heads, width), jnp.dtype(dtype))
    k_pages = normal(1, (slots * per_slot, num_kv, width, size), jnp.dtype(dtype))
    v_pages = normal(2, (slots * per_slot, num_kv, size, width), jnp.dtype(dtype))
    rng = np.random.default_rng(0)
    lengths = np.full(slots, context) if full else rng.integers(context // 2, context + 1, slots)
    table = jnp.asarray(rng.permutation(slots * per_slot).reshape(slots, per_slot), jnp.int32)
    # Without pages there is no table: slot s has page s.
    cache = (k_pages, v_pages, jnp.asarray(lengths, jnp.int32)) + (() if page is None else (table,))
    arrays = (q, *cache)
    scale = width**-0.5

    def ours(name: str | None) -> Callable[..., Any]:
        def attend(q: Any, k_pages: Any, v_pages: Any, lengths: Any, table: Any = None) -> Any:
            return decode_attention(q, k_pages, v_pages, lengths, table, implementation=name)

        return attend

    def gathered(q: Any, k_pages: Any, v_pages: Any, lengths: Any, table: Any = None) -> Any:
        keys = k_pages if table is None else k_pages[table].transpose(0, 2, 3, 1, 4)
        values = v_pages if table is None else v_pages[table].transpose(0, 2, 1, 3, 4)
        keys, values = keys.reshape(slots, num_kv, width, context), values.reshape(slots, num_kv, context, width)
        rows = q.reshape(slots, tokens, num_kv, heads // num_kv, width)
        logits = scale * jnp.einsum("stkgd,skdc->stkgc", rows, keys, preferred_element_type=jnp.float32)
        places = lengths[:, None] - tokens + jnp.arange(tokens)
        seen = jnp.arange(context) <= places[..., None]
        weights = jax.nn.softmax(jnp.where(seen[:, :, None, None], logits, -jnp.inf), axis=-1).astype(q.dtype)
        return jnp.einsum("stkgc,skcd->stkgd", weights, values).reshape(q.shape)

    entries, not_run = our_versions(ours, arrays)
    entries.append(alternative("XLA: gather, softmax", gathered, arrays))
    # What the others take is made beforehand: [S, C, KV, D] in one piece, or [KV, P, page, D].
    keys = k_pages if page is None else k_pages[table].transpose(0, 2, 3, 1, 4)
    values = v_pages if page is None else v_pages[table].transpose(0, 2, 1, 3, 4)
    keys = keys.reshape(slots, num_kv, width, context).transpose(0, 3, 1, 2)
    values = values.reshape(slots, num_kv, context, width).swapaxes(1, 2)
    for name in ("xla", "cudnn"):
        label = f"{_product(name)}, keys in one piece"
        if tokens > 1:
            not_run[label] = "its causal mask takes no ragged lengths"
        elif name == "cudnn" and jax.default_backend() != "gpu":
            not_run[label] = "runs on a GPU"
        else:
            attend = _dense_product(name)
            entries.append(alternative(label, attend, (q, keys, values, cache[2])))
    shipped, reasons = shipped_kernels.decode_kernels(q, cache, (keys, values), scale)
    live = sum(-(-int(n) // size) for n in lengths) * size * num_kv * width
    seen = sum(tokens * int(n) - tokens * (tokens - 1) // 2 for n in lengths)
    work = Work(4.0 * seen * heads * width, 2 * live * k_pages.dtype.itemsize + size_of(q, q))
    entries = [*entries, *shipped, copy_alternative(work.bytes)]
    shape = f"S {slots}, T {tokens}, H {heads}, KV {num_kv}, D {width}, {context} keys"
    shape += f", {'one piece' if page is None else f'pages of {page}'}, {'full' if full else 'ragged'}, {dtype}"
    return Case("decode_attention", shape, {FORWARD: work}, entries, not_run | reasons)


def _dense_product(name: Any) -> Callable[..., Any]:
    def attend(q: Any, keys: Any, values: Any, lengths: Any) -> Any:
        return jax.nn.dot_product_attention(q, keys, values, key_value_seq_lengths=lengths, implementation=name)

    return attend
