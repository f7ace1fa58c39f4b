"""The device sampler: what it writes down, that slots do not matter, and the traps others fell into."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import ops
from jaxrl_llm.envs.single_turn import SingleTurnEnv
from jaxrl_llm.sampling import as_rollout, replace_prompts, rollout, score_rollout
from jaxrl_llm.types import Decoding
from tests.sampling.worlds import MODEL, VOCAB, EchoEnv, one_token_prompts, random_prompts, scripted

TASKS = random_prompts(6)
PARAMS = jax.tree.map(
    lambda x: 1.5 * x, jax.jit(MODEL.init)(jax.random.key(1))
)  # sharp enough that tokens differ in probability
full_logits = jax.jit(MODEL.logits)
SIZES = dict(max_length=48, max_turns=3, max_turn_tokens=8, group_size=3, stop_sequences=[[3], [4, 5], [11]])


@partial(jax.jit, static_argnames=("num_slots", "window", "decoding"))
def play(params, key, num_slots=8, window=1, decoding=Decoding()):
    return rollout(MODEL, params, EchoEnv(), TASKS, key, num_slots=num_slots, window=window, decoding=decoding, **SIZES)


@partial(jax.jit, static_argnames="decoding")
def score(params, sampled, decoding):
    return score_rollout(MODEL, params, sampled, decoding=decoding)


@pytest.fixture(scope="module")
def sampled():
    return play(PARAMS, jax.random.key(0))


@pytest.mark.parametrize(
    "options", [{"num_slots": 1}, {"num_slots": 7}, {"num_slots": 64}, {"num_slots": 5, "window": 4}]
)
def test_slots_and_window_do_not_matter(sampled, options):
    """A token's randomness belongs to (key, sequence, position): 1, 7 and 64 slots give the same tokens."""
    other = play(PARAMS, jax.random.key(0), **options)
    for name in ("tokens", "lengths", "mask", "turn_ids", "rewards", "turn_mask", "truncated"):
        np.testing.assert_array_equal(getattr(other, name), getattr(sampled, name), err_msg=name)
    np.testing.assert_allclose(other.logprobs, sampled.logprobs, atol=1e-4)


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(),
        Decoding(temperature=0.3),
        Decoding(temperature=1.3),
        Decoding(top_p=0.9),
        Decoding(top_k=5),
        Decoding(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02),
        Decoding(greedy=True),
    ],
    ids=str,
)
def test_recorded_logprobs_are_those_of_a_full_pass(decoding):
    """Sampled under a temperature and filters, scored under the same: the first ratio is 1 on every token.
    Greedy decoding writes what a full pass finds most likely."""
    sampled = play(PARAMS, jax.random.key(2), decoding=decoding)
    logprobs, entropy = score(PARAMS, sampled, decoding)
    # two orders of summation of float32 logits of size 30
    np.testing.assert_allclose(logprobs, sampled.logprobs, atol=1e-4)
    assert np.all(np.asarray(sampled.logprobs)[~np.asarray(sampled.mask)] == 0)
    assert np.all(np.asarray(entropy)[np.asarray(sampled.mask)] > 0)
    if decoding.greedy:
        best = jnp.argmax(full_logits(PARAMS, sampled.tokens[:, :-1]), axis=-1)
        np.testing.assert_array_equal(jnp.where(sampled.mask[:, 1:], best - sampled.tokens[:, 1:], 0), 0)
    if decoding.filters:
        naive = full_logits(PARAMS, sampled.tokens[:, :-1]) / decoding.temperature
        naive = jnp.take_along_axis(jax.nn.log_softmax(naive), sampled.tokens[:, 1:, None], -1)[..., 0]
        off = np.where(sampled.mask[:, 1:], np.asarray(logprobs[:, 1:]) - np.asarray(naive), 0)
        assert off.max() > 0.02, "the filters must matter in this test"


