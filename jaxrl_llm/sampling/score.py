"""Log-probabilities of finished rollouts under any parameters, with a group's prompt computed once."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.models.decoder import Model
from jaxrl_llm.models.nucleus import NucleusModel
from jaxrl_llm.ops.logprobs import token_logprobs
from jaxrl_llm.sampling.constraints import Constraint, allowed_tokens, next_states, start_states
from jaxrl_llm.types import Decoding, Params, Rollout


def score_rollout(
    model: Model,
    params: Params,
    rollout: Rollout,
    *,
    decoding: Decoding,
    constraint: Constraint | Literal["free"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    group_size: int = 1,
    shared_prefix: int = 0,
    entropy_gradient: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-prob and entropy (nats) of the rollout's tokens, 0 where `mask` is false (default: the policy's tokens).

    The same distribution that the sampler recorded: same temperature, same filters, same `constraint`. Under a
    constraint the entropy is that of the tokens it allows, and a token it does not allow gets NaN; "free" scores such a
    rollout at the same temperature without constraint and filters, as its `free_logprobs` are.

    `shared_prefix` is a number of leading tokens, less than the shortest prompt, that the `group_size` rollouts of a
    group have in common: they are computed once and their keys and values serve the whole group, gradient included.

    Raises:
      ValueError: the rollout was sampled under another `decoding` than it is to be scored with, or with a constraint
        and is to be scored without, or the reverse (ratios would be off from the start); or `group_size` does not
        divide the batch.
    """
    if rollout.decoding != decoding:
        raise ValueError(
            f"the rollout was sampled under {rollout.decoding} but is to be scored under {decoding}; "
            "score it as it was sampled, or sample again"
        )
    if (rollout.free_logprobs is None) != (constraint is None):
        raise ValueError(
            "the rollout was sampled under a constraint: score it with the same constraint=, or with constraint='free'"
            if constraint is None
            else "the rollout was sampled without a constraint; leave constraint out, or sample again"
        )
    mask = rollout.mask if mask is None else mask
    allowed = states = None
    if isinstance(constraint, Constraint):
        allowed = jax.tree_util.Partial(allowed_tokens, constraint)
        states = rollout_states(constraint, rollout)
    elif constraint == "free":
        decoding = Decoding(temperature=decoding.temperature)
    hidden = rollout_hidden(model, params, rollout, group_size=group_size, shared_prefix=shared_prefix)
    if isinstance(model, NucleusModel):
        if constraint is not None:
            raise ValueError("a rollout of a NucleusModel is scored without a constraint, got one")
        hidden, allowed, states = model.split_hidden(params, hidden)
    # hidden[:, t] is the state that predicts tokens[:, t]
    return token_logprobs(
        hidden,
        model.head(params),
        rollout.tokens,
        decoding=decoding,
        softcap=model.config.logit_softcap,
        mask=mask,
        entropy_gradient=entropy_gradient,
        allowed=allowed,
        states=states,
    )


def as_rollout(
    prompt_tokens: Int[Array, "B L"],
    prompt_lengths: Int[Array, "B"],
    response_tokens: Int[Array, "B M"],
    response_lengths: Int[Array, "B"],
) -> Rollout:
    """Responses that someone else wrote, as a rollout of one turn with T = L + M: to be scored, imitated or preferred.

    Both are padded on the right. Log-probs of a sampler are not known and 0; rewards are 0, groups one row each.
    """
    rows, width = prompt_tokens.shape[0], prompt_tokens.shape[1] + response_tokens.shape[1]
    places = jnp.arange(width) - prompt_lengths[:, None]
    mask = (places >= 0) & (places < response_lengths[:, None])
    source = jnp.clip(places, 0, response_tokens.shape[1] - 1)
    prompts = jnp.pad(prompt_tokens, ((0, 0), (0, response_tokens.shape[1])))
    written = jnp.where(mask, jnp.take_along_axis(response_tokens, source, axis=1), 0)
    return Rollout(
        tokens=jnp.where(places < 0, prompts, written),
        lengths=prompt_lengths + response_lengths,
        prompt_lengths=prompt_lengths,
        mask=mask,
        logprobs=jnp.zeros((rows, width)),
        turn_ids=jnp.where(mask, 0, -1),
        group_ids=jnp.arange(rows),
        rewards=jnp.zeros(rows),
        scorable=jnp.ones(rows, bool),
        turn_rewards=jnp.zeros((rows, 1)),
        turn_mask=jnp.ones((rows, 1), bool),
        truncated=jnp.zeros(rows, bool),
    )


