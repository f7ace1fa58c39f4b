"""The next token of each slot: from hidden states to what a rollout writes down."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxrl_kernels import sample_tokens
from jaxrl_kernels.mesh import constrain, row_spec, split
from jaxrl_llm.models.decoder import Model, output_logits
from jaxrl_llm.models.nucleus import NucleusModel
from jaxrl_llm.sampling.constraints import Constraint, allowed_tokens, next_states
from jaxrl_llm.types import Decoding, Params


class Drawn(NamedTuple):
    """A token per slot and its log-prob under what it was drawn from: the decoding, and the constraint if there is one.

    With a constraint also the free log-prob, under softmax(logits / temperature) without filters, and the state of the
    automaton behind the token.
    """

    tokens: Int[Array, "S"]
    logprobs: Float[Array, "S"]
    free_logprobs: Float[Array, "S"] | None
    states: Int[Array, "S"] | None


def draw_tokens(
    model: Model,
    params: Params,
    hidden: Float[Array, "S D"],
    keys: Key[Array, "S"],
    decoding: Decoding,
    constraint: Constraint | None = None,
    states: Int[Array, "S"] | None = None,
) -> Drawn:
    """Draws from what the hidden states predict, with one uniform number from the key of each slot.

    The constraint goes first, then temperature and filters among the tokens that it allows. `states` are those of the
    slots under it: `start_states` at the beginning of a turn, then what the last call gave.

    Raises:
      ValueError: the constraint is for another vocabulary, or comes without states.
    """
    # each device multiplies its part of the vocabulary; logits are brought together, not the head
    predict = model.allowed_logits if isinstance(model, NucleusModel) else functools.partial(output_logits, model)
    logits = constrain(predict(params, hidden), "batch", "vocabulary")
    rows = row_spec(hidden.shape[:1])
    sample = functools.partial(sample_tokens, **dataclasses.asdict(decoding))
    draw = split(sample, (rows, rows), (rows, rows))
    if constraint is None:
        tokens, logprobs = draw(logits, keys)
        return Drawn(tokens, logprobs, None, None)
    if constraint.vocab_size != logits.shape[-1] or states is None:
        raise ValueError(
            f"the constraint is for {constraint.vocab_size} tokens, the model has {logits.shape[-1]}"
            if states is not None
            else "a constraint needs states, see start_states"
        )
    allowed = jnp.where(allowed_tokens(constraint, states), logits, -jnp.inf)
    tokens, logprobs = draw(allowed, keys)
    scaled = logits / decoding.temperature
    free = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(scaled, axis=-1)
    return Drawn(tokens, logprobs, free, next_states(constraint, states, tokens))
