"""Log-probabilities of target tokens straight from hidden states, without ever holding all logits.

What stands here is what no platform needs to know: which rows are needed, how shards of the vocabulary are joined, and
the derivative. A version (`logprob_xla`, `logprob_tpu`, `logprob_gpu`, `logprob_hopper`) gives three numbers per row of
the logits z of its own part of the vocabulary: the log of the softmax normalizer, the mean logit under the softmax, and
the targets' logits. Log-prob and entropy are differences of them, and everything from there on is left to JAX.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from jaxrl_kernels import logprob_gpu, logprob_hopper, logprob_tpu, logprob_xla
from jaxrl_kernels.dispatch import choose
from jaxrl_kernels.logprob_math import LOWEST, Options, logits_of, varying_like
from jaxrl_kernels.logprob_math import soft_cap as soft_cap
from jaxrl_kernels.tiles import dot

Logprobs = Float[Array, "N"] | Float[Array, "N K"]


def fused_logprob(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    targets: Int[Array, "N"] | Int[Array, "N K"],
    *,
    bias: Float[Array, "V"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    needed: Bool[Array, "N"] | None = None,
    with_entropy: bool = False,
    axis_name: str | None = None,
    layout: str | None = None,
    implementation: str | None = None,
) -> Logprobs | tuple[Logprobs, Float[Array, "N"]]:
    """Log-probability (nats) of `targets` under `softmax(soft_cap(hidden . head + bias) / temperature)`.

    All logits [N, V] exist neither in the forward nor in the backward pass, which computes them again a block at a time
    (Wijmans et al. 2025, arXiv 2411.09009, without its filter of small gradients: none is dropped). Differentiable in
    hidden, head and bias, in their dtypes, summed in float32; the entropy too. What gets no cotangent costs nothing.

    Args:
      hidden: [N, D].
      head: [V, D] or [D, V]; which one is told by D.
      targets: [N] ids, or [N, K] for K log-probs per row (distillation: the teacher's top k, see `fused_top_k`). An id
        outside [0, V) gives NaN, and no gradient through that entry; where the ids are no tracers, a ValueError.
      bias: [V], added to the products; minus infinity rules a token out.
      softcap: products become `softcap * tanh(products / softcap)` (Gemma 2).
      needed: rows that are false give 0 and no gradient, are never read and cost next to nothing: the others are moved
        to the front, and blocks of rows behind them are skipped.
      with_entropy: return the distribution's entropy [N] (nats) as well.
      axis_name: under `shard_map`, the axis of devices among which the vocabulary is split in order: head and bias are
        this device's part, all of one size; hidden, targets and needed are the same on each; ids and results are
        global. (Pad a vocabulary that does not divide with a bias of minus infinity.)
      layout: "VD" or "DV", for a square head.
      implementation: None (the platform decides, when the program is lowered), "xla", "pallas_tpu", "pallas_gpu",
        "mosaic_gpu" (Hopper), "reference" (plain, holds all logits), or "interpret_tpu", "interpret_gpu",
        "interpret_mosaic" (the Pallas kernels on a CPU).

    Returns:
      float32 log-probs in the shape of targets; with `with_entropy` a pair of them and the entropy [N].

    Raises:
      ValueError: shapes, types or options that do not fit, ids outside the vocabulary that are known when this is
        called, or an implementation that cannot run here.
    """
    options = _check(hidden, head, bias, temperature, softcap, needed, layout, with_entropy)
    if targets.ndim not in (1, 2) or targets.shape[0] != hidden.shape[0] or not _is_integer(targets):
        raise ValueError(
            f"targets must be integers [{hidden.shape[0]}] or [{hidden.shape[0]}, K], one row of ids for each row of "
            f"hidden, got {targets.dtype} {list(targets.shape)}"
        )
    part = head.shape[options.vocab_axis]
    first: Any = 0
    vocab = part
    if axis_name is not None:
        first, vocab = jax.lax.axis_index(axis_name) * part, part * jax.lax.axis_size(axis_name)
    _check_ids(targets, needed, vocab)
    if not targets.size:
        zeros = jnp.zeros(targets.shape), jnp.zeros(hidden.shape[0])
        return zeros if with_entropy else zeros[0]
    ids = targets.astype(jnp.int32).reshape(hidden.shape[0], -1)
    call = _Call(options, implementation)
    if implementation == "reference":
        numbers = _reference(options, hidden, head, bias, ids - first, needed)
    else:
        numbers = _statistics_once(call, *_vary_alike(hidden, head, bias, ids - first, needed))
    normalizer, mean, picked = numbers if axis_name is None else _join(axis_name, part, ids - first, *numbers)
    logprob = jnp.where((ids >= 0) & (ids < vocab), picked - normalizer[:, None], jnp.nan)
    entropy = normalizer - mean
    if needed is not None:
        logprob, entropy = jnp.where(needed[:, None], logprob, 0), jnp.where(needed, entropy, 0)
    logprob = logprob.reshape(targets.shape)
    return (logprob, entropy) if with_entropy else logprob


def fused_top_k(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    k: int,
    *,
    bias: Float[Array, "V"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    axis_name: str | None = None,
    layout: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
    """The `k` most probable tokens of each row, log-probs (nats) and ids, without ever holding all logits.

    One pass over the vocabulary in blocks of XLA on every platform. The log-probs are differentiable as those of
    `fused_logprob` at constant ids. Arguments as there.

    Returns:
      float32 log-probs in falling order, and the int32 ids they belong to.

    Raises:
      ValueError: as `fused_logprob`, or `k` not between 1 and V, on each device where the vocabulary is split.
    """
    options = _check(hidden, head, bias, temperature, softcap, None, layout, False)
    part = head.shape[options.vocab_axis]
    if not 1 <= k <= part:
        raise ValueError(f"k={k} must be from 1 to the {part} entries of head {list(head.shape)}")
    if not hidden.size:
        return jnp.zeros((0, k)), jnp.zeros((0, k), jnp.int32)
    if implementation == "reference":
        normalizer, logits, ids = _reference_top_k(options, k, hidden, head, bias)
    else:
        call = _Call(options, implementation)
        normalizer, logits, ids = _top_k(call, k, *_vary_alike(hidden, head, bias))
    if axis_name is not None:
        # each device puts its candidates into a place of its own, so that the sum is the same everywhere
        here, size = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)

        def gather(x):
            slots = varying_like(jnp.zeros((x.shape[0], size, k), x.dtype), x).at[:, here].set(x)
            return jax.lax.psum(slots, axis_name).reshape(x.shape[0], size * k)

        ids = gather(ids + here * part)
        logits, chosen = jax.lax.top_k(gather(logits), k)
        ids = jnp.take_along_axis(ids, chosen, axis=1)
        normalizer, _, _ = _join_normalizers(axis_name, normalizer)
    return logits - normalizer[:, None], ids


class _Call(NamedTuple):
    """What a call is specialized on."""

    options: Options
    implementation: str | None


def _check(
    hidden: Any, head: Any, bias: Any, temperature: float, softcap: Any, needed: Any, layout: Any, with_mean: bool
) -> Options:
    shapes = f"hidden {list(hidden.shape)}, head {list(head.shape)}"
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] not in head.shape or 0 in head.shape:
        raise ValueError(f"expected hidden [N, D] and head [V, D] or [D, V], got {shapes}")
    if not (jnp.issubdtype(hidden.dtype, jnp.floating) and jnp.issubdtype(head.dtype, jnp.floating)):
        raise ValueError(f"hidden and head must be floating point, got {hidden.dtype} and {head.dtype}")
    if layout not in (None, "VD", "DV"):
        raise ValueError(f'layout={layout!r}: expected "VD", "DV" or None, which reads it off the shape')
    if layout is None and head.shape[0] == head.shape[1]:
        raise ValueError(
            f'head {list(head.shape)} is square: say with layout="VD" or "DV" which axis the vocabulary is'
        )
    vocab_axis = {"VD": 0, "DV": 1}.get(layout or "", 0 if head.shape[1] == hidden.shape[1] else 1)
    if head.shape[1 - vocab_axis] != hidden.shape[1]:
        raise ValueError(f"layout={layout!r} does not fit {shapes}")
    vocab = head.shape[vocab_axis]
    if bias is not None and bias.shape != (vocab,):
        raise ValueError(f"bias must have one entry for each of the {vocab} of head, got {list(bias.shape)}")
    if not temperature > 0:
        raise ValueError(
            f"temperature must be positive, got {temperature}; for the most probable token take fused_top_k"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}; for none, leave it None")
    if needed is not None and (needed.shape != hidden.shape[:1] or needed.dtype != bool):
        raise ValueError(f"needed must be boolean [{hidden.shape[0]}], got {needed.dtype} {list(needed.shape)}")
    return Options(float(temperature), None if softcap is None else float(softcap), vocab_axis, with_mean)


def _is_integer(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer)


def _check_ids(targets: Any, needed: Any, vocab: int) -> None:
    """Raises ValueError for ids outside the vocabulary, as far as they are known before the program runs."""
    if isinstance(targets, jax.core.Tracer) or isinstance(needed, jax.core.Tracer):
        return
    ids = np.asarray(targets) if needed is None else np.asarray(targets)[np.asarray(needed)]
    if ids.size and (ids.min() < 0 or ids.max() >= vocab):
        raise ValueError(f"targets must lie in [0, {vocab}), got {ids.min()} to {ids.max()}; mask others with needed")


def _vary_alike(*arrays: Any) -> list[Any]:
    """Under `shard_map`, every array typed as differing between devices where any does.

    So loops and kernels see one kind of array, and the sums over devices that a gradient needs stand outside of them,
    where JAX puts them by itself.
    """
    union = next(x for x in arrays if x is not None)
    for x in arrays:
        union = union if x is None else varying_like(union, x)
    return [None if x is None else varying_like(x, union) for x in arrays]


def _join(axis_name: str, part: int, ids: Array, normalizer: Array, mean: Array, picked: Array) -> Any:
    """The three numbers of a row for the whole vocabulary, from those of each device's part of it."""
    whole, share, total = _join_normalizers(axis_name, normalizer)
    picked = jax.lax.psum(jnp.where((ids >= 0) & (ids < part), picked, 0), axis_name)
    return whole, jax.lax.psum(share * mean, axis_name) / total, picked


def _join_normalizers(axis_name: str, normalizer: Array) -> tuple[Array, Array, Array]:
    peak = jax.lax.pmax(jax.lax.stop_gradient(normalizer), axis_name)
    share = jnp.exp(normalizer - peak)
    total = jax.lax.psum(share, axis_name)
    return peak + jnp.log(total), share, total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(call, hidden, head, bias, ids, needed):
    return _forward(call, hidden, head, bias, ids, needed)[0]


def _forward(call, hidden, head, bias, ids, needed):
    moved = _Moved(needed)
    refusal = logprob_hopper.refusal(call.options, hidden, head)
    version = choose(
        call.implementation,
        cpu=functools.partial(logprob_xla.forward, call.options),
        tpu=functools.partial(logprob_tpu.forward, call.options),
        gpu=functools.partial(logprob_gpu.forward, call.options),
        hopper=refusal or functools.partial(logprob_hopper.forward, call.options),
        interpret_mosaic=refusal or functools.partial(logprob_hopper.forward, call.options, interpret=True),
        interpret_tpu=functools.partial(logprob_tpu.forward, call.options, interpret=True),
        interpret_gpu=functools.partial(logprob_gpu.forward, call.options, interpret=True),
    )
    numbers = version(moved.forth(hidden), head, bias, moved.forth(ids), moved.count)
    return tuple(moved.back(x) for x in numbers), numbers[:2]


def _statistics_forward(call, hidden, head, bias, ids, needed):
    hidden, head, ids = hidden.value, head.value, ids.value
    bias, needed = (None if x is None else x.value for x in (bias, needed))
    numbers, statistics = _forward(call, hidden, head, bias, ids, needed)
    return numbers, (hidden, head, bias, ids, needed, statistics)


def _statistics_backward(call, saved, cotangents):
    hidden, head, bias, ids, needed, statistics = saved
    return *_gradients(call, hidden, head, bias, ids, needed, statistics, cotangents), None, None


_statistics.defvjp(_statistics_forward, _statistics_backward, symbolic_zeros=True)
_statistics_once = jax.jit(_statistics, static_argnums=0)  # outside jit, its loops would be compiled at every call


def _gradients(call, hidden, head, bias, ids, needed, statistics, cotangents):
    """Gradients of hidden, head and bias. `statistics` are those of the needed rows, in their order."""
    moved = _Moved(needed)
    to_normalizer, to_mean, to_picked = (None if isinstance(x, SymbolicZero) else moved.forth(x) for x in cotangents)
    to_normalizer = jnp.zeros_like(statistics[0]) if to_normalizer is None else to_normalizer
    to_picked = jnp.zeros(ids.shape) if to_picked is None else to_picked

    def driver(block, sizes, **kwargs):
        return functools.partial(logprob_xla.backward, call.options, functools.partial(block, **kwargs), sizes)

    hopper, sizes = logprob_hopper.gradient_block, logprob_hopper.BACKWARD_SIZES
    refusal = logprob_hopper.refusal(call.options, hidden, head)
    version = choose(
        call.implementation,
        cpu=driver(logprob_xla.gradient_block, logprob_xla.CPU_SIZES),
        tpu=driver(logprob_tpu.gradient_block, logprob_tpu.BACKWARD_SIZES),
        gpu=driver(logprob_gpu.gradient_block, logprob_gpu.BACKWARD_SIZES),
        hopper=refusal or driver(hopper, sizes),
        interpret_mosaic=refusal or driver(hopper, sizes, interpret=True),
        interpret_tpu=driver(logprob_tpu.gradient_block, logprob_tpu.BACKWARD_SIZES, interpret=True),
        interpret_gpu=driver(logprob_gpu.gradient_block, logprob_gpu.BACKWARD_SIZES, interpret=True),
    )
    arrays = moved.forth(hidden), head, bias, moved.forth(ids), statistics, (to_normalizer, to_mean, to_picked)
    hidden_grad, head_grad, bias_grad = version(*arrays, moved.count)
    return moved.back(hidden_grad), head_grad, bias_grad


class _Moved:
    """Needed rows moved to the front, in their order, and back."""

    def __init__(self, needed):
        self.needed, self.count = needed, None
        if needed is not None:
            size = needed.shape[0]
            self.count = jnp.sum(needed, dtype=jnp.int32)
            self.place = jnp.cumsum(needed, dtype=jnp.int32) - 1
            nowhere = varying_like(jnp.full(size, size, jnp.int32), needed)
            self.order = nowhere.at[jnp.where(needed, self.place, size)].set(jnp.arange(size), mode="drop")

    def forth(self, x):
        return x if self.needed is None else jnp.take(x, self.order, axis=0, mode="fill", fill_value=0)

    def back(self, x):
        if self.needed is None:
            return x
        needed = self.needed.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(needed, jnp.take(x, self.place, axis=0, mode="clip"), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _top_k(call, k, hidden, head, bias):
    version = choose(call.implementation, cpu=functools.partial(logprob_xla.top_k, call.options, k))
    return version(hidden, head, bias)


def _top_k_forward(call, k, hidden, head, bias):
    numbers = _top_k(call, k, hidden, head, bias)
    return numbers, (hidden, head, bias, numbers[2], numbers[0])


def _top_k_backward(call, k, saved, cotangents):
    hidden, head, bias, ids, normalizer = saved
    numbers = cotangents[0], SymbolicZero(jax.typeof(normalizer)), cotangents[1]
    return _gradients(call, hidden, head, bias, ids, None, (normalizer, jnp.zeros_like(normalizer)), numbers)


_top_k.defvjp(_top_k_forward, _top_k_backward)


def _reference(options, hidden, head, bias, ids, needed):
    """All logits at once, differentiated by JAX."""
    if needed is not None:  # what is never read must not reach the gradient of the head as 0 * NaN
        hidden = jnp.where(needed[:, None], hidden, 0)
    logits = _all_logits(options, hidden, head, bias)
    finite = jnp.maximum(logits, LOWEST)
    normalizer = jax.nn.logsumexp(finite, axis=1)
    mean = jnp.sum(jnp.exp(finite - normalizer[:, None]) * finite, axis=1)
    picked = jnp.take_along_axis(logits, jnp.clip(ids, 0, logits.shape[1] - 1), axis=1)
    return normalizer, mean, picked


def _reference_top_k(options, k, hidden, head, bias):
    logits = _all_logits(options, hidden, head, bias)
    return jax.nn.logsumexp(jnp.maximum(logits, LOWEST), axis=1), *jax.lax.top_k(logits, k)


def _all_logits(options, hidden, head, bias):
    dtype = jnp.promote_types(hidden.dtype, head.dtype)
    products = dot(hidden.astype(dtype), head.astype(dtype), 1, 1 - options.vocab_axis)
    return logits_of(products, bias, options)[0]
