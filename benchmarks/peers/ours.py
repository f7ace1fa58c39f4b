"""Worker for this library: everything in one `rollout`, slots refilled, group prompts shared."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.works import BATCH_SIZES, Prepared, Work, fastest, serve
from jaxrl_llm.models.decoder import DecoderConfig, Model, make_decoder
from jaxrl_llm.sampling import rollout
from jaxrl_llm.types import Params, Rollout

STOP = 0


@functools.partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["turns"])
@dataclasses.dataclass(frozen=True)
class ToolEnv:
    """Looks the first token of a turn up in a table, until the last turn."""

    table: jax.Array  # int32[V, O]
    turns: int

    def reset(self, key: jax.Array, prompt: jax.Array) -> tuple[Any, jax.Array, int]:
        return jnp.int32(1), prompt, prompt.shape[0]

    def step(self, turn: Any, tokens: jax.Array, length: jax.Array) -> tuple[Any, jax.Array, int, jax.Array, jax.Array]:
        observation = self.table[tokens[0]]
        return turn + 1, observation, observation.shape[0], jnp.float32(0), turn == self.turns


def stopping(model: Model, params: Params, mean: int) -> tuple[Model, Params]:
    """The model with a token STOP of probability 1 / `mean` at every position.

    The first coordinate of the hidden states is kept for its logit. The others are scaled down, so that the logits of
    all other tokens are near 0 and their sum is known.
    """
    embedding = params["embedding"]
    logit = math.log((model.config.vocab_size - 1) / (mean - 1))

    def apply(*args: Any, **kwargs: Any) -> Any:
        hidden, cache = model.apply(*args, **kwargs)
        return (0.1 * hidden).at[..., 0].set(logit), cache

    embedding = embedding.at[STOP].set(0).at[:, 0].set(0).at[STOP, 0].set(1)
    return dataclasses.replace(model, apply=apply), {**params, "embedding": embedding}


def sampler(work: Work) -> Callable[[int], Rollout]:
    """`sample(num_slots)` for all rollouts of a work, the same ones whatever the number of slots."""
    sizes = work.sizes
    config = DecoderConfig(
        sizes.vocab,
        width=sizes.width,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        ffn_width=sizes.ffn,
    )
    model = make_decoder(config)
    params = model.init(jax.random.key(0))
    if work.mean is not None:
        model, params = stopping(model, params, work.mean)
    env = ToolEnv(jnp.asarray(work.tool() if work.observation else np.zeros((sizes.vocab, 1), np.int32)), work.turns)

    @functools.partial(jax.jit, static_argnames="num_slots")
    def sample(params: Params, env: ToolEnv, prompts: jax.Array, num_slots: int) -> Rollout:
        return rollout(
            model,
            params,
            env,
            prompts,
            jax.random.key(1),
            max_length=work.max_length,
            max_turns=work.turns,
            max_turn_tokens=work.turn_tokens,
            stop_sequences=() if work.mean is None else ((STOP,),),
            group_size=work.group,
            num_slots=num_slots,
        )

    prompts = jnp.asarray(work.prompt_ids())
    return lambda num_slots: jax.block_until_ready(sample(params, env, prompts, num_slots=num_slots))


def turn_lengths(sampled: Rollout) -> np.ndarray:
    """int[B, K]: sampled tokens of each turn."""
    turns = np.arange(sampled.turn_mask.shape[1])
    return np.sum(np.asarray(sampled.turn_ids)[:, :, None] == turns, axis=1)


def prepare(work: Work, lengths: np.ndarray | None) -> Prepared:
    """Draws the lengths that the other libraries are given."""
    sample = sampler(work)
    slots = sorted({min(size, work.sequences) for size in BATCH_SIZES[:2]})
    name, run = fastest({f"{number} slots": functools.partial(sample, number) for number in slots}, compiles=True)
    return Prepared(run, name, turn_lengths(run()))


if __name__ == "__main__":
    serve(prepare, {"library": "jaxrl_llm", "version": f"jax {importlib.metadata.version('jax')}"})
