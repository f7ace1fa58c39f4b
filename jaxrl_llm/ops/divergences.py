"""Entropies and divergences, one number per position; the caller takes the mean by its name (`masked_mean`,
`reduce_loss`)."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.ops._checks import check_choice, check_range, check_shapes
from jaxrl_llm.ops.masked import select

KlKind = Literal["k1", "k2", "k3", "abs", "k1+", "k3+"]


def token_entropy(logits: Float[Array, "... V"], mask: Bool[Array, "..."] | None = None) -> Float[Array, "..."]:
    """`-sum_v p log p` in nats, p the softmax of the last axis. Excluded tokens may have logits of -inf. 0 off the
    mask."""
    check_shapes(logits=(logits, "... V"), mask=(mask, "..."))
    scores = _read(logits, mask)
    possible = scores > -jnp.inf
    log_p = select(jax.nn.log_softmax(scores, axis=-1), possible)
    return -jnp.sum(select(jnp.exp(log_p), possible) * log_p, axis=-1) * _live(mask)


def kl_estimate(
    logprobs: Float[Array, "..."],
    ref_logprobs: Float[Array, "..."],
    *,
    kind: KlKind = "k3",
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """Estimates KL(policy || reference) from a token that the policy sampled, with `d = logprobs - ref_logprobs`:

    | `kind` | value             | as an estimate of the KL | its gradient as one of the KL's gradient    |
    | ------ | ----------------- | ------------------------ | ------------------------------------------- |
    | "k1"   | `d`               | unbiased                 | BIASED: its mean is zero                    |
    | "k2"   | `d^2 / 2`         | BIASED                   | unbiased                                    |
    | "k3"   | `exp(-d) - 1 + d` | unbiased                 | BIASED: the mean is that of KL(reference || policy) |
    | "abs"  | `|d|`             | BIASED                   | BIASED                                      |
    | "k1+"  | `d`               | unbiased                 | unbiased: that of k2                        |
    | "k3+"  | `exp(-d) - 1 + d` | unbiased                 | unbiased: that of k2                        |

    Unbiased holds for samples of the policy itself; for an older policy's, weight by the ratio. Estimators after
    Schulman 2020. As in verl, d is clamped to [-20, 20] in the exponent and k3 to [-10, 10], beyond which it has no
    gradient. The reference gets no gradient. With `mask`, positions under a false entry are not read and give 0.
    """
    check_shapes(logprobs=(logprobs, "..."), ref_logprobs=(ref_logprobs, "..."), mask=(mask, "..."))
    check_choice("kind", kind, KlKind)
    mask = jnp.ones(logprobs.shape, bool) if mask is None else mask
    d = select(logprobs, mask) - jax.lax.stop_gradient(select(ref_logprobs, mask))
    if kind == "k1":
        return d
    if kind == "abs":
        return jnp.abs(d)
    k2 = d**2 / 2
    if kind == "k2":
        return k2
    clamped = jnp.clip(d, -20, 20)
    k3 = jnp.clip(jnp.expm1(-clamped) + clamped, -10, 10)
    if kind == "k3":
        return k3
    value = d if kind == "k1+" else k3
    # Straight through: the value of the one, the slope of k2.
    return jax.lax.stop_gradient(value) + (k2 - jax.lax.stop_gradient(k2))


def update_kl_coefficient(
    coef: Float[Array, ""] | float,
    kl: Float[Array, ""] | float,
    *,
    target: float,
    rate: float,
    clip: float = 0.2,
    floor: float = 0.0,
) -> Float[Array, ""]:
    """`max(coef * (1 + rate * clip(kl / target - 1, -clip, clip)), floor)`, a proportional controller (Ziegler et al.
    2019).

    `kl` and `target` are in the same unit (nats per sequence or per token); `rate` is samples per step over the
    horizon.
    """
    check_range("target", target, 0, open_low=True)
    check_range("rate", rate, 0)
    check_range("clip", clip, 0)
    check_range("floor", floor, 0)
    error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1, -clip, clip)
    return jnp.maximum(jnp.asarray(coef, jnp.float32) * (1 + rate * error), floor)


def categorical_kl(
    logits_p: Float[Array, "... V"], logits_q: Float[Array, "... V"], mask: Bool[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """`sum_v p (log p - log q)` in nats per position, p and q the softmax of the logits; 0 off the mask.

    Excluded tokens may have logits of -inf: one that p excludes adds nothing, one that q alone excludes makes it
    infinite.
    """
    check_shapes(logits_p=(logits_p, "... V"), logits_q=(logits_q, "... V"), mask=(mask, "..."))
    scores_p, scores_q = _read(logits_p, mask), _read(logits_q, mask)
    possible = scores_p > -jnp.inf
    log_p, log_q = (select(jax.nn.log_softmax(scores, axis=-1), possible) for scores in (scores_p, scores_q))
    return jnp.sum(select(jnp.exp(log_p), possible) * (log_p - log_q), axis=-1) * _live(mask)


def symmetric_kl(
    logits_p: Float[Array, "... V"], logits_q: Float[Array, "... V"], mask: Bool[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """KL(p || q) + KL(q || p), the sum and not its half, in nats per position; see `categorical_kl`."""
    return categorical_kl(logits_p, logits_q, mask) + categorical_kl(logits_q, logits_p, mask)


def jensen_shannon(p: Float[Array, "... N"], q: Float[Array, "... N"], *, base: float = 2.0) -> Float[Array, "..."]:
    """`KL(p || m) / 2 + KL(q || m) / 2`, m the mean of the two distributions (not logits) on the last axis.

    In [0, 1] for base 2. `0 log 0 = 0`: entries of probability 0 in both, such as padding, add nothing.
    """
    check_shapes(p=(p, "... N"), q=(q, "... N"))
    check_range("base", base, 1, open_low=True)
    p, q = p.astype(jnp.float32), q.astype(jnp.float32)
    middle = (p + q) / 2
    return jnp.sum(_p_log_ratio(p, middle) + _p_log_ratio(q, middle), axis=-1) / (2 * math.log(base))


def _p_log_ratio(p: Float[Array, "..."], q: Float[Array, "..."]) -> Float[Array, "..."]:
    positive = p > 0
    return p * (jnp.log(jnp.where(positive, p, 1)) - jnp.log(jnp.where(positive, q, 1)))


def _read(logits: Float[Array, "... V"], mask: Bool[Array, "..."] | None) -> Float[Array, "... V"]:
    return logits.astype(jnp.float32) if mask is None else select(logits, mask[..., None])


def _live(mask: Bool[Array, "..."] | None) -> Float[Array, "..."] | float:
    return 1.0 if mask is None else mask.astype(jnp.float32)