def test_shared_prefix_changes_nothing(sampled):
    weights = jax.random.normal(jax.random.key(5), sampled.tokens.shape)

    def loss(params, **options):
        logprobs = score_rollout(MODEL, params, sampled, decoding=sampled.decoding, **options)[0]
        return jnp.sum(weights * logprobs), logprobs

    cases = [partial(loss, **options) for options in ({}, {"group_size": 3, "shared_prefix": 3})]
    (plain, shared), grads = zip(*[jax.jit(jax.grad(case, has_aux=True))(PARAMS)[::-1] for case in cases], strict=True)
    np.testing.assert_allclose(shared, plain, atol=1e-4)
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(a).max()))


def test_another_decoding_is_refused(sampled):
    with pytest.raises(ValueError, match=r"sampled under .*temperature=1\.0.* scored under .*temperature=0\.5"):
        score_rollout(MODEL, PARAMS, sampled, decoding=Decoding(temperature=0.5))


def test_structure(sampled):
    """Groups side by side, turns in order, observations of the known length and content between them."""
    assert sampled.group_ids.tolist() == sorted(list(range(6)) * 3)
    for row in range(18):
        tokens, turns, mask = (np.asarray(x[row]) for x in (sampled.tokens, sampled.turn_ids, sampled.mask))
        start, length = int(sampled.prompt_lengths[row]), int(sampled.lengths[row])
        np.testing.assert_array_equal(tokens[:start], TASKS["prompt_tokens"][row // 3][:start])
        np.testing.assert_array_equal(mask, turns >= 0)
        assert not mask[:start].any() and not mask[length:].any() and not tokens[length:].any()
        position = start
        for turn in range(3):
            own = np.flatnonzero(turns == turn)
            np.testing.assert_array_equal(own, position + np.arange(len(own)))
            assert sampled.turn_rewards[row, turn] == len(own)
            text = tokens[own].tolist()
            closed = text[-1] in (3, 11) or text[-2:] == [4, 5]
            assert closed or len(own) == 8
            assert not any(t in (3, 11) for t in text[:-1]) and [4, 5] not in [
                text[i : i + 2] for i in range(len(text) - 2)
            ]
            position += len(own)
            if turn < 2:
                answer = [(t * 7 + len(own)) % VOCAB for t in (text + [0] * 5)[:5]][: len(own) % 6]
                assert tokens[position : position + len(answer)].tolist() == answer
                position += len(answer)
        assert position == length and sampled.rewards[row] == mask.sum() and not sampled.truncated[row]


def test_padding_is_never_guessed_from_ids():
    """The pad id 0 is also a stop here, there are two of them, and one sequence has none before the limit (trap: masks
    derived from `tokens != pad`)."""
    model = scripted([[5, 0], [0], [6, 7, 2, 9], [8] * 12, [0, 0]])
    env = SingleTurnEnv(lambda task, tokens, length: length.astype(jnp.float32))
    sampled = rollout(
        model,
        {},
        env,
        one_token_prompts(5),
        jax.random.key(0),
        max_length=10,
        max_turns=1,
        max_turn_tokens=6,
        stop_sequences=[[0], [2]],
        num_slots=2,
    )
    assert sampled.lengths.tolist() == [3, 2, 4, 7, 2]
    assert np.asarray(sampled.mask).sum(1).tolist() == [2, 1, 3, 6, 1]
    assert sampled.rewards.tolist() == [2, 1, 3, 6, 1]
    assert not sampled.truncated.any()
    np.testing.assert_array_equal(sampled.mask[2], [False, True, True, True] + [False] * 6)


def test_a_stop_sequence_lies_inside_its_turn():
    """[4, 5] closes a turn; a 4 at the end of an observation or prompt and a 5 at the start of a turn do not."""
    env = SingleTurnEnv(lambda task, tokens, length: length.astype(jnp.float32))
    tasks = {"prompt_tokens": jnp.array([[0, 4]]), "prompt_length": jnp.array([2])}
    sampled = rollout(
        scripted([[4, 5, 9, 4, 5, 8, 8]]),
        {},
        env,
        tasks,
        jax.random.key(0),
        max_length=12,
        max_turns=1,
        max_turn_tokens=8,
        stop_sequences=[[4, 5]],
    )
    assert sampled.tokens[0, :6].tolist() == [0, 4, 5, 9, 4, 5] and sampled.lengths[0] == 6


def test_limits_mark_and_never_drop():
    """A full buffer and the last turn end a sequence that is not done: it comes back marked."""
    sampled = rollout(
        MODEL,
        PARAMS,
        EchoEnv(turns=10),
        TASKS,
        jax.random.key(0),
        max_length=24,
        max_turns=20,
        max_turn_tokens=4,
        group_size=1,
        num_slots=4,
    )
    assert sampled.truncated.all() and (sampled.lengths <= 24).all() and (sampled.lengths > 18).all()
    assert (sampled.rewards == jnp.sum(sampled.mask, 1)).all()
    sampled = rollout(
        MODEL,
        PARAMS,
        EchoEnv(turns=10),
        TASKS,
        jax.random.key(0),
        max_length=64,
        max_turns=2,
        max_turn_tokens=4,
        group_size=1,
        num_slots=4,
    )
    assert sampled.truncated.all() and (jnp.sum(sampled.turn_mask, 1) == 2).all()


def test_unscorable_rewards_are_marked():
    """NaN means "no reward": not 0, which next to other rewards would be an advantage."""
    env = SingleTurnEnv(lambda task, tokens, length: jnp.where(tokens[0] % 2 == 0, jnp.nan, 1.0 + tokens[0] % 3))
    sampled = rollout(
        MODEL, PARAMS, env, TASKS, jax.random.key(3), max_length=16, max_turns=1, max_turn_tokens=2, group_size=4
    )
    first = np.take_along_axis(np.asarray(sampled.tokens), np.asarray(sampled.prompt_lengths)[:, None], 1)[:, 0]
    np.testing.assert_array_equal(sampled.scorable, first % 2 == 1)
    assert np.isfinite(sampled.rewards).all() and 0 < sampled.scorable.sum() < 24
    advantages = ops.grpo_advantages(sampled.rewards, sampled.group_ids, sampled.mask, valid=sampled.scorable)
    assert np.all(np.asarray(advantages)[~np.asarray(sampled.scorable)] == 0)


def test_observations_carry_no_gradient(sampled):
    """The loss does not move with the log-prob of any token that the policy did not write."""
    advantages = ops.grpo_advantages(sampled.rewards, sampled.group_ids, sampled.mask)

    def loss(logprobs):
        return ops.ppo_clip_loss(logprobs, sampled.logprobs, advantages, sampled.mask)[0]

    grad = np.asarray(jax.grad(loss)(sampled.logprobs))
    assert np.all(grad[~np.asarray(sampled.mask)] == 0) and np.any(grad != 0)


def test_sampler_uses_the_parameters_it_is_given(sampled):
    """After updates the recorded log-probs are those of the new parameters, and poisoned ones change the samples."""
    moved = jax.tree.map(lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), PARAMS)
    after = play(moved, jax.random.key(0))
    new, _ = score(moved, after, after.decoding)
    old, _ = score(PARAMS, after, after.decoding)
    np.testing.assert_allclose(new, after.logprobs, atol=1e-4)
    assert np.abs(np.asarray(old - new)).max() > 0.1
    poisoned = moved | {"embedding": moved["embedding"].at[17].add(100.0)}
    assert not np.array_equal(play(poisoned, jax.random.key(0)).tokens, after.tokens)


def test_one_compilation_per_shape():
    traces = []

    @jax.jit
    def counted(params, key):
        traces.append(1)
        return rollout(MODEL, params, EchoEnv(), TASKS, key, **SIZES)

    for seed in range(3):
        counted(PARAMS, jax.random.key(seed))
    assert len(traces) == 1


def test_seeds_may_be_mapped(sampled):
    """The whole loop under vmap, as sweeps over seeds run it."""
    keys = jnp.stack([jax.random.key(7), jax.random.key(0)])
    both = jax.jit(jax.vmap(lambda key: rollout(MODEL, PARAMS, EchoEnv(), TASKS, key, num_slots=8, **SIZES)))(keys)
    np.testing.assert_array_equal(both.tokens[1], sampled.tokens)


def test_bad_input():
    env = SingleTurnEnv(lambda task, tokens, length: jnp.float32(0))
    call = partial(rollout, MODEL, PARAMS, env, TASKS, jax.random.key(0), max_turns=1, max_turn_tokens=4)
    with pytest.raises(ValueError, match="prompts of up to 9 tokens leave no room in max_length=9"):
        call(max_length=9)
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        call(max_length=20, group_size=0)
    with pytest.raises(ValueError, match="at least one token"):
        call(max_length=20, stop_sequences=[[]])
    for wrong, message in (
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"top_k": 0}, "top_k must be"),
        ({"top_p": 1.2}, "top_p must lie"),
        ({"min_p": 1.0}, "min_p must lie"),
    ):
        with pytest.raises(ValueError, match=message):
            Decoding(**wrong)


