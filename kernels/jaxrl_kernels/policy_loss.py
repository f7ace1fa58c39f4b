"""The policy's loss and its gradient in one pass over `[B, T]`: ratio, clip, dual clip, KL to a reference, entropy.

Every reduction ("token", "seq", ...) is a sum over tokens times one factor a row, which depends on the mask alone. So
the pass returns sums over each row's tokens and the derivative of each token's term without its factor, by `jax.jvp` of
the function that gives the values; what remains is arithmetic on [B], and a backward pass that multiplies.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from jaxrl_kernels import policy_loss_hopper
from jaxrl_kernels.dispatch import choose
from jaxrl_kernels.mesh import split_rows
from jaxrl_kernels.policy_loss_math import STATISTICS, Inputs, Terms, in_lanes, merge, one_pass, token_terms

Tokens = Float[Array, "B T"]
Number = Float[Array, ""] | float
KlKind = Literal["k1", "k2", "k3", "abs", "k1+", "k3+"]
Aggregation = Literal["token", "seq", "seq_sum", "const", "rollout"]

TPU_ROWS, TPU_LANES = 32, 512
GPU_CHUNK = 1024


def fused_policy_loss(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Tokens,
    mask: Bool[Array, "B T"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ref_logprobs: Tokens | None = None,
    kl_coefficient: Number = 0.0,
    kl_kind: KlKind = "k3",
    entropy: Tokens | None = None,
    entropy_coefficient: Number = 0.0,
    agg: Aggregation = "token",
    max_len: int | None = None,
    rollout_ids: Int[Array, "B"] | None = None,
    weights: Tokens | None = None,
    denominator: Number | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """PPO's clipped loss (Schulman et al. 2017, eq. 7) + kl_coefficient * KL - entropy_coefficient * entropy.

    Gradients go to `logprobs` and `entropy`; everything else is a constant.

    Args:
      logprobs, old_logprobs, advantages, mask: [B, T], nats; what stands under a false entry is never read.
      clip_low, clip_high: the ratio's band is [1 - clip_low, 1 + clip_high].
      dual_clip: c > 1, for A < 0 the loss of a token is at most `-c * A` (Ye et al. 2020).
      ref_logprobs: [B, T], under the reference of the KL term; without it there is none.
      kl_kind: the estimate from one sample, with `d = logprobs - ref_logprobs` (Schulman 2020): "k1" d, "k2" d^2 / 2,
        "k3" exp(-d) - 1 + d, "abs" |d|; "k1+" and "k3+" have the value of the one and the gradient of k2.
      entropy: [B, T] of the policy at each token, nats.
      agg: the reduction of all three terms. "token": over all true tokens; "seq": a mean per row, then over rows that
        have a token; "seq_sum": sum over tokens, mean over those rows; "const": sum over `B * max_len`; "rollout": as
        "seq" with all rows of one of `rollout_ids` [B] as one.
      weights: [B, T] factors of the tokens in all three terms.
      denominator: in place of this batch's (tokens or rows), for a micro-batch of a larger one.
      implementation: None, "xla", "reference", "pallas_tpu", "pallas_gpu", "mosaic_gpu" (Hopper), or, for
        tests, "interpret_tpu", "interpret_gpu", "interpret_mosaic"; see `dispatch.choose`.

    Returns:
      The loss, a float32 scalar, 0 for an empty mask; and token means over the mask without gradient: `ratio_mean`,
      `ratio_min`, `ratio_max`, `clip_fraction`, `approx_kl_k1`, `approx_kl_k3`, and where asked for
      `dual_clip_fraction`, `kl`, `entropy`.

    Raises:
      ValueError: shapes, a number out of its range, unknown `agg` or `kl_kind`, `agg="const"` without `max_len`,
        "rollout" without `rollout_ids`, an implementation that is unknown or cannot run here.
    """
    arrays = {"old_logprobs": old_logprobs, "advantages": advantages, "mask": mask, "ref_logprobs": ref_logprobs}
    _check_shapes(logprobs, {**arrays, "entropy": entropy, "weights": weights}, rollout_ids)
    for name, value, choices in (("agg", agg, Aggregation), ("kl_kind", kl_kind, KlKind)):
        if value not in get_args(choices):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}; got {value!r}")
    if not 0 <= clip_low < 1 or not clip_high >= 0:
        raise ValueError(f"clip_low must lie in [0, 1) and clip_high be at least 0, got {clip_low} and {clip_high}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be greater than 1, or None for no such clip; got {dual_clip}")
    if agg == "const" and (max_len is None or max_len < 1):
        raise ValueError(f'agg="const" needs max_len >= 1, the constant that a row is divided by; got {max_len}')
    if agg == "rollout" and rollout_ids is None:
        raise ValueError('agg="rollout" needs rollout_ids, the rollout that each row is a piece of; got None')

    coefficient = jnp.asarray(kl_coefficient, jnp.float32).reshape(1, 1)
    inputs = Inputs(old_logprobs, advantages, mask, coefficient, ref_logprobs, entropy, weights)
    terms = Terms(clip_low, clip_high, dual_clip, kl_kind)
    sums = dict(zip(STATISTICS, _row_statistics(logprobs, inputs, terms, implementation).T, strict=True))
    factors, own = _row_factors(sums["count"], agg, max_len, rollout_ids)
    total = sums["objective"] - jax.lax.stop_gradient(entropy_coefficient) * sums["bonus"]
    loss = _divide(jnp.sum(factors * total), own if denominator is None else denominator)
    return loss, jax.lax.stop_gradient(_metrics(sums, inputs, terms))


def _check_shapes(logprobs: Any, arrays: dict[str, Any], rollout_ids: Any) -> None:
    if logprobs.ndim != 2 or not jnp.issubdtype(logprobs.dtype, jnp.floating):
        raise ValueError(
            f"logprobs must be floating point of shape [B, T], got {logprobs.dtype} {list(logprobs.shape)}"
        )
    for name, array in arrays.items():
        if array is not None and array.shape != logprobs.shape:
            raise ValueError(f"{name} must have the shape of logprobs, {list(logprobs.shape)}, got {list(array.shape)}")
    if arrays["mask"].dtype != bool:
        raise ValueError(f"mask must be boolean, got {arrays['mask'].dtype}; pass mask != 0")
    if rollout_ids is not None and rollout_ids.shape != logprobs.shape[:1]:
        raise ValueError(f"rollout_ids must have shape {list(logprobs.shape[:1])}, got {list(rollout_ids.shape)}")


def _row_factors(
    count: Float[Array, "B"], agg: str, max_len: int | None, rollout_ids: Array | None
) -> tuple[Array, Array]:
    """The factor of each row's sum, and the denominator, from the number of true tokens of each row."""
    rows = jnp.sum(count > 0, dtype=jnp.float32)
    if agg == "token":
        return jnp.ones_like(count), jnp.sum(count)
    if agg == "const":
        return jnp.ones_like(count), jnp.float32(len(count) * (max_len or 1))
    if agg == "seq_sum":
        return jnp.ones_like(count), rows
    if agg == "seq" or rollout_ids is None:
        return _divide(1.0, count), rows
    # Ids may be any integers: a row takes the count of all rows with its id, the first of them stands for all.
    same = rollout_ids[:, None] == rollout_ids[None, :]
    counts = jnp.sum(jnp.where(same, count[None, :], 0), axis=1)
    first = jnp.argmax(same, axis=1) == jnp.arange(len(count))
    return _divide(1.0, counts), jnp.sum(first & (counts > 0), dtype=jnp.float32)


