"""Losses of pairs, a chosen and a rejected sequence each; they return (loss, metrics).

A batch of P pairs is stacked: rows 0..P-1 are chosen, rows P..2P-1 rejected, in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxrl_llm.ops._checks import check_choice, check_range, check_shapes
from jaxrl_llm.ops.masked import all_if_none, masked_mean, safe_divide, select, sequence_logprob
from jaxrl_llm.types import Metrics

DpoKind = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "sigmoid_norm",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "aot",
    "aot_unpaired",
    "sft",
]
log_sigmoid, sigmoid = jax.nn.log_sigmoid, jax.nn.sigmoid


class PairStats(NamedTuple):
    """Of each pair's two sequences: log-probs summed under the policy and the reference, and numbers of tokens."""

    chosen: Float[Array, "P"]
    rejected: Float[Array, "P"]
    ref_chosen: Float[Array, "P"]
    ref_rejected: Float[Array, "P"]
    chosen_counts: Float[Array, "P"]
    rejected_counts: Float[Array, "P"]


def pairwise_logistic_loss(
    margins: Float[Array, "..."],
    labels: Float[Array, "..."] | float = 1.0,
    *,
    weights: Float[Array, "..."] | None = None,
    valid: Bool[Array, "..."] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """`-y * log sigmoid(m) - (1 - y) * log sigmoid(-m)`, the weighted mean over valid pairs: Bradley-Terry for score
    gaps, DPO for `beta * (log-ratio chosen - log-ratio rejected)`.

    Args:
      margins: what speaks for the first of each pair.
      labels: probability that the first is better; 0.5 for a tie. No gradient.
      weights: from 0 on; the loss is divided by their sum. No gradient.

    Metrics: `accuracy`, share of pairs with a margin above 0; `margin`, their mean; both unweighted.
    """
    check_shapes(
        margins=(margins, "..."),
        labels=(labels if jnp.ndim(labels) else None, "..."),
        weights=(weights, "..."),
        valid=(valid, "..."),
    )
    valid = all_if_none(valid, margins)
    margin = select(margins, valid)
    loss = masked_mean(_logistic(margin, labels, valid), valid, weights=weights)
    return loss, _margin_metrics(margin, valid)


def pair_margins(
    logprobs: Float[Array, "2P T"], ref_logprobs: Float[Array, "2P T"], mask: Bool[Array, "2P T"]
) -> PairStats:
    """The sums that losses of pairs are made of, from a stacked batch. The reference gets no gradient.

    Raises:
      ValueError: an odd number of rows.
    """
    check_shapes(logprobs=(logprobs, "B T"), ref_logprobs=(ref_logprobs, "B T"), mask=(mask, "B T"))
    if mask.shape[0] % 2:
        raise ValueError(f"pairs are stacked, chosen rows first: their number must be even, got {mask.shape[0]}")
    sums = sequence_logprob(logprobs, mask)
    ref_sums = jax.lax.stop_gradient(sequence_logprob(ref_logprobs, mask))
    counts = jnp.sum(mask, axis=-1, dtype=jnp.float32)
    return PairStats(*jnp.split(sums, 2), *jnp.split(ref_sums, 2), *jnp.split(counts, 2))


def dpo_loss(
    stats: PairStats,
    *,
    kind: DpoKind | Mapping[DpoKind, float] = "sigmoid",
    beta: float = 0.1,
    labels: Float[Array, "P"] | float | None = None,
    label_smoothing: float = 0.0,
    weights: Float[Array, "P"] | None = None,
    valid: Bool[Array, "P"] | None = None,
    discopop_temperature: float = 0.05,
) -> tuple[Float[Array, ""], Metrics]:
    """Direct preference optimization (Rafailov et al. 2023) and its relatives, the mean over valid pairs.

    With log-ratios to the reference c (chosen) and r (rejected), numbers of tokens n_c and n_r, `u = beta * (c - r)`,
    ls the log-sigmoid, s the sigmoid and e the label smoothing:

    | `kind`           | loss of a pair                                                          |
    | ---------------- | ----------------------------------------------------------------------- |
    | `"sigmoid"`      | `-y ls(u) - (1 - y) ls(-u)`, `y` the label, by default `1 - e`          |
    | `"robust"`       | `(-(1 - e) ls(u) + e ls(-u)) / (1 - 2e)`                                |
    | `"hinge"`        | `max(0, 1 - u)`                                                         |
    | `"ipo"`          | `(c / n_c - r / n_r - 1 / (2 beta))^2`                                  |
    | `"sigmoid_norm"` | `-ls(beta (c / n_c - r / n_r))`                                         |
    | `"exo_pair"`     | `s(u) (ls(u) - log(1 - e)) + s(-u) (ls(-u) - log e)`, e > 0             |
    | `"nca_pair"`     | `-ls(beta c) - ls(-beta c) / 2 - ls(-beta r) / 2`                       |
    | `"bco_pair"`     | `-ls(beta c) - ls(-beta r)`                                             |
    | `"sppo_hard"`    | `(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2`                           |
    | `"apo_zero"`     | `1 - s(beta c) + s(beta r)`                                             |
    | `"apo_down"`     | `s(beta c) + 1 - s(u)`                                                  |
    | `"discopop"`     | `-ls(u) (1 - m) + exp(-u) m`, `m = s(u / discopop_temperature)`         |
    | `"aot"`          | smoothed logistic of beta times the sorted policy gaps minus the sorted reference gaps |
    | `"aot_unpaired"` | the same of the sorted c minus the sorted r                             |
    | `"sft"`          | the mean negative log-prob of all chosen tokens                         |

    Args:
      kind: one, or several with weights: `{"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}` is MPO.
      labels: of "sigmoid", the probability that chosen is better, instead of `1 - label_smoothing`.
      weights: multiply the loss of a pair, not its denominator (WPO); not for the kinds that sort. No gradient.
      valid: pairs that count, such as those that `best_worst_pairs` keeps.

    Metrics: `reward_chosen`, `reward_rejected` (beta times log-ratio), `margin`, `accuracy` (margin above 0); with
    several kinds also each kind's loss by its name.

    Raises:
      ValueError: unknown kind, `beta` not positive, `label_smoothing` outside [0, 0.5) or 0 with "exo_pair", weights
        with a kind that sorts.
    """
    labels = 1 - label_smoothing if labels is None else labels
    check_shapes(
        **{name: (x, "P") for name, x in stats._asdict().items()},
        labels=(labels if jnp.ndim(labels) else None, "P"),
        weights=(weights, "P"),
        valid=(valid, "P"),
    )
    kinds: Mapping[DpoKind, float] = {kind: 1.0} if isinstance(kind, str) else kind
    for name in kinds:
        check_choice("kind", name, get_args(DpoKind))
    check_range("beta", beta, 0, open_low=True)
    check_range("label_smoothing", label_smoothing, 0, 0.5, open_high=True)
    if "exo_pair" in kinds and label_smoothing == 0:
        raise ValueError('kind="exo_pair" needs label_smoothing above 0, 1e-3 is recommended; got 0')
    if weights is not None and {"aot", "aot_unpaired"} & set(kinds):
        raise ValueError(f"weights of pairs mean nothing for kinds that sort them apart; got kind={kind!r}")
    valid = all_if_none(valid, stats.chosen)
    stats = PairStats(*(select(x, valid) for x in stats))
    values = functools.partial(_values, stats, valid, beta, labels, label_smoothing)
    scale = jnp.ones(valid.shape) if weights is None else jax.lax.stop_gradient(select(weights, valid))
    losses = {name: masked_mean(scale * values(name, discopop_temperature), valid) for name in kinds}
    chosen, rejected = (beta * (x - y) for x, y in zip(stats[:2], stats[2:4], strict=True))
    metrics = _margin_metrics(chosen - rejected, valid) | jax.lax.stop_gradient(
        {"reward_chosen": masked_mean(chosen, valid), "reward_rejected": masked_mean(rejected, valid)}
    )
    if len(losses) > 1:
        metrics |= {str(name): jax.lax.stop_gradient(loss) for name, loss in losses.items()}
    return sum((weight * losses[name] for name, weight in kinds.items()), jnp.float32(0)), metrics


def _values(
    stats: PairStats,
    valid: Bool[Array, "P"],
    beta: float,
    labels: Float[Array, "P"] | float,
    smoothing: float,
    kind: DpoKind,
    temperature: float,
) -> Float[Array, "P"]:
    """The loss of each pair, as a sum over the batch where a kind has only that."""
    c, r = stats.chosen - stats.ref_chosen, stats.rejected - stats.ref_rejected
    u, half = beta * (c - r), 1 / (2 * beta)
    per_token = c / jnp.maximum(stats.chosen_counts, 1) - r / jnp.maximum(stats.rejected_counts, 1)
    match kind:
        case "sigmoid":
            return _logistic(u, labels, valid)
        case "robust":
            return (-(1 - smoothing) * log_sigmoid(u) + smoothing * log_sigmoid(-u)) / (1 - 2 * smoothing)
        case "hinge":
            return jnp.maximum(1 - u, 0)
        case "ipo":
            return (per_token - half) ** 2
        case "sigmoid_norm":
            return -log_sigmoid(beta * per_token)
        case "exo_pair":
            gaps = log_sigmoid(u) - np.log(1 - smoothing), log_sigmoid(-u) - np.log(smoothing)
            return sigmoid(u) * gaps[0] + sigmoid(-u) * gaps[1]
        case "nca_pair":
            return -log_sigmoid(beta * c) - (log_sigmoid(-beta * c) + log_sigmoid(-beta * r)) / 2
        case "bco_pair":
            return -log_sigmoid(beta * c) - log_sigmoid(-beta * r)
        case "sppo_hard":
            return (c - half) ** 2 + (r + half) ** 2
        case "apo_zero":
            return 1 - sigmoid(beta * c) + sigmoid(beta * r)
        case "apo_down":
            return sigmoid(beta * c) + 1 - sigmoid(u)
        case "discopop":
            modulation = sigmoid(u / temperature)
            return -log_sigmoid(u) * (1 - modulation) + jnp.exp(-u) * modulation
        case "aot" | "aot_unpaired":
            gaps = (stats.chosen - stats.rejected, stats.ref_chosen - stats.ref_rejected) if kind == "aot" else (c, r)
            ahead, behind = (jnp.sort(select(x, valid, jnp.inf)) for x in gaps)  # what is not valid goes to the end
            first = jnp.arange(len(valid)) < jnp.sum(valid)
            gap = beta * (select(ahead, first) - select(behind, first))
            return jnp.broadcast_to(masked_mean(_logistic(gap, 1 - smoothing, first), first), valid.shape)
        case "sft":
            return -stats.chosen * safe_divide(jnp.sum(valid), jnp.sum(stats.chosen_counts))


def _logistic(
    margin: Float[Array, "..."], labels: Float[Array, "..."] | float, valid: Bool[Array, "..."]
) -> Float[Array, "..."]:
    y = jax.lax.stop_gradient(select(jnp.asarray(labels), valid))
    return -y * log_sigmoid(margin) - (1 - y) * log_sigmoid(-margin)


def _margin_metrics(margin: Float[Array, "..."], valid: Bool[Array, "..."]) -> Metrics:
    metrics = {"accuracy": masked_mean((margin > 0).astype(jnp.float32), valid), "margin": masked_mean(margin, valid)}
    return jax.lax.stop_gradient(metrics)
