"""The few pytrees that everything passes along.

Axis letters, here and in the whole library: `P` prompts, `G` rollouts per prompt, `B = P * G` sequences (the rollouts
of a group lie side by side), `T` token positions of a packed sequence, `K` turns, `V` vocabulary, `D` width, `H` heads.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
from jaxtyping import Array, Bool, Float, Int, PyTree

Params: TypeAlias = PyTree[Array]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a token is drawn from logits. A rollout carries the one it was made with, and training scores under the same.

    The order is: divide by `temperature`, keep the `top_k` largest, keep the smallest set of probability `top_p`, drop
    what has less than `min_p` times the largest probability. `top_k=None`, `top_p=1` and `min_p=0` keep everything.
    `greedy` takes the largest logit; its log-probs are those of the distribution that the other fields describe.

    Raises:
      ValueError: a field is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    greedy: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be positive, got {self.temperature}; for the largest logit set greedy=True"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p must lie in [0, 1), got {self.min_p}")

    @property
    def filters(self) -> bool:
        """Whether some tokens are excluded, so that log-probs need the whole row of logits."""
        return self.top_k is not None or self.top_p < 1 or self.min_p > 0


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens",
        "lengths",
        "prompt_lengths",
        "mask",
        "logprobs",
        "turn_ids",
        "group_ids",
        "rewards",
        "scorable",
        "turn_rewards",
        "turn_mask",
        "truncated",
        "free_logprobs",
        "versions",
        "parent",
        "fork_position",
        "rollout_ids",
        "row_of_episode",
        "agent_ids",
    ],
    meta_fields=["decoding"],
)
@dataclasses.dataclass(frozen=True)
class Rollout:
    """Finished sequences, as the sampler made them. Everything about a token is decided there and never derived
    again."""

    tokens: Int[Array, "B T"]  # prompt, policy tokens, observations, padding
    lengths: Int[Array, "B"]  # tokens in use; what lies behind is padding, whatever its id
    prompt_lengths: Int[Array, "B"]
    mask: Bool[Array, "B T"]  # true where the policy generated the token
    logprobs: Float[Array, "B T"]  # of the policy's tokens under `decoding`, 0 elsewhere
    turn_ids: Int[Array, "B T"]  # turn of a policy token, -1 elsewhere
    group_ids: Int[Array, "B"]  # which prompt a sequence answers
    rewards: Float[Array, "B"]  # sum over turns; 0 where not scorable
    scorable: Bool[Array, "B"]  # false where the environment gave no reward (NaN): no gradient may come from it
    turn_rewards: Float[Array, "B K"]
    turn_mask: Bool[Array, "B K"]  # which turns took place
    truncated: Bool[Array, "B"]  # stopped by a limit of the sampler, not by the environment
    decoding: Decoding = Decoding()
    # what only some samplers have to say; None elsewhere
    free_logprobs: Float[Array, "B T"] | None = None  # under a constraint: without it and without filters
    versions: Int[Array, "B T"] | None = None  # of the parameters that a policy's token was drawn under, -1 elsewhere
    parent: Int[Array, "B"] | None = None  # the row that a row was forked from, -1 for none
    fork_position: Int[Array, "B"] | None = None  # tokens that it shares with its parent; 0 for none
    rollout_ids: Int[Array, "B"] | None = None  # which episode a row is a piece of
    row_of_episode: Int[Array, "B"] | None = None  # which piece, in order
    agent_ids: Int[Array, "B"] | None = None  # which role wrote it


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["rollout", "mask", "old_logprobs", "ref_logprobs", "advantages", "returns", "old_values", "weights"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """What a policy update reads: rollouts and what was computed from them once. All of it is constant in the
    update."""

    rollout: Rollout
    mask: Bool[Array, "B T"]  # tokens that the loss touches; the rollout's mask unless an ablation says otherwise
    old_logprobs: Float[Array, "B T"]  # under the policy that the ratio is taken to, by default the one that sampled
    advantages: Float[Array, "B T"]
    ref_logprobs: Float[Array, "B T"] | None = None  # under the reference, where there is one
    returns: Float[Array, "B T"] | None = None  # targets of a critic
    old_values: Float[Array, "B T"] | None = None
    weights: Float[Array, "B T"] | None = None  # of the tokens' losses, where they are not all alike


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "opt_state", "step", "seed", "skipped", "skipped_in_row", "ref_params", "memory"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a training loop needs to go on: a checkpoint of it resumes bit for bit."""

    params: Params
    opt_state: PyTree
    step: Int[Array, ""]  # finished iterations, skipped ones included
    seed: Int[Array, ""]  # every random key is folded from (seed, step, ...)
    skipped: Int[Array, ""]  # updates left out because loss or gradient was not finite
    skipped_in_row: Int[Array, ""]
    ref_params: Params | None = None  # the frozen reference policy, where the algorithm has one
    memory: PyTree = None  # arrays that an algorithm carries on besides: records of problems, replay, moments


class Span(NamedTuple):
    """A run of tokens of one author. Rewards of text receive these, never one joined string: what a tool wrote is not
    the policy's answer."""

    role: Literal["prompt", "policy", "observation"]
    text: str


Metrics = dict[str, Any]