def _metrics(sums: dict[str, Array], inputs: Inputs, terms: Terms) -> dict[str, Array]:
    count = jnp.sum(sums["count"])
    names = {"ratio_mean": "ratio", "clip_fraction": "clipped", "approx_kl_k1": "k1", "approx_kl_k3": "k3"}
    names |= {} if terms.dual_clip is None else {"dual_clip_fraction": "dual_clipped"}
    names |= {name: name for name, x in (("kl", inputs.ref_logprobs), ("entropy", inputs.entropy)) if x is not None}
    metrics = {name: _divide(jnp.sum(sums[source]), count) for name, source in names.items()}
    lowest = jnp.min(sums["ratio_min"], initial=jnp.inf)
    highest = jnp.max(sums["ratio_max"], initial=-jnp.inf)
    return metrics | {"ratio_min": jnp.where(count > 0, lowest, 0), "ratio_max": jnp.where(count > 0, highest, 0)}


def _divide(numerator: Array | float, denominator: Array | float) -> Array:
    """0, with a zero gradient, where the denominator (a count) is not positive."""
    positive = jnp.asarray(denominator) > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _row_statistics(logprobs: Array, inputs: Inputs, terms: Terms, implementation: str | None) -> Float[Array, "B S"]:
    return _run(logprobs, inputs, terms, implementation)[0]


