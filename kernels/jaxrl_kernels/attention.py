"""Attention over packed rows that never holds the matrix of weights (Dao et al. 2022, arXiv 2205.14135; Dao 2023, arXiv
2307.08691).

The forward pass leaves the output and each row's normalizer; the backward pass computes the weights again from them.
Both are pairs of functions, `forward` and `backward`, one pair for each platform. What they need not know stands here:
who has which marks, attention sinks (a logit without a key changes the normalizer only, so it is put in afterwards) and
the derivative.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_kernels import attention_gpu, attention_hopper, attention_hopper_backward, attention_tpu, attention_xla
from jaxrl_kernels.attention_mask import HIDDEN, Options, logits_of, visible
from jaxrl_kernels.dispatch import choose

Pair = Any  # an array for queries and keys alike, or one for each


def flash_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S KV D"],
    v: Float[Array, "B S KV D"],
    *,
    segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    positions: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: Float[Array, "H"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    bias: Float[Array, "b h T S"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H D"]:
    """`softmax(scale * q k' + bias) v` over the keys that each query sees, accumulated in float32.

    Differentiable in q, k, v, bias and sinks. A query that sees no key gives 0, and nothing has a gradient from it.

    Args:
      q, k, v: H query heads, a multiple of the KV heads of keys and values; query head h reads key head h // (H / KV).
      segment_ids: a query sees only keys of its own segment. One array where T = S, else a pair for queries and keys.
        Any integers but the smallest and the largest of 32 bits, which mark padding.
      positions: places below 2**30 for `causal` and `window`, one array or a pair. By default the place within the row;
        where S is not T the rows end together, so the last query is at the place of the last key. They may start again
        in each segment.
      causal: a query sees keys at its own place and before.
      window: how many places a query sees, its own included; without `causal`, to each side.
      sinks: a logit per head that takes part in the softmax but has no value (gpt-oss).
      softcap: logits become `softcap * tanh(logits / softcap)`, before the bias (Gemma 2).
      scale: by default `1 / sqrt(D)`.
      bias: added to the logits; b is B or 1, h is H or 1. It is as large as what this function avoids to hold, so it
        always goes through XLA.
      implementation: None (the platform decides, when the program is lowered), "xla", "pallas_tpu", "pallas_gpu",
        "mosaic_gpu" (Hopper), "cudnn", "reference" (plain, holds all weights), or "interpret", "interpret_gpu" and
        "interpret_mosaic" (the Pallas kernels on a CPU, for tests).

    Returns:
      The output in the dtype of q.

    Raises:
      ValueError: shapes or options that do not fit, or an implementation that cannot serve this call.
    """
    check_shapes(q, k, v, window, softcap, sinks, bias)
    segmented = segment_ids is not None or not causal
    options = Options(causal, window, softcap, q.shape[-1] ** -0.5 if scale is None else float(scale), segmented)
    query_marks, key_marks = make_marks(q, k, segment_ids, positions)
    if implementation == "reference":
        return _reference(options, q, k, v, query_marks, key_marks, bias, sinks)
    plain = sinks is None and bias is None and segment_ids is None and positions is None
    cudnn = attention_gpu.refusal_of_cudnn(options, q, k) if plain else "has no sinks, segments, positions or bias here"
    return _attend_once(options, (implementation, cudnn), q, k, v, query_marks, key_marks, bias, sinks)


def make_marks(
    q: Float[Array, "B T H D"], k: Float[Array, "B S KV D"], segment_ids: Pair, positions: Pair
) -> tuple[Int[Array, "B 2 T"], Int[Array, "B 2 S"]]:
    """Segment and position of each query and each key, by default segment 0 and the place in rows that end together.

    Raises:
      ValueError: an array of another shape, or one array for both where T is not S.
    """
    (batch, length), key_length = q.shape[:2], k.shape[1]
    none = jnp.zeros(length, jnp.int32), jnp.zeros(key_length, jnp.int32)
    places = jnp.arange(length) + key_length - length, jnp.arange(key_length)
    marks = [_pair("segment_ids", segment_ids, none, q, k), _pair("positions", positions, places, q, k)]

    def stack(side, size):
        return jnp.stack([jnp.broadcast_to(pair[side], (batch, size)) for pair in marks], axis=1).astype(jnp.int32)

    return stack(0, length), stack(1, key_length)


def _pair(name, given, default, q, k):
    if given is None:
        return default
    expected = (q.shape[:2], k.shape[:2])
    if not isinstance(given, (tuple, list)):
        given = (given, given)
    shapes = tuple(x.shape for x in given)
    if shapes != expected:
        raise ValueError(
            f"{name} of shapes {shapes} for queries and keys, expected {expected}; give a pair (of the queries, of the "
            "keys) where they differ"
        )
    for x in given:
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} of dtype {x.dtype}, expected integers: cast them with astype(jnp.int32)")
    return given


def check_shapes(q: Any, k: Any, v: Any, window: Any, softcap: Any, sinks: Any, bias: Any) -> None:
    """Raises ValueError where the arrays and options of a call do not fit together."""
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"expected q [B, T, H, D] and k, v [B, S, KV, D], got {shapes}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"an axis of length 0 in {shapes}: leave the call out where there are no tokens")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads: {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; cast them to one dtype")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: expected at least 1, as a query's own place counts; None sees all")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap}: expected a positive number; None caps nothing")
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise ValueError(f"sinks of shape {sinks.shape}, expected one for each of the {q.shape[2]} query heads")
    if bias is not None:
        (batch, length, heads), key_length = q.shape[:3], k.shape[1]
        fits = bias.ndim == 4 and bias.shape[0] in (1, batch) and bias.shape[1] in (1, heads)
        if not fits or bias.shape[2:] != (length, key_length):
            raise ValueError(
                f"bias of shape {bias.shape}, expected [{batch} or 1, {heads} or 1, {length}, {key_length}]: spread it "
                "over queries and keys with jnp.broadcast_to"
            )


def run_forward(
    options: Options, implementation: tuple[str | None, str | None], *arrays: Any
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
    """Output and normalizer of the chosen version, for (q, k, v, query marks, key marks, bias or None)."""
    return _run("forward", options, implementation, *arrays)


def run_backward(options: Options, implementation: tuple[str | None, str | None], *arrays: Any) -> tuple:
    """Gradients of q, k, v and the bias, for the arrays of `run_forward` and then (normalizer, inner, cotangent)."""
    return _run("backward", options, implementation, *arrays)


def _run(direction, options, implementation, q, k, v, query_marks, key_marks, bias, *rest):
    """Calls one direction of the version that serves. `implementation`: a name or None; why cuDNN cannot, or None."""
    name, cudnn = implementation
    biased = bias is not None

    def without_bias(module, function=direction, **kwargs):
        def version(q, k, v, query_marks, key_marks, bias, *rest):
            results = getattr(module, function)(options, q, k, v, query_marks, key_marks, *rest, **kwargs)
            return (*results, None) if direction == "backward" else results

        return "takes no bias" if biased else version

    kernel = without_bias(attention_gpu)
    vendor = cudnn or without_bias(attention_gpu, f"cudnn_{direction}")
    by_vendor = name is None and cudnn is None
    hopper = attention_hopper if direction == "forward" else attention_hopper_backward
    refusal = attention_hopper.refusal(q)
    version = choose(
        name,
        cpu=functools.partial(getattr(attention_xla, direction), options),
        tpu=without_bias(attention_tpu),
        gpu=vendor if by_vendor else kernel,
        hopper=None if by_vendor else refusal or without_bias(hopper),
        cudnn=vendor,
        interpret=without_bias(attention_tpu, interpret=True),
        interpret_gpu=without_bias(attention_gpu, interpret=True),
        interpret_mosaic=refusal or without_bias(hopper, interpret=True),
    )
    return version(q, k, v, query_marks, key_marks, bias, *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(options, implementation, q, k, v, query_marks, key_marks, bias, sinks):
    return _attend_forward(options, implementation, q, k, v, query_marks, key_marks, bias, sinks)[0]


def _attend_forward(options, implementation, q, k, v, query_marks, key_marks, bias, sinks):
    out, normalizer = run_forward(options, implementation, q, k, v, query_marks, key_marks, bias)
    if sinks is not None:
        out, normalizer = add_sinks(out, normalizer, sinks)
    return out, (q, k, v, query_marks, key_marks, bias, sinks, out, normalizer)


def _attend_backward(options, implementation, residuals, cotangent):
    *arrays, sinks, out, normalizer = residuals
    inner = inner_products(out, cotangent)
    gradients = run_backward(options, implementation, *arrays, normalizer, inner, cotangent)
    sinks_grad = None if sinks is None else sinks_gradient(sinks, normalizer, inner)
    q_grad, k_grad, v_grad, bias_grad = gradients
    return q_grad, k_grad, v_grad, None, None, bias_grad, sinks_grad


_attend.defvjp(_attend_forward, _attend_backward)
# All versions are traced and one is lowered for each shape, not for each layer of a model that calls it.
_attend_once = jax.jit(_attend, static_argnums=(0, 1))


def add_sinks(
    out: Float[Array, "B T H D"], normalizer: Float[Array, "B H T"], sinks: Float[Array, "H"]
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
    """Output and normalizer as if each row had one more key, of logit `sinks` and value 0."""
    total = jnp.logaddexp(normalizer, sinks.astype(jnp.float32)[:, None])
    share = jnp.where(jnp.isfinite(total), jnp.exp(normalizer - total), 0)
    return (out * share.swapaxes(1, 2)[..., None]).astype(out.dtype), total


def inner_products(out: Float[Array, "B T H D"], cotangent: Float[Array, "B T H D"]) -> Float[Array, "B H T"]:
    """Sum over D of output times cotangent, which is the mean over a row's weights of their gradients."""
    return jnp.einsum("bthd,bthd->bht", out.astype(jnp.float32), cotangent.astype(jnp.float32))


