"""Policies with adapters in the sampler and the scorer: the first ratio is 1, and no weights are stale."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.adapters import apply_prefix, init_prefix
from jaxrl_llm.models.lora import LoraConfig, apply_lora, init_lora, merge_lora
from jaxrl_llm.sampling import rollout, score_rollout
from jaxrl_llm.types import Decoding
from tests.sampling.worlds import MODEL, EchoEnv, random_prompts

# sharp enough that tokens differ in probability
PARAMS = jax.tree.map(lambda x: 1.5 * x, jax.jit(MODEL.init)(jax.random.key(1)))
LORA = LoraConfig(rank=2, alpha=4.0, targets=("query", "value", "gate", "down"))
BESIDE, PREFIXED = apply_lora(MODEL, LORA), apply_prefix(MODEL, 3)
TASKS = random_prompts(4)
SIZES = dict(max_length=32, max_turns=2, max_turn_tokens=6, group_size=2, stop_sequences=[[3]], num_slots=5)
PREFIX = jax.jit(init_prefix, static_argnums=0)(MODEL, PARAMS, jnp.array([9, 30, 2]))
SHARP = Decoding(temperature=0.3, top_p=0.9)


@partial(jax.jit, static_argnames=("model", "decoding"))
def play(model, params, decoding=Decoding()):
    return rollout(model, params, EchoEnv(2), TASKS, jax.random.key(0), decoding=decoding, **SIZES)


@partial(jax.jit, static_argnames=("model", "decoding", "shared_prefix"))
def score(model, params, sampled, decoding=Decoding(), shared_prefix=0):
    return score_rollout(
        model, params, sampled, decoding=decoding, group_size=2 if shared_prefix else 1, shared_prefix=shared_prefix
    )[0]


def drawn(size):
    """An adapter as training leaves it, with a second half that is not zero."""
    fresh = init_lora(jax.random.key(2), PARAMS, LORA)
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    return jax.tree.unflatten(
        tree, [x + size * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


ADAPTER = drawn(0.1)


@pytest.mark.parametrize("decoding", [Decoding(), SHARP], ids=str)
@pytest.mark.parametrize("form", ["merged", "beside", "prefix"])
def test_the_first_ratio_is_one(form, decoding):
    model, params = {
        "merged": (MODEL, merge_lora(PARAMS, ADAPTER, LORA)),
        "beside": (BESIDE, {"base": PARAMS, "lora": ADAPTER}),
        "prefix": (PREFIXED, {"base": PARAMS, "prefix": PREFIX}),
    }[form]
    sampled = play(model, params, decoding)
    mask = np.asarray(sampled.mask)
    for shared_prefix in (0,) if decoding.filters else (0, 3):
        ratio = np.exp(np.asarray(score(model, params, sampled, decoding, shared_prefix) - sampled.logprobs))
        assert mask.sum() > 40 and np.abs(ratio - 1)[mask].max() < 1e-4
    if form != "prefix":  # the adapter matters: the base's probabilities are others
        ratio = np.exp(np.asarray(score(MODEL, PARAMS, sampled, decoding) - sampled.logprobs))
        assert np.abs(ratio - 1)[mask].max() > 1e-2


def test_merged_and_beside_sample_alike_and_the_prefix_does_not():
    merged = play(MODEL, merge_lora(PARAMS, ADAPTER, LORA))
    beside = play(BESIDE, {"base": PARAMS, "lora": ADAPTER})
    np.testing.assert_array_equal(merged.tokens, beside.tokens)
    np.testing.assert_allclose(merged.logprobs, beside.logprobs, atol=1e-4)
    base = play(MODEL, PARAMS)
    prefixed = play(PREFIXED, {"base": PARAMS, "prefix": PREFIX})
    assert np.any(base.tokens != prefixed.tokens)


def test_a_poisoned_adapter_changes_samples_and_a_fresh_one_does_not():
    """Trap 12: the sampler must not run on stale or base weights."""
    base = play(MODEL, PARAMS)
    fresh, poisoned = init_lora(jax.random.key(2), PARAMS, LORA), drawn(100.0)
    for model, wrap in (
        (MODEL, lambda lora: merge_lora(PARAMS, lora, LORA)),
        (BESIDE, lambda lora: {"base": PARAMS, "lora": lora}),
    ):
        np.testing.assert_array_equal(play(model, wrap(fresh)).tokens, base.tokens)
        # by chance one token in 64 agrees
        other = play(model, wrap(poisoned))
        both = np.asarray(base.mask & other.mask)
        assert np.mean((np.asarray(base.tokens) == np.asarray(other.tokens))[both]) < 0.3