def _forward(logprobs: Array, inputs: Inputs, terms: Terms, implementation: str | None) -> Any:
    statistics, derivative = _run(logprobs, inputs, terms, implementation)
    like = [None if x is None else jnp.zeros((), x.dtype) for x in (logprobs, inputs.entropy)]
    return statistics, (derivative, inputs.mask, inputs.weights, like)


def _backward(terms: Terms, implementation: str | None, saved: Any, cotangent: Array) -> Any:
    """The objective reaches the log-probs, the bonus the entropy; the other statistics are metrics and counts."""
    derivative, mask, weights, (own, entropy) = saved
    to_objective, to_bonus = (cotangent[:, STATISTICS.index(name)][:, None] for name in ("objective", "bonus"))
    to_logprobs = (to_objective * derivative).astype(own.dtype)
    nothing: dict[str, Any] = dict.fromkeys(Inputs._fields)
    if entropy is not None:
        factor = to_bonus if weights is None else to_bonus * weights.astype(jnp.float32)
        nothing["entropy"] = jnp.where(mask, factor, 0).astype(entropy.dtype)
    return to_logprobs, Inputs(**nothing)


_row_statistics.defvjp(_forward, _backward)


def _run(logprobs: Array, inputs: Inputs, terms: Terms, implementation: str | None) -> tuple[Array, Array]:
    """Statistics [B, S] of the rows and the derivative [B, T] of each token's objective in its log-prob."""
    versions: dict[str, Any] = {"cpu": _xla, "tpu": _pallas_tpu, "gpu": _pallas_gpu, "reference": _reference}
    versions["interpret_tpu"] = functools.partial(_pallas_tpu, interpret=True)
    versions["interpret_gpu"] = functools.partial(_pallas_gpu, interpret=True)
    versions["hopper"] = policy_loss_hopper.row_statistics
    versions["interpret_mosaic"] = functools.partial(policy_loss_hopper.row_statistics, interpret=True)
    run = choose(
        implementation, **{name: functools.partial(version, terms=terms) for name, version in versions.items()}
    )
    run = split_rows(run, (logprobs, inputs), len(logprobs)) if logprobs.size else functools.partial(_xla, terms=terms)
    return run(logprobs, inputs)


def _xla(logprobs: Array, inputs: Inputs, *, terms: Terms) -> tuple[Array, Array]:
    statistics, derivative = one_pass(logprobs, inputs, terms)
    return jnp.stack(statistics, axis=1), derivative


def _reference(logprobs: Array, inputs: Inputs, *, terms: Terms) -> tuple[Array, Array]:
    """The same from JAX's own reverse mode."""

    def total(x: Array) -> tuple[Array, Array]:
        statistics, _ = _xla(x, inputs, terms=terms)
        return jnp.sum(token_terms(x, inputs, terms)[0]), statistics

    derivative, statistics = jax.grad(total, has_aux=True)(logprobs.astype(jnp.float32))
    return statistics, derivative


