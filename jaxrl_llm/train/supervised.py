"""Supervised fine-tuning on packed rows."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jaxrl_llm import ops
from jaxrl_llm.models.decoder import Model
from jaxrl_llm.train.state import apply_gradients
from jaxrl_llm.types import Metrics, Params, TrainState


def make_sft_step(
    model: Model, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, Metrics]]:
    """`step(state, packed) -> (state, metrics)`: negative log-likelihood, mean over the masked tokens of the batch.

    `packed` is what `data.pack_sequences` returns: a segment sees only itself. `state.params` are the decoder's. The
    metric `token_probability` is the geometric mean of the masked tokens' probabilities.
    """

    def loss_fn(params: Params, packed: PyTree) -> tuple[Array, Metrics]:
        hidden, _ = model.apply(
            params, packed["tokens"], positions=packed["positions"], segment_ids=packed["segment_ids"]
        )
        # hidden[:, t] is the state that predicts tokens[:, t]; whole rows, so that devices can divide them
        hidden = jnp.roll(hidden, 1, axis=1)
        mask = packed["mask"] & (jnp.arange(hidden.shape[1]) > 0)
        logprobs, entropy = ops.token_logprobs(
            hidden, model.head(params), packed["tokens"], softcap=model.config.logit_softcap, mask=mask
        )
        loss, metrics = ops.sft_loss(logprobs, mask)
        return loss, {**metrics, "entropy": ops.masked_mean(entropy, mask), "token_probability": jnp.exp(-loss)}

    def step(state: TrainState, packed: dict[str, Array]) -> tuple[TrainState, Metrics]:
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, packed)
        state, norms = apply_gradients(state, grads, optimizer, loss)
        return state, {"loss": loss, **metrics, **norms, "tokens": jnp.sum(packed["segment_ids"] >= 0)}

    return step