def replace_prompts(rollout: Rollout, prompt_tokens: Int[Array, "B L"], prompt_lengths: Int[Array, "B"]) -> Rollout:
    """The same responses behind other prompts: what was sampled under one context, to be scored under another.

    `logprobs` stay those of the context that was sampled; `score_rollout` gives those of the new one. Prompts are
    padded on the right. A row that would exceed T is cut there and marked not scorable.

    Raises:
      ValueError: prompts are wider than T.
    """
    width = rollout.tokens.shape[1]
    if prompt_tokens.shape[1] > width:
        raise ValueError(f"prompts of {prompt_tokens.shape[1]} tokens do not fit into rows of {width}")
    shift = (prompt_lengths - rollout.prompt_lengths)[:, None]
    places = jnp.arange(width)
    behind = places >= prompt_lengths[:, None]
    source = jnp.clip(places - shift, 0, width - 1)
    lengths = rollout.lengths + shift[:, 0]
    used = behind & (places < lengths[:, None])

    def move(array: Array, fill: Array | int) -> Array:
        return jnp.where(used, jnp.take_along_axis(array, source, axis=1), fill)

    prompts = jnp.pad(prompt_tokens, ((0, 0), (0, width - prompt_tokens.shape[1])))
    return dataclasses.replace(
        rollout,
        tokens=move(rollout.tokens, jnp.where(behind, 0, prompts)),
        mask=move(rollout.mask, 0).astype(bool),
        logprobs=move(rollout.logprobs, 0),
        turn_ids=move(rollout.turn_ids, -1),
        prompt_lengths=prompt_lengths,
        lengths=jnp.minimum(lengths, width),
        scorable=rollout.scorable & (lengths <= width),
        free_logprobs=None if rollout.free_logprobs is None else move(rollout.free_logprobs, 0),
        versions=None if rollout.versions is None else move(rollout.versions, -1),
    )


def rollout_states(constraint: Constraint, rollout: Rollout) -> Int[Array, "B T"]:
    """The state of the constraint before each token of the policy, as the sampler had it. What stands elsewhere means
    nothing."""
    first = start_states(constraint, rollout.group_ids)
    before = jnp.pad(rollout.turn_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]

    def step(states, column):
        tokens, begins = column
        states = jnp.where(begins, first, states)
        return next_states(constraint, states, tokens), states

    _, states = jax.lax.scan(step, first, (rollout.tokens.T, (rollout.turn_ids != before).T))
    return states.T


def rollout_hidden(
    model: Model,
    params: Params,
    rollout: Rollout,
    *,
    group_size: int = 1,
    shared_prefix: int = 0,
) -> Float[Array, "B T D"]:
    """The hidden state before each token: `hidden[:, t]` has seen `tokens[:, :t]`. Zeros up to the shared prefix.

    Arguments and errors as in `score_rollout`."""
    tokens = rollout.tokens
    if not shared_prefix or group_size == 1:
        hidden, _ = model.apply(params, tokens)  # of the last token too: the places of whole rows divide over devices
        return jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
    batch, length = tokens.shape
    if batch % group_size:
        raise ValueError(f"group_size={group_size} does not divide the batch of {batch} sequences")
    if shared_prefix >= length - 1:
        raise ValueError(f"shared_prefix={shared_prefix} must leave a response in {length} tokens")
    empty = model.init_cache(batch // group_size, length - 1)
    _, cache = model.apply(params, tokens[::group_size, :shared_prefix], cache=empty)
    cache = jax.tree.map(lambda x: jnp.repeat(x, group_size, axis=0), cache)
    response = tokens[:, shared_prefix:-1]
    positions = jnp.broadcast_to(jnp.arange(shared_prefix, length - 1), response.shape)
    hidden, _ = model.apply(params, response, positions=positions, cache=cache)
    return jnp.pad(hidden, ((0, 0), (shared_prefix + 1, 0), (0, 0)))