def _pallas_tpu(logprobs: Array, inputs: Inputs, *, terms: Terms, interpret: Any = False) -> tuple[Array, Array]:
    """Blocks [32, 512]; the statistics of 32 rows are lanes of one tile that stays in VMEM along the rows."""
    num_rows, length = logprobs.shape
    rows, lanes = min(num_rows, TPU_ROWS), min(pl.cdiv(length, 128) * 128, TPU_LANES)
    arrays, form = jax.tree.flatten((logprobs, inputs._replace(mask=inputs.mask.astype(jnp.int8))))

    def kernel(*refs):
        statistics_ref, derivative_ref = refs[-2:]
        step = pl.program_id(1)
        own, block = jax.tree.unflatten(form, [ref[...] for ref in refs[:-2]])
        place = step * lanes + jax.lax.broadcasted_iota(jnp.int32, (rows, lanes), 1)
        # the last block reaches beyond the row, where anything may stand
        block = block._replace(mask=jnp.where(place < length, block.mask.astype(jnp.int32), 0))
        statistics, derivative_ref[...] = one_pass(own, block, terms, keepdims=True)

        @pl.when(step == 0)
        def _():
            statistics_ref[...] = in_lanes(statistics, (rows, 128))

        @pl.when(step > 0)
        def _():
            sums = [statistics_ref[:, i : i + 1] for i in range(len(STATISTICS))]
            merged = [merge(*pieces) for pieces in zip(STATISTICS, sums, statistics, strict=True)]
            statistics_ref[...] = in_lanes(merged, (rows, 128))

    tile = pl.BlockSpec((rows, lanes), lambda row, step: (row, step))
    number = pl.BlockSpec((1, 1), lambda row, step: (0, 0))
    statistics, derivative = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(num_rows, rows), pl.cdiv(length, lanes)),
        in_specs=_specs(inputs, tile, number),
        out_specs=(pl.BlockSpec((rows, 128), lambda row, step: (row, 0)), tile),
        out_shape=tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((num_rows, 128), logprobs.shape)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="fused_policy_loss",
    )(*arrays)
    return statistics[:, : len(STATISTICS)], derivative


def _pallas_gpu(logprobs: Array, inputs: Inputs, *, terms: Terms, interpret: bool = False) -> tuple[Array, Array]:
    """A row per program, 1024 tokens at a time, the statistics in registers."""
    num_rows, length = logprobs.shape
    chunk, width = min(pl.next_power_of_2(length), GPU_CHUNK), pl.next_power_of_2(len(STATISTICS))
    arrays, form = jax.tree.flatten((logprobs, inputs._replace(mask=inputs.mask.astype(jnp.int8))))

    def kernel(*refs):
        statistics_ref, derivative_ref = refs[-2:]

        def body(step, sums):
            place = pl.ds(step * chunk, chunk)
            inside = step * chunk + jnp.arange(chunk) < length
            blocks = [
                ref[0, 0] if ref.ndim == 2 else plgpu.load(ref.at[place], mask=inside, other=0) for ref in refs[:-2]
            ]
            own, block = jax.tree.unflatten(form, blocks)
            statistics, derivative = one_pass(own, block, terms)
            plgpu.store(derivative_ref.at[place], derivative, mask=inside)
            return [merge(*pieces) for pieces in zip(STATISTICS, sums, statistics, strict=True)]

        start = [jnp.float32({"ratio_min": jnp.inf, "ratio_max": -jnp.inf}.get(name, 0)) for name in STATISTICS]
        statistics_ref[...] = in_lanes(jax.lax.fori_loop(0, pl.cdiv(length, chunk), body, start), (width,))

    row = pl.BlockSpec((None, length), lambda index: (index, 0))
    number = pl.BlockSpec((1, 1), lambda index: (0, 0))
    statistics, derivative = pl.pallas_call(
        kernel,
        grid=(num_rows,),
        in_specs=_specs(inputs, row, number),
        out_specs=(pl.BlockSpec((None, width), lambda index: (index, 0)), row),
        out_shape=tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((num_rows, width), logprobs.shape)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="fused_policy_loss",
    )(*arrays)
    return statistics[:, : len(STATISTICS)], derivative


def _specs(inputs: Inputs, tokens: pl.BlockSpec, number: pl.BlockSpec) -> list[pl.BlockSpec]:
    """One per array, in the order that the pytree (log-probs, inputs) flattens to."""
    specs = [number if name == "kl_coefficient" else tokens for name, x in inputs._asdict().items() if x is not None]
    return [tokens, *specs]
