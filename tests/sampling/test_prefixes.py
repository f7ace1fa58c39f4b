"""Responses that go on in the next iteration."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import ops
from jaxrl_llm.envs import SingleTurnEnv
from jaxrl_llm.sampling import PartialRolloutBuffer, Prefix, ResumedEnv, resume_tasks, rollout
from tests.sampling.worlds import one_token_prompts, scripted

EOS, BUDGET, WIDTH = 9, 3, 12
SCRIPTS = [[5, EOS], [11, 12, 13, 14, EOS], [21, 22, 23, 24, 25, 26, 27, EOS], [30] * 20]
ENV = SingleTurnEnv(lambda task, tokens, length: length + tokens[0] / 100)  # of the whole response
POLICY = scripted(SCRIPTS)


@jax.jit
def sample(tasks):
    sampled = rollout(
        POLICY, {}, ResumedEnv(ENV), tasks, jax.random.key(0), max_length=WIDTH, max_turns=1, max_turn_tokens=BUDGET,
        stop_sequences=[[EOS]], num_slots=2,
    )  # fmt: skip
    return dataclasses.replace(sampled, prompt_lengths=tasks["prompt_length"])


def test_a_response_goes_on_until_it_ends_and_only_what_is_new_is_in_the_loss():
    buffer, problems, finished, iterations = PartialRolloutBuffer(), one_token_prompts(4), {}, []
    prefixes = [Prefix(n, [n], 1) for n in range(4)]
    for _ in range(4):
        sampled = sample(resume_tasks(prefixes, problems, width=WIDTH - 1))
        ids = [prefix.prompt_id for prefix in prefixes]
        unfinished = buffer.put_unfinished(sampled, ids, end_tokens=[EOS])
        iterations.append([ids[row] for row in np.flatnonzero(unfinished)])
        known = np.array([len(prefix.tokens) for prefix in prefixes])
        places = np.arange(WIDTH)
        np.testing.assert_array_equal(
            sampled.mask, (places >= known[:, None]) & (places < np.asarray(sampled.lengths)[:, None])
        )
        for row in np.flatnonzero(~unfinished):
            finished.setdefault(ids[row], jax.tree.map(lambda leaf, row=row: leaf[row], sampled))
        # a shape for all iterations: what is missing is filled with the first problem again
        prefixes = buffer.take(4)
        prefixes += [Prefix(0, [0], 1)] * (4 - len(prefixes))
    assert iterations == [[1, 2, 3], [2, 3], [3], []]  # the last fills its row without an end, and stays out
    for n, length in enumerate([2, 5, 8, WIDTH - 1]):
        row = finished[n]
        assert row.tokens[1 : row.lengths].tolist() == SCRIPTS[n][:length] and row.prompt_lengths == 1
        np.testing.assert_allclose(row.rewards, length + SCRIPTS[n][0] / 100, rtol=1e-6)  # float32
        assert row.mask.sum() == (length - 1) % BUDGET + 1

    def loss(logprobs):
        old = jnp.zeros_like(logprobs)
        return ops.ppo_clip_loss(logprobs, old, jnp.ones_like(logprobs), finished[2].mask[None])[0]

    gradient = jax.grad(loss)(jnp.zeros((1, WIDTH)))
    np.testing.assert_array_equal(gradient[0] != 0, finished[2].mask)


def test_the_oldest_come_first_and_a_checkpoint_keeps_them():
    buffer = PartialRolloutBuffer()
    for n in range(3):
        buffer.put(n, [n, n + 1, n + 2], 2)
    again = PartialRolloutBuffer()
    again.set_state(buffer.get_state())
    for one in (buffer, again):
        assert [prefix.prompt_id for prefix in one.take(2)] == [0, 1] and len(one) == 1
        (last,) = one.take(5)
        assert (last.tokens.tolist(), last.prompt_length, len(one)) == ([2, 3, 4], 2, 0)


def test_prefixes_that_cannot_be():
    with pytest.raises(ValueError, match="prompt_length=3 must be 1 to 2"):
        PartialRolloutBuffer().put(0, [1, 2], 3)
    for prefixes in ([], [Prefix(0, [1, 2, 3], 1)]):
        with pytest.raises(ValueError, match="none above width=2"):
            resume_tasks(prefixes, one_token_prompts(1), width=2)