def test_responses_of_others_are_scored_like_ones_own():
    """One turn of a rollout, taken apart and put together again, has the log-probs that it had."""
    sizes = dict(max_length=17, max_turns=1, max_turn_tokens=8)
    one = jax.jit(lambda key: rollout(MODEL, PARAMS, EchoEnv(turns=1), TASKS, key, **sizes))(jax.random.key(0))
    places = jnp.minimum(jnp.arange(8) + one.prompt_lengths[:, None], 16)
    answers = jnp.take_along_axis(one.tokens, places, axis=1)
    again = as_rollout(TASKS["prompt_tokens"], one.prompt_lengths, answers, one.lengths - one.prompt_lengths)
    for name in ("tokens", "lengths", "mask", "turn_ids"):
        np.testing.assert_array_equal(getattr(again, name), getattr(one, name), err_msg=name)
    logprobs, _ = jax.jit(lambda rows: score_rollout(MODEL, PARAMS, rows, decoding=Decoding()))(again)
    np.testing.assert_allclose(logprobs, one.logprobs, atol=1e-4)  # one pass against a cache, float32


@pytest.mark.parametrize("change", [-1, 0, 2])
def test_responses_behind_other_prompts(sampled, change):
    """What was sampled moves with its prompt: the log-probs of the new rows are those of rows written by hand."""
    lengths = jnp.maximum(sampled.prompt_lengths + change, 1)
    prompts = jax.random.randint(jax.random.key(3), (sampled.tokens.shape[0], 12), 0, VOCAB)
    moved = replace_prompts(sampled, prompts, lengths)
    for row in range(0, sampled.tokens.shape[0], 5):
        old, new, end = int(sampled.prompt_lengths[row]), int(lengths[row]), int(sampled.lengths[row])
        room = min(end - old, SIZES["max_length"] - new)
        want = np.concatenate([prompts[row, :new], sampled.tokens[row, old : old + room]])
        assert int(moved.lengths[row]) == len(want) and bool(moved.scorable[row]) == (room == end - old)
        np.testing.assert_array_equal(moved.tokens[row, : len(want)], want)
        for name, fill in (("mask", False), ("logprobs", 0), ("turn_ids", -1)):
            array = getattr(moved, name)[row]
            np.testing.assert_array_equal(array[new : new + room], getattr(sampled, name)[row, old : old + room])
            assert (array[:new] == fill).all() and (array[new + room :] == fill).all()
    with pytest.raises(ValueError, match="prompts of 60 tokens do not fit into rows of 48"):
        replace_prompts(sampled, jnp.zeros((sampled.tokens.shape[0], 60), jnp.int32), lengths)