def sinks_gradient(
    sinks: Float[Array, "H"], normalizer: Float[Array, "B H T"], inner: Float[Array, "B H T"]
) -> Float[Array, "H"]:
    """Gradient of the sinks: their weight times what it takes from the others."""
    weights = jnp.exp(sinks.astype(jnp.float32)[:, None] - normalizer)
    weights = jnp.where(jnp.isfinite(normalizer), weights, 0)
    return -jnp.sum(weights * inner, axis=(0, 2)).astype(sinks.dtype)


def _reference(options, q, k, v, query_marks, key_marks, bias, sinks):
    """All weights at once, in float32, differentiated by JAX."""
    batch, length, heads, width = q.shape
    num_kv, key_length = k.shape[2], k.shape[1]
    rows = q.astype(jnp.float32).reshape(batch, length, num_kv, heads // num_kv, width)
    products = jnp.einsum("btkgd,bskd->bkgts", rows, k.astype(jnp.float32)).reshape(batch, heads, length, key_length)
    logits, _ = logits_of(products, options)
    logits = logits if bias is None else logits + bias.astype(jnp.float32)
    ours, theirs = query_marks[..., None], key_marks[:, :, None]
    seen = visible((ours[:, 0], ours[:, 1]), (theirs[:, 0], theirs[:, 1]), options)[:, None]
    logits = jnp.where(seen, logits, HIDDEN)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    if sinks is not None:
        sinks = sinks.astype(jnp.float32)[:, None, None]
        peak = jnp.maximum(peak, jax.lax.stop_gradient(sinks))
    weights = jnp.where(seen, jnp.exp(logits - peak), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True) + (0 if sinks is None else jnp.exp(sinks - peak))
    weights = (weights / jnp.where(total > 0, total, 1)).reshape(batch, num_kv, heads // num_kv, length, key_length)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v.astype(jnp.float32))
    return out.reshape(q.shape).astype(q.dtype)
