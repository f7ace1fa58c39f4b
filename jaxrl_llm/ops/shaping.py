"""Terms that shape a reward, and how terms become one reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.ops._checks import check_choice, check_range, check_shapes, is_concrete
from jaxrl_llm.ops.groups import group_stats
from jaxrl_llm.ops.masked import all_if_none, dense_ids, masked_mean, safe_divide, select
from jaxrl_llm.types import Metrics

LengthKind = Literal["min_max", "sigmoid", "deviation"]


def overlong_penalty(lengths: Int[Array, "B"], *, max_len: int, buffer: int, factor: float = 1.0) -> Float[Array, "B"]:
    """DAPO's soft overlong punishment, to be added to the reward (Yu et al. 2025, eq. 13).

    0 up to `max_len - buffer` tokens, then linear down to `-factor` at `max_len`, and `-factor` beyond.
    """
    check_shapes(lengths=(lengths, "B"))
    check_range("max_len", max_len, 1)
    check_range("buffer", buffer, 1, max_len)
    check_range("factor", factor, 0)
    return factor * jnp.clip((max_len - buffer - lengths.astype(jnp.float32)) / buffer, -1, 0)


def group_length_rewards(
    lengths: Int[Array, "B"],
    correct: Bool[Array, "B"],
    group_ids: Int[Array, "B"],
    valid: Bool[Array, "B"] | None = None,
    *,
    kind: LengthKind = "min_max",
    tolerance: float = 0.2,
) -> Float[Array, "B"]:
    """How long an answer is beside the other answers of its group, as a term of the reward.

    | `kind`        | value                                             | range       | source      |
    | ------------- | ------------------------------------------------- | ----------- | ----------- |
    | `"min_max"`   | `0.5 - (len - min) / (max - min)`                 | [-0.5, 0.5] | Kimi k1.5   |
    | `"sigmoid"`   | `sigmoid((len - mean) / std)`                     | [0, 1]      | GRPO-lambda |
    | `"deviation"` | `-clip((d - tolerance) / (1 - tolerance), 0, 1)`  | [-1, 0]     | HARMO       |

    "min_max": over all answers; of a wrong answer at most 0. "sigmoid": mean and std (population, plus 1e-7) of the
    right answers, 0 for a wrong one; GRPO-lambda's reward is `correct * (1 - alpha * this)`. "deviation":
    `d = |len / mean - 1|` with the mean of the right answers.

    All get 0 where min = max ("min_max") and where no answer of the group is right ("deviation").

    Args:
      lengths: tokens of the policy; correct: bool.
      valid: the answers that exist; the others set no minimum or mean and get 0.
      tolerance: relative deviation that costs nothing.
    """
    check_shapes(lengths=(lengths, "B"), correct=(correct, "B"), group_ids=(group_ids, "B"), valid=(valid, "B"))
    check_choice("kind", kind, LengthKind)
    check_range("tolerance", tolerance, 0, 1, open_high=True)
    valid = all_if_none(valid, correct)
    length, right = lengths.astype(jnp.float32), correct & valid
    if kind == "min_max":
        slots, num = dense_ids(group_ids), lengths.shape[0]
        low = jax.ops.segment_min(select(length, valid, jnp.inf), slots, num_segments=num)[slots]
        high = jax.ops.segment_max(select(length, valid, -jnp.inf), slots, num_segments=num)[slots]
        reward = 0.5 - safe_divide(length - low, high - low)
        return select(jnp.where(right, reward, jnp.minimum(reward, 0)), valid & (high > low))
    mean, std, count = group_stats(length, group_ids, right, ddof=0)
    if kind == "sigmoid":
        return select(jax.nn.sigmoid((length - mean) / (std + 1e-7)), right)
    deviation = jnp.abs(safe_divide(length, mean) - 1)
    return select(-jnp.clip((deviation - tolerance) / (1 - tolerance), 0, 1), valid & (count > 0) & (mean > 0))


def repetition_scores(
    tokens: Int[Array, "B T"], lengths: Int[Array, "B"], *, min_repeats: int = 2
) -> Float[Array, "B"]:
    """Share of an answer that lies inside the loop it ends in (CAMPO, MiroMind-M1 2025); 0 without a loop.

    For every period p, blocks of p tokens are cut backwards from the end for as long as a block equals the one after
    it. With at least `min_repeats` equal blocks that is a loop. The largest such period counts, even where a smaller
    one reaches further back: `7 5 5 5 5 5` is two blocks `5 5`, 4/6.

    Args:
      tokens: [B, T], the answer from position 0 on; what lies behind `lengths` is not read.
      lengths: [B], at most T.

    Raises:
      ValueError: `min_repeats` below 2; outside jit also a length beyond T, which is cut to T inside.
    """
    check_shapes(tokens=(tokens, "B T"), lengths=(lengths, "B"))
    check_range("min_repeats", min_repeats, 2)
    width = tokens.shape[1]
    if is_concrete(lengths) and lengths.size and (longest := int(np.max(np.asarray(lengths)))) > width:
        raise ValueError(f"lengths must be at most {width}, the width of tokens, got {longest}")
    length, positions = jnp.minimum(lengths, width), jnp.arange(width)

    def longer(looped: Int[Array, "B"], period: Int[Array, ""]) -> tuple[Int[Array, "B"], None]:
        differs = (tokens != jnp.roll(tokens, -period, axis=1)) & (positions < (length - period)[:, None])
        last = jnp.max(jnp.where(differs, positions, -1), axis=1)
        blocks = 1 + (length - period - 1 - last) // period
        return jnp.where((blocks >= min_repeats) & (period <= length), blocks * period, looped), None

    periods = jnp.arange(1, width // min_repeats + 1)
    looped, _ = jax.lax.scan(longer, jnp.zeros_like(length), periods)
    return safe_divide(looped.astype(jnp.float32), length.astype(jnp.float32))


def format_gated_rewards(
    rewards: Float[Array, "B"],
    state: Int[Array, "B"] | Bool[Array, "B"],
    *,
    penalty: float | Sequence[float] = 0.0,
) -> Float[Array, "B"]:
    """The reward where the format holds, in its place a penalty where it does not. A penalty that is added instead is a
    term of `combine_rewards`.

    Args:
      state: what the parser says: 0 fine, 1 bad payload, 2 bad tags; or a boolean, true where the format holds.
      penalty: for every broken state, or one for each state from 1 on.

    The reward of a broken answer is not read. Inside jit a state beyond the penalties takes the last one.

    Raises:
      ValueError: `penalty` is empty; outside jit also a negative state or one that has no penalty.
    """
    check_shapes(rewards=(rewards, "B"), state=(state, "B"))
    broken = (~state).astype(jnp.int32) if state.dtype == bool else state
    penalties = [penalty] if isinstance(penalty, int | float) else list(penalty)
    if not penalties:
        raise ValueError("penalty must be a number or have one for each broken state, got an empty sequence")
    most = 1 if state.dtype == bool else len(penalties)
    if isinstance(penalty, Sequence) and is_concrete(state) and state.size:
        values = np.asarray(state)
        if int(values.max()) > most or int(values.min()) < 0:
            raise ValueError(f"state must lie in 0..{most}, as penalty has {most}, got {values.min()}..{values.max()}")
    paid = jnp.array(penalties, jnp.float32)[jnp.clip(broken - 1, 0, len(penalties) - 1)]
    return jnp.where(broken == 0, select(rewards, broken == 0), paid)


def combine_rewards(
    terms: Mapping[str, Float[Array, "B"]],
    weights: Mapping[str, float | Float[Array, ""]],
    valid: Bool[Array, "B"] | None = None,
) -> tuple[Float[Array, "B"], Metrics]:
    """`sum_k weights[k] * terms[k]`, and the mean of every term before its weight, under its name.

    Args:
      terms: rewards [B] by name.
      weights: one for each term, a number or a schedule's value.
      valid: the samples that exist; the others get 0 and are in no mean.

    Raises:
      ValueError: there is no term, or terms and weights have not the same names.
    """
    if not terms or set(terms) != set(weights):
        raise ValueError(f"terms and weights must have the same names, got {sorted(terms)} and {sorted(weights)}")
    first = next(iter(terms.values()))
    valid = all_if_none(valid, first)
    check_shapes(**{name: (term, "B") for name, term in terms.items()} | {"valid": (valid, "B")})
    total = sum((weights[name] * select(term, valid) for name, term in terms.items()), jnp.zeros(first.shape))
    return total, {name: masked_mean(term, valid) for name, term in terms.items()}


def progress_rewards(
    potentials: Float[Array, "B K+1"], turn_mask: Bool[Array, "B K"], *, gamma: float = 1.0, step_cost: float = 0.0
) -> Float[Array, "B K"]:
    """`gamma * potentials[k + 1] - potentials[k] - step_cost` for every turn k that took place: potential-based shaping
    (Ng et al. 1999), which leaves the best policy as it is.

    Args:
      potentials: before each turn and behind the last: probability of the gold answer, success of a prover, evidence
        covered. With gamma 1 the rewards of a row sum to its last potential minus its first.
      turn_mask: [B, K]
    """
    check_shapes(turn_mask=(turn_mask, "B K"), potentials=(potentials, "B N"))
    if potentials.shape != (turn_mask.shape[0], turn_mask.shape[1] + 1):
        raise ValueError(
            f"potentials must have one more column than turn_mask {list(turn_mask.shape)}, got {list(potentials.shape)}"
        )
    check_range("gamma", gamma, 0, 1)
    before, after = select(potentials[:, :-1], turn_mask), select(potentials[:, 1:], turn_mask)
    return select(gamma * after - before - step_cost, turn_mask)
