"""Sampler and trainer share one definition of a model: the first ratio is 1 on every token, whatever the family."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs.single_turn import SingleTurnEnv
from jaxrl_llm.models.hub import load
from jaxrl_llm.sampling import rollout, score_rollout
from jaxrl_llm.types import Decoding

GOLDEN = Path(__file__).resolve().parents[1] / "models" / "golden"
NAMES = sorted(path.name.removeprefix("decoder_") for path in GOLDEN.glob("decoder_*"))
DECODINGS = [
    Decoding(temperature=temperature, **filters)
    for temperature in (0.3, 1.0, 1.3)
    for filters in ({"top_p": 0.9}, {"top_k": 50}, {"top_p": 0.9, "top_k": 50})
]


@cache
def model_of(name):
    return load(GOLDEN / f"decoder_{name}")


def prompts():
    rng = np.random.default_rng(0)
    lengths = jnp.asarray([3, 7, 5, 6], jnp.int32)
    return {"prompt_tokens": jnp.asarray(rng.integers(3, 80, (4, 7)), jnp.int32), "prompt_length": lengths}


def check(name, decoding, **options):
    """Samples and scores; `options` are those of `score_rollout`."""
    model = model_of(name)
    env = SingleTurnEnv(lambda task, tokens, length: length.astype(jnp.float32))
    sizes = dict(max_length=20, max_turns=1, max_turn_tokens=12, stop_sequences=[[2]], group_size=3, num_slots=5)
    play = jax.jit(partial(rollout, model, env=env, decoding=decoding, **sizes))
    sampled = play(params=model.params, tasks=prompts(), key=jax.random.key(1))
    mask = np.asarray(sampled.mask)
    assert mask.sum() > 60  # sequences run on well beyond the windows of the families that have one
    logprobs, _ = jax.jit(partial(score_rollout, model, decoding=decoding, **options))(model.params, sampled)
    # float32 logits of size 3, summed in another order and divided by a temperature of 0.3
    np.testing.assert_allclose(np.asarray(logprobs)[mask], np.asarray(sampled.logprobs)[mask], atol=1e-4)


# One setting for each family, going round, so that all nine are met. Compiling takes nearly all of the time.
EACH = [(name, DECODINGS[i % len(DECODINGS)]) for i, name in enumerate(NAMES)]
ALL = [(name, decoding) for name in NAMES for decoding in DECODINGS if (name, decoding) not in EACH]


@pytest.mark.parametrize(("name", "decoding"), EACH, ids=str)
def test_first_ratio_is_one(name, decoding):
    shared = {"group_size": 3, "shared_prefix": 2} if name == "gemma3" else {}  # windows over a prompt in the cache
    check(name, decoding, **shared)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "decoding"), ALL, ids=str)
def test_first_ratio_is_one_at_every_setting(name, decoding):
    check(name, decoding)
