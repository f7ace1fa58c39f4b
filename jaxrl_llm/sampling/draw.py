"""The next token of each slot: from hidden states to what a rollout writes down."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Float, Int, Key

from jaxrl_kernels import sample_tokens
from jaxrl_llm.models.decoder import Model, output_logits
from jaxrl_llm.types import Decoding, Params


class Drawn(NamedTuple):
    """A token per slot, its log-prob under what it was drawn from and, with a constraint, the log-prob without it and
    the state behind it."""

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
    constraint: None = None,
    states: Int[Array, "S"] | None = None,
) -> Drawn:
    """Draws from what the hidden states predict, with one uniform number from the key of each slot."""
    logits = output_logits(model, params, hidden)
    return Drawn(*sample_tokens(logits, keys, **dataclasses.asdict(decoding)), None, None)
