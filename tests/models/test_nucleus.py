"""A policy in another one's nucleus: it samples and is scored alike, and no gradient reaches the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import ops
from jaxrl_llm.models import DecoderConfig, make_decoder, nucleus_model
from jaxrl_llm.sampling import constrain, rollout, score_rollout, token_trie
from jaxrl_llm.types import Decoding
from tests.sampling.worlds import VOCAB, EchoEnv, random_prompts

MODEL = make_decoder(DecoderConfig(VOCAB, width=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=32))
TASKS = random_prompts(6)
POLICY, MASKING = (
    jax.tree.map(lambda x: 2 * x, jax.jit(MODEL.init)(jax.random.key(seed))) for seed in (1, 2)
)  # sharp enough that tokens differ in probability
PARAMS = {"policy": POLICY, "masking": MASKING}
SIZES = dict(max_length=24, max_turns=2, max_turn_tokens=6, group_size=3, stop_sequences=[[3], [11]])


@functools.cache
def played(top_p):
    model = nucleus_model(MODEL, top_p=top_p, always=(3,))

    @jax.jit
    def play_and_score(params):
        sampled = rollout(model, params, EchoEnv(), TASKS, jax.random.key(0), num_slots=8, **SIZES)
        return sampled, *score_rollout(model, params, sampled, decoding=Decoding())

    return play_and_score(PARAMS)


def test_samples_lie_in_the_nucleus_and_are_scored_as_sampled():
    sampled, logprobs, entropy = played(0.5)
    logits, masking = (jax.jit(MODEL.logits)(params, sampled.tokens)[:, :-1] for params in (POLICY, MASKING))
    allowed = ops.nucleus_mask(masking, top_p=0.5, always=(3,))
    expected = ops.masked_log_softmax(logits, allowed)
    picked = jnp.take_along_axis(expected, sampled.tokens[:, 1:, None], axis=-1)[..., 0]
    mask = np.asarray(sampled.mask[:, 1:])
    # a token on the nucleus' edge may fall to either side by rounding between a cached and a full pass
    np.testing.assert_allclose(sampled.logprobs[:, 1:][mask], picked[mask], atol=1e-4)
    np.testing.assert_allclose(logprobs[:, 1:][mask], picked[mask], atol=1e-4)
    np.testing.assert_array_equal(logprobs[~sampled.mask], 0)
    wanted = -jnp.sum(jnp.where(allowed, jnp.exp(expected) * jnp.where(allowed, expected, 0), 0), axis=-1)
    np.testing.assert_allclose(entropy[:, 1:][mask], wanted[mask], atol=1e-4)
    assert np.mean(np.sum(allowed, axis=-1)) < VOCAB / 2 and np.all(allowed[..., 3])


def test_the_whole_vocabulary_is_the_plain_policy():
    sampled, logprobs, _ = played(1.0)
    plain = jax.jit(lambda params: rollout(MODEL, params, EchoEnv(), TASKS, jax.random.key(0), num_slots=8, **SIZES))(
        POLICY
    )
    for name in ("tokens", "mask", "lengths", "rewards"):
        np.testing.assert_array_equal(getattr(sampled, name), getattr(plain, name), err_msg=name)
    # sums of 64 in another order
    np.testing.assert_allclose(logprobs, score_rollout(MODEL, POLICY, plain, decoding=Decoding())[0], atol=1e-5)


def test_the_gradient_is_the_policys_alone():
    model, sampled = nucleus_model(MODEL, top_p=0.5, always=(3,)), played(0.5)[0]
    grads = jax.jit(jax.grad(lambda params: jnp.sum(score_rollout(model, params, sampled, decoding=Decoding())[0])))(
        PARAMS
    )
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(grads["masking"]))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    assert any(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(grads["policy"]))


def test_bad_input():
    for top_p in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"top_p must lie in \(0, 1\]"):
            nucleus_model(MODEL, top_p=top_p)
    constraint = constrain(token_trie([[1, 2]]), vocab_size=VOCAB)
    with pytest.raises(ValueError, match="sampled without a constraint"):
        score_rollout(nucleus_model(MODEL), PARAMS, played(0.5)[0], decoding=Decoding(), constraint=constraint)
