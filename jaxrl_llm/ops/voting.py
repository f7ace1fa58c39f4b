"""One answer from many, chances over several tries, and tournaments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm.ops._checks import check_range, check_shapes, is_concrete
from jaxrl_llm.ops.masked import all_if_none, masked_mean, safe_divide, select


def weighted_vote(
    scores: Float[Array, "... N"], answer_ids: Int[Array, "... N"], valid: Bool[Array, "... N"] | None = None
) -> Int[Array, "..."]:
    """The id of the answer whose samples have the largest sum of scores, of equal ones that which came first; -1 where
    nothing is valid. Scores of one make it the majority; a sample without an answer is not valid."""
    check_shapes(scores=(scores, "... N"), answer_ids=(answer_ids, "... N"), valid=(valid, "... N"))
    valid = all_if_none(valid, scores)
    same = answer_ids[..., :, None] == answer_ids[..., None, :]
    totals = jnp.sum(same * select(scores, valid)[..., None, :], axis=-1)
    first = jnp.argmax(select(totals, valid, -jnp.inf), axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(answer_ids, first, axis=-1)[..., 0]
    return jnp.where(jnp.any(valid, axis=-1), chosen, -1)


def pass_at_k(n: Int[Array, "..."], c: Int[Array, "..."], *, k: int) -> Float[Array, "..."]:
    """`1 - C(n - c, k) / C(n, k)`: the chance that one of k samples is right, estimated without bias from n samples of
    which c are (Chen et al. 2021, eq. 1). `n` and `c` have one shape.

    Raises:
      ValueError: outside jit, fewer than k samples or not 0 <= c <= n. Inside jit k is cut to n.
    """
    check_shapes(n=(n, "..."), c=(c, "..."))
    check_range("k", k, 1)
    if is_concrete(n, c) and n.size:
        samples, right = np.asarray(n), np.asarray(c)
        if samples.min() < k or right.min() < 0 or np.any(right > samples):
            raise ValueError(f"pass_at_k needs n of at least k={k} and c in 0..n, got n={samples} and c={right}")
    draw = jnp.arange(k)
    left, wrong = (jnp.maximum(y[..., None] - draw, 0).astype(jnp.float32) for y in (n, n - c))
    return 1 - jnp.prod(jnp.where(left > 0, safe_divide(wrong, left), 1), axis=-1)


def best_of_k_value(q: Float[Array, "..."], k: int) -> Float[Array, "..."]:
    """`1 - (1 - q)^k`: the chance that one of k independent tries succeeds, each with chance `q` in [0, 1]."""
    check_shapes(q=(q, "..."))
    check_range("k", k, 1)
    q = q.astype(jnp.float32)
    sure = q >= 1
    # 1 - (1 - q)^k as it stands has no digits left for a small q
    return jnp.where(sure, q, -jnp.expm1(k * jnp.log1p(-jnp.where(sure, 0, q))))


def signal_probability(p: Float[Array, "..."], group: int) -> Float[Array, "..."]:
    """`1 - p^group - (1 - p)^group`: the chance that a group of rollouts has both outcomes, and so a gradient (DRIVE,
    2025). `p` in [0, 1] is the chance that one succeeds."""
    return best_of_k_value(p, group) - p.astype(jnp.float32) ** group


def win_rate(
    scores: Float[Array, "..."],
    rivals: Float[Array, "..."],
    valid: Bool[Array, "..."] | None = None,
    *,
    tie: float = 0.0,
) -> Float[Array, ""]:
    """Share of `scores` above the rival's, equal ones counted as `tie`; 0 if nothing is valid."""
    check_shapes(scores=(scores, "..."), rivals=(rivals, "..."), valid=(valid, "..."))
    check_range("tie", tie, 0, 1)
    valid = all_if_none(valid, scores)
    gap = select(scores, valid) - select(rivals, valid)
    return masked_mean((gap > 0) + tie * (gap == 0), valid)


def elo_update(
    rating_a: Float[Array, "..."],
    rating_b: Float[Array, "..."],
    score_a: Float[Array, "..."],
    *,
    k: float = 5.0,
    scale: float = 400.0,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Both ratings after a battle: `r_a + k * (score_a - expected)`, `expected = 1 / (1 + 10^((r_b - r_a) / scale))`;
    b loses what a gains. `score_a` is 1 for a win, 0.5 for a tie, 0 for a loss, or a share of wins."""
    check_range("k", k, 0, open_low=True)
    check_range("scale", scale, 0, open_low=True)
    a, b, score = (jnp.asarray(x, jnp.float32) for x in (rating_a, rating_b, score_a))
    gain = k * (score - jax.nn.sigmoid((a - b) * (np.log(10) / scale)))
    return a + gain, b - gain


def elo_ratings(
    wins: Float[Array, "M M"],
    *,
    rounds: int,
    key: Key[Array, ""],
    k: float = 5.0,
    start: float = 1000.0,
    scale: float = 400.0,
) -> Float[Array, "M"]:
    """Ratings of M players who all start at `start` and whose battles are replayed `rounds` times, each time in another
    random order.

    Args:
      wins: `wins[i, j]` is how often i beat j, a tie half for each; a pair has one battle a round, with its share of
        wins as the score, or none if the two never met.
    """
    check_shapes(wins=(wins, "M M"))
    check_range("rounds", rounds, 1)
    first, second = np.triu_indices(wins.shape[0], 1)
    won, lost = (wins[one, other].astype(jnp.float32) for one, other in ((first, second), (second, first)))
    shares, met = safe_divide(won, won + lost), won + lost > 0

    def battle(ratings: Float[Array, "M"], pair: Int[Array, ""]) -> tuple[Float[Array, "M"], None]:
        a, b = jnp.asarray(first)[pair], jnp.asarray(second)[pair]
        after = elo_update(ratings[a], ratings[b], shares[pair], k=k, scale=scale)
        return jnp.where(met[pair], ratings.at[a].set(after[0]).at[b].set(after[1]), ratings), None

    orders = jax.vmap(lambda key: jax.random.permutation(key, len(first)))(jax.random.split(key, rounds))
    return jax.lax.scan(battle, jnp.full(wins.shape[0], start, jnp.float32), orders.ravel())[0]
