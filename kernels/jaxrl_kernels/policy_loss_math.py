"""What the versions of `fused_policy_loss` share: the terms of a token, their derivative and their sums over a row."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

MAX_LOG_RATIO = 20.0

# What is summed over the tokens of a row; behind these come its smallest and its largest ratio.
SUMS = ("objective", "bonus", "count", "ratio", "clipped", "dual_clipped", "k1", "k3", "kl", "entropy")
STATISTICS = (*SUMS, "ratio_min", "ratio_max")


class Terms(NamedTuple):
    """The static options of a token's loss."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_kind: str


class Inputs(NamedTuple):
    """Arrays [B, T] beside the log-probs; `kl_coefficient` is [1, 1]."""

    old_logprobs: Array
    advantages: Array
    mask: Array
    kl_coefficient: Array
    ref_logprobs: Array | None
    entropy: Array | None
    weights: Array | None


def token_terms(logprobs: Array, inputs: Inputs, terms: Terms) -> tuple[Array, dict[str, Array]]:
    """The objective of each token and whatever else is summed, 0 at false entries; of whole arrays or of a block."""
    mask = inputs.mask != 0

    def select(x: Array) -> Array:
        return jnp.where(mask, x.astype(jnp.float32), 0.0)

    own, advantage = select(logprobs), select(inputs.advantages)
    log_ratio = jnp.clip(own - select(inputs.old_logprobs), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = jnp.exp(log_ratio)
    plain = -advantage * ratio
    clipped = -advantage * jnp.clip(ratio, 1 - terms.clip_low, 1 + terms.clip_high)
    objective = jnp.maximum(plain, clipped)
    tokens = {
        "count": select(jnp.ones_like(ratio)),
        "ratio": select(ratio),
        "clipped": select(clipped > plain),
        "k1": -log_ratio,
        "k3": _expm1(log_ratio) - log_ratio,
    }
    if terms.dual_clip is not None:
        bound = -terms.dual_clip * advantage
        active = (advantage < 0) & (objective > bound)
        objective = jnp.where(active, bound, objective)
        tokens["dual_clipped"] = select(active)
    if inputs.ref_logprobs is not None:
        kl = _kl(own - select(inputs.ref_logprobs), terms.kl_kind)
        objective = objective + inputs.kl_coefficient * kl
        tokens["kl"] = kl
    weight = 1.0 if inputs.weights is None else select(inputs.weights)
    if inputs.entropy is not None:
        tokens["entropy"] = select(inputs.entropy)
        tokens["bonus"] = weight * tokens["entropy"]
    objective = weight * objective
    return objective, {"objective": objective, **tokens}


def _kl(d: Array, kind: str) -> Array:
    """The estimates of `fused_policy_loss`; in k3 the difference is bounded by 20 and the value by 10."""
    if kind in ("k1", "abs"):
        return d if kind == "k1" else jnp.abs(d)
    k2 = d**2 / 2
    if kind == "k2":
        return k2
    bounded = jnp.clip(d, -20, 20)
    k3 = jnp.clip(_expm1(-bounded) + bounded, -10, 10)
    if kind == "k3":
        return k3
    return jax.lax.stop_gradient(d if kind == "k1+" else k3) + (k2 - jax.lax.stop_gradient(k2))


def _expm1(x: Array) -> Array:
    """`exp(x) - 1` exact near 0; Pallas has no `expm1` on a TPU."""
    return jnp.tanh(x / 2) * (jnp.exp(x) + 1)


def one_pass(logprobs: Array, inputs: Inputs, terms: Terms, keepdims: bool = False) -> tuple[list[Array], Array]:
    """The statistics over the last axis in the order of STATISTICS, and the derivative."""
    objective = functools.partial(token_terms, inputs=inputs, terms=terms)
    logprobs = logprobs.astype(jnp.float32)
    _, derivative, tokens = jax.jvp(objective, (logprobs,), (jnp.ones_like(logprobs),), has_aux=True)
    reduce: dict[str, Any] = {"axis": -1, "keepdims": keepdims}
    nothing = jnp.zeros_like(logprobs)
    counted, ratio = inputs.mask != 0, tokens["ratio"]
    sums = [jnp.sum(tokens.get(name, nothing), **reduce) for name in SUMS]
    lowest = jnp.min(jnp.where(counted, ratio, jnp.inf), initial=jnp.inf, **reduce)
    highest = jnp.max(jnp.where(counted, ratio, -jnp.inf), initial=-jnp.inf, **reduce)
    return [*sums, lowest, highest], derivative


def merge(name: str, x: Array, y: Array) -> Array:
    """A statistic of two pieces of a row."""
    return jnp.minimum(x, y) if name == "ratio_min" else jnp.maximum(x, y) if name == "ratio_max" else x + y


def in_lanes(numbers: list[Array], shape: tuple[int, ...]) -> Array:
    """The i-th number (or column) in lane i, 0 behind the last."""
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    result = jnp.zeros(shape, jnp.float32)
    for i, number in enumerate(numbers):
        result = jnp.where(lane == i, number, result)
    return result
