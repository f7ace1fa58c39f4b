"""Supervised fine-tuning on packed rows."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxrl_llm import ops
from jaxrl_llm.models.decoder import Model
from jaxrl_llm.train.state import apply_gradients
from jaxrl_llm.types import Metrics, Params, TrainState


def score_packed(
    model: Model, params: Params, packed: dict[str, Array]
) -> tuple[Float[Array, "B T D"], Float[Array, "B T"], Float[Array, "B T"], Bool[Array, "B T"]]:
    """For each token of packed rows: the hidden state before it, and its log-prob and entropy (nats) where `mask` is
    true, which comes last and leaves the first token of a row out.

    `packed` is what `data.pack_sequences` returns, or `tokens` and `mask` alone: rows of one sequence each.
    """
    hidden, _ = model.apply(
        params, packed["tokens"], positions=packed.get("positions"), segment_ids=packed.get("segment_ids")
    )
    # hidden[:, t] is the state that predicts tokens[:, t]; whole rows, so that devices can divide them
    hidden = jnp.roll(hidden, 1, axis=1)
    mask = packed["mask"] & (jnp.arange(hidden.shape[1]) > 0)
    logprobs, entropy = ops.token_logprobs(
        hidden, model.head(params), packed["tokens"], softcap=model.config.logit_softcap, mask=mask
    )
    return hidden, logprobs, entropy, mask


def make_sft_step(
    model: Model, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, Metrics]]:
    """`step(state, packed) -> (state, metrics)`: negative log-likelihood, mean over the masked tokens of the batch.

    `packed` is what `data.pack_sequences` returns: a segment sees only itself. `state.params` are the decoder's. The
    metric `token_probability` is the geometric mean of the masked tokens' probabilities.
    """

    def loss_fn(params: Params, packed: dict[str, Array]) -> tuple[Array, Metrics]:
        _, logprobs, entropy, mask = score_packed(model, params, packed)
        loss, metrics = ops.sft_loss(logprobs, mask)
        return loss, {**metrics, "entropy": ops.masked_mean(entropy, mask), "token_probability": jnp.exp(-loss)}

    def step(state: TrainState, packed: dict[str, Array]) -> tuple[TrainState, Metrics]:
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, packed)
        state, norms = apply_gradients(state, grads, optimizer, loss)
        return state, {"loss": loss, **metrics, **norms, "tokens": jnp.sum(packed["segment_ids"] >= 0)}

    return step
