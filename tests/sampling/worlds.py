"""Small worlds for the sampler's tests: a policy that follows a script, and environments that answer in known ways."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models import DecoderConfig, make_decoder

VOCAB = 64
MODEL = make_decoder(DecoderConfig(VOCAB, width=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=64))


@dataclasses.dataclass(frozen=True)
class ScriptedModel:
    """A policy that writes `script[sequence, position]` at each position, whatever stands before."""

    script: Any
    config: DecoderConfig = DecoderConfig(VOCAB)

    def init_cache(self, batch, length, dtype=jnp.float32):
        return [{"keys": jnp.zeros((batch, 1, 1, length)), "values": jnp.zeros((batch, 1, length, 1))}]

    def apply(self, params, tokens, *, positions, cache):
        # a prompt's first token says which script is followed; the cache carries it, as attention would
        first = jnp.where(positions[:, :1] == 0, tokens[:, :1], cache[0]["keys"][:, 0, 0, :1].astype(jnp.int32))
        cache = [cache[0] | {"keys": cache[0]["keys"].at[:, 0, 0, 0].set(first[:, 0].astype(jnp.float32))}]
        planned = self.script[first, jnp.minimum(positions + 1, self.script.shape[1] - 1)]
        return 40.0 * jax.nn.one_hot(planned, VOCAB), cache

    def head(self, params):
        return jnp.eye(VOCAB)


@dataclasses.dataclass(frozen=True)
class EchoEnv:
    """Answers each turn with tokens made from it, 0 to 5 of them; ends after `turns` turns. The reward of a turn is its
    length."""

    turns: int = 3

    def reset(self, key, task):
        return jnp.int32(0), task["prompt_tokens"], task["prompt_length"]

    def step(self, state, turn_tokens, length):
        observation = (turn_tokens[:5] * 7 + length) % VOCAB
        return state + 1, observation, length % 6, length.astype(jnp.float32), state + 1 >= self.turns


def scripted(rows):
    """Scripts by their prompt's first token, which is their index; position 0 is the prompt."""
    width = max(map(len, rows))
    return ScriptedModel(jnp.asarray([[0, *row, *[0] * (width - len(row))] for row in rows]))


def one_token_prompts(num):
    return {"prompt_tokens": jnp.arange(num)[:, None], "prompt_length": jnp.ones(num, jnp.int32)}


def random_prompts(num, length=9, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "prompt_tokens": jnp.asarray(rng.integers(1, VOCAB, (num, length)), jnp.int32),
        "prompt_length": jnp.asarray(rng.integers(4, length + 1, num), jnp.int32),
    }
