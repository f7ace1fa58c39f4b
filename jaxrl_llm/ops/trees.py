"""Rollouts that share prefixes: where to branch off, which nodes a rollout passes, advantages of what lies between.

A tree of rollouts is two arrays. `parent[B]` is the row that a rollout branched off, in any order, -1 at the root;
`branch_pos[B]` how many of that row's generated tokens it kept. Positions count generated tokens.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm.ops._checks import check_choice, check_range, check_shapes, is_concrete
from jaxrl_llm.ops.masked import all_if_none, dense_ids, safe_divide, select
from jaxrl_llm.ops.selection import shortest_correct

BranchForm = Literal["dissimilarity", "released", "entropy"]


def semantic_branch_scores(
    logprobs: Float[Array, "... k"], embeddings: Float[Array, "... k D"], *, form: BranchForm = "dissimilarity"
) -> Float[Array, "..."]:
    """How much a position is worth branching at, by its `k` likeliest next tokens (ROSE, 2026).

    With p the probabilities (not renormalized), `H = -sum_j p_j log p_j` in nats and c the cosines of embeddings:

    | `form`            | score                                     |
    | ----------------- | ----------------------------------------- |
    | `"dissimilarity"` | `H * sum_(i != j) p_i p_j (1 - c_ij)`      |
    | `"released"`      | `-H * sum_(i != j) p_i p_j c_ij`           |
    | `"entropy"`       | `H`                                       |

    The authors' code has "released", which is at most 0 and largest at tokens of no entropy where all cosines are
    positive; "dissimilarity" is never negative and 0 for a token that is certain.

    Raises:
      ValueError: fewer than 2 candidates, unknown form.
    """
    check_shapes(logprobs=(logprobs, "... k"), embeddings=(embeddings, "... k D"))
    check_choice("form", form, BranchForm)
    if logprobs.shape[-1] < 2:
        raise ValueError(f"a branch needs at least 2 candidates, got logprobs of shape {list(logprobs.shape)}")
    possible = logprobs > -jnp.inf
    log_p = select(logprobs, possible)
    p = select(jnp.exp(log_p), possible)
    entropy = -jnp.sum(p * log_p, axis=-1)
    if form == "entropy":
        return entropy
    vectors = embeddings.astype(jnp.float32)
    squares = jnp.sum(vectors**2, axis=-1, keepdims=True)
    vectors /= jnp.sqrt(jnp.where(squares > 0, squares, 1))  # a zero vector stays one
    distinct = 1 - jnp.eye(p.shape[-1])
    pairs = p[..., :, None] * p[..., None, :] * distinct
    cosines = jnp.einsum("...id,...jd->...ij", vectors, vectors, precision=jax.lax.Precision.HIGHEST)
    return entropy * jnp.sum(pairs * (1 - cosines if form == "dissimilarity" else -cosines), axis=(-2, -1))


def choose_branch(
    scores: Float[Array, "R T"], lengths: Int[Array, "R"], key: Key[Array, ""], *, eps: float
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """(parent, branch_pos) of a prompt's next rollout: with probability `eps` the root, (-1, 0), else the place of the
    highest score over the rollouts so far, of equal ones the first. The token at `branch_pos` is drawn again.

    Args:
      scores: of the generated tokens of the R rollouts that there may be; lengths: 0 for those that are yet to come.
    """
    check_shapes(scores=(scores, "R T"), lengths=(lengths, "R"))
    check_range("eps", eps, 0, 1)
    inside = jnp.arange(scores.shape[1]) < lengths[:, None]
    place = jnp.argmax(select(scores, inside, -jnp.inf))
    row, position = place // scores.shape[1], place % scores.shape[1]
    again = jax.random.bernoulli(key, eps) | ~jnp.any(inside)
    return jnp.where(again, -1, row), jnp.where(again, 0, position)


def prefix_holders(parent: Int[Array, "B"], branch_pos: Int[Array, "B"], max_len: int) -> Int[Array, "B T+1"]:
    """The row that generated the last of a rollout's first k tokens, for k = 0 to `max_len`: two rollouts share a
    prefix of k tokens by descent where they have the same holder there."""
    lengths = jnp.arange(max_len + 1)
    rows = jnp.arange(parent.shape[0])

    def inherited(holder: Int[Array, "B T+1"]) -> Bool[Array, "B T+1"]:
        return (lengths <= branch_pos[holder]) & (parent[holder] >= 0)

    def climb(state: tuple[Array, Array]) -> tuple[Array, Array]:
        """Up the tree, all prefixes at once."""
        step, holder = state
        return step + 1, jnp.where(inherited(holder), parent[holder], holder)

    # no tree of B rows is deeper than B: a circle of parents, which is none, ends there too
    return jax.lax.while_loop(
        lambda state: jnp.any(inherited(state[1])) & (state[0] < len(rows)),
        climb,
        (jnp.int32(0), jnp.broadcast_to(rows[:, None], (len(rows), max_len + 1))),
    )[1]


def branch_node_mask(parent: Int[Array, "B"], branch_pos: Int[Array, "B"], *, max_len: int) -> Bool[Array, "B T+1"]:
    """True at [b, k] where a rollout branches off, behind its first k tokens, that rollout b goes through; the root,
    k = 0, is a node of all.

    That takes in b's own branch and those of its ancestors, and those of whoever left b's path where b was still on it:
    children, later siblings, cousins.

    Raises:
      ValueError: outside jit, a parent that is no row of the batch, a circle, or `branch_pos` beyond `max_len`.
    """
    check_shapes(parent_ids=(parent, "B"), branch_pos_ids=(branch_pos, "B"))
    check_range("max_len", max_len, 1)
    if is_concrete(parent, branch_pos):
        parents, places = np.asarray(parent), np.asarray(branch_pos)
        above = np.arange(len(parents))
        for _ in parents:
            if np.any(above >= len(parents)):
                break
            above = np.where(above >= 0, parents[above], -1)
        if np.any(above >= 0):
            raise ValueError(f"parent must name rows of the batch, -1 at the root, and no circle, got {parents}")
        if np.any(places > max_len):
            raise ValueError(f"branch_pos must be at most max_len={max_len}, got {places.max()}")
    holder = prefix_holders(parent, branch_pos, max_len)
    branches = (branch_pos >= 0) & (branch_pos <= max_len)
    place = jnp.where(branches, branch_pos, 0)
    owner = jnp.take_along_axis(holder, place[:, None], axis=1)[:, 0]
    branched = jnp.zeros(holder.shape, bool).at[owner, place].max(branches)
    return jnp.take_along_axis(branched, holder, axis=0).at[:, 0].set(True)


def tree_segment_advantages(
    rewards: Float[Array, "B"],
    nodes_mask: Bool[Array, "B T+1"],
    lengths: Int[Array, "B"],
    group_ids: Int[Array, "B"],
    valid: Bool[Array, "B"] | None = None,
    *,
    length_exponent: float = 0.0,
    power_outside: bool = False,
) -> Float[Array, "B T"]:
    """Advantage of a token: the value of the next node of its rollout minus that of the last one (ROSE, 2026).

    The value of a node is the mean reward of the rollouts of the group that have a node at that position; behind the
    last node it is the rollout's own reward. Nothing is divided by a std.

    Args:
      rewards, lengths, group_ids: [B]; nodes_mask: [B, T+1] of `branch_node_mask`.
      valid: rollouts that were scored; the others are in no value and get 0.
      length_exponent: e > 0 makes right answers (reward other than 0) pay for being longer than the shortest right one
        of their group: behind the last node that the two share, at k, `A - |A| * phi` with
        `phi = 1 - ((L_short - k) / (L - k))^e`, if positive.
      power_outside: `phi = (1 - (L_short - k) / (L - k))^e`, as the paper has it, instead of as its code.

    Returns:
      [B, T] by generated token, 0 from `lengths` on.
    """
    check_shapes(
        rewards=(rewards, "B"),
        nodes_mask=(nodes_mask, "B N"),
        lengths=(lengths, "B"),
        group_ids=(group_ids, "B"),
        valid=(valid, "B"),
    )
    check_range("length_exponent", length_exponent, 0)
    valid = all_if_none(valid, rewards)
    num, places = nodes_mask.shape
    slots, position = dense_ids(group_ids), jnp.arange(places)
    members = nodes_mask & valid[:, None]
    reward = select(rewards, valid)
    total, count = (
        jax.ops.segment_sum(select(x, members), slots, num_segments=num)[slots]
        for x in (reward[:, None], jnp.ones((num, 1)))
    )
    values = safe_divide(total, count)

    inner = nodes_mask & (position < lengths[:, None])  # a node at the end has the value of the end
    last = jax.lax.cummax(jnp.where(inner, position, 0), axis=1)[:, :-1]
    following = jax.lax.cummin(jnp.where(inner, position, places), axis=1, reverse=True)[:, 1:]
    ahead = jnp.take_along_axis(values, jnp.minimum(following, places - 1), axis=1)
    ahead = jnp.where(following < places, ahead, reward[:, None])
    inside = (position[:-1] < lengths[:, None]) & valid[:, None]
    advantages = select(ahead - jnp.take_along_axis(values, last, axis=1), inside)
    if length_exponent == 0:
        return advantages

    right = valid & (jnp.abs(reward) > 1e-6)
    shortest = shortest_correct(lengths, right, group_ids)
    least = lengths[shortest]
    shared = nodes_mask & nodes_mask[shortest] & (position <= jnp.minimum(least, lengths)[:, None])
    fork = jnp.max(jnp.where(shared, position, 0), axis=1)
    ratio = safe_divide((least - fork).astype(jnp.float32), (lengths - fork).astype(jnp.float32))
    phi = (1 - ratio) ** length_exponent if power_outside else 1 - ratio**length_exponent
    behind = right[:, None] & (position[:-1] >= fork[:, None])
    return advantages - select(jnp.abs(advantages) * jnp.maximum(phi, 0)[:, None], behind)
