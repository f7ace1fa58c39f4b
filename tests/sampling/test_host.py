"""Rollouts against environments on strings: the same tokens as on the device, and every way a call can go wrong."""

import asyncio
import threading
import time

import jax
import numpy as np
import pytest

from jaxrl_llm.sampling import CallLimits, host_rollout, rollout
from jaxrl_llm.types import Decoding
from tests.sampling.worlds import MODEL, VOCAB, EchoEnv, random_prompts

LIMITS = dict(max_length=48, max_turns=3, max_turn_tokens=5, stop_sequences=((3,),), num_slots=4)
PROMPTS = random_prompts(5)
QUICK = CallLimits(timeout=5.0, retries=0, backoff=0.0)


class Letters:
    """One character for each token id."""

    def encode(self, text):
        return [ord(character) - 48 for character in text]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return "".join(chr(48 + int(i)) for i in ids)


LETTERS = Letters()


class Echo:
    """`EchoEnv` on strings. `trouble(task, number of the call)` is called before each answer."""

    def __init__(self, turns=3, trouble=lambda task, call: None):
        self.turns, self.trouble, self.calls, self.lock = turns, trouble, {}, threading.Lock()

    def reset(self, task):
        return (task, 0), LETTERS.decode(PROMPTS["prompt_tokens"][task, : PROMPTS["prompt_length"][task]])

    def step(self, state, text):
        task, turn = state
        with self.lock:
            self.calls[task] = self.calls.get(task, 0) + 1
            call = self.calls[task]
        self.trouble(task, call)
        ids = LETTERS.encode(text)
        observation = [(token * 7 + len(ids)) % VOCAB for token in ids[:5]]
        observation += [len(ids) % VOCAB] * (5 - len(observation))
        return (task, turn + 1), LETTERS.decode(observation[: len(ids) % 6]), float(len(ids)), turn + 1 >= self.turns


class AsyncEcho(Echo):
    async def step(self, state, text):
        await asyncio.sleep(0.001)
        return super().step(state, text)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def play(params, env, **options):
    options = {"call_limits": QUICK, "max_observation": 16, **LIMITS, **options}
    return host_rollout(MODEL, params, env, range(5), jax.random.key(1), tokenizer=LETTERS, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Echo, {"group_size": 2}), (AsyncEcho, {"steps": 3}), (Echo, {"decoding": Decoding(0.7, top_k=9), "steps": 1})],
)
def test_equals_the_rollout_on_the_device(params, kind, options):
    found, episodes = play(params, kind(), **options)
    device = {name: value for name, value in options.items() if name != "steps"}
    expected = rollout(MODEL, params, EchoEnv(), PROMPTS, jax.random.key(1), **LIMITS, **device)
    for name in ("tokens", "mask", "turn_ids", "lengths", "group_ids", "rewards", "turn_mask", "truncated"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    # sums over another number of padded places
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=2e-6)
    assert [episode.calls for episode in episodes] == np.sum(expected.turn_mask, axis=1).tolist()
    assert not any(episode.errors for episode in episodes)


def test_failed_attempts_are_made_again(params):
    def trouble(task, call):
        if call == 1:
            raise ConnectionError("the index is away")

    expected, _ = play(params, Echo())
    found, episodes = play(params, Echo(trouble=trouble), call_limits=QUICK._replace(retries=1))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert [episode.calls for episode in episodes] == [int(n) + 1 for n in np.sum(expected.turn_mask, axis=1)]
    assert not any(episode.errors for episode in episodes)


def test_errors_are_shown_to_the_policy_and_nothing_is_dropped(params):
    """One task fails for good at its second call, one hangs at its first; the others play on as ever."""
    hang = threading.Event()

    def trouble(task, call):
        if task == 1 and call == 2:
            raise ValueError("no such city")
        if task == 2 and call == 1:
            hang.wait(30)

    expected, _ = play(params, Echo())
    found, episodes = play(
        params, Echo(trouble=trouble), call_limits=QUICK._replace(timeout=1.0), render_error="<{}>".format,
        max_observation=40, max_length=96,
    )  # fmt: skip
    hang.set()
    for row in (0, 3, 4):
        np.testing.assert_array_equal(found.tokens[row, :48], expected.tokens[row])
    assert episodes[1].errors == ["ValueError: no such city"]
    assert episodes[2].errors == ["no answer within 1.0 seconds"]
    for row, message in ((1, "<ValueError: no such city>"), (2, "<no answer within 1.0 seconds>")):
        forced = np.asarray(found.tokens[row])[~np.asarray(found.mask[row])]
        assert message in LETTERS.decode(forced[: 96 - int(found.mask[row].sum())])
    # the failed turn pays nothing, and the episode went on in the state it was in, so the limit on turns ended it
    assert found.turn_rewards[1, 1] == 0 and episodes[1].stopped == "turns" and found.truncated[1]


def test_limits_are_marked(params):
    found, episodes = play(params, Echo(turns=9), max_calls=2)
    assert {episode.stopped for episode in episodes} <= {"calls", "tokens"} and np.all(found.truncated)
    assert all(episode.calls <= 2 for episode in episodes)

    found, episodes = play(params, Echo(trouble=lambda task, call: time.sleep(0.4 * (task == 3))), max_seconds=0.2)
    assert episodes[3].stopped == "seconds" and found.truncated[3] and found.rewards[3] == 0

    found, episodes = play(params, Echo(), max_observation=2)
    assert sum(episode.cut_tokens for episode in episodes) > 0
    runs = np.diff(np.flatnonzero(np.diff(np.asarray(found.mask[0], int))))[1::2]
    assert len(runs) == 0 or runs.max() <= 2  # observations between turns


def test_long_observations_keep_both_ends(params):
    class Long(Echo):
        def step(self, state, text):
            return state, "abcdefghijklmnop", 0.0, False

    found, episodes = play(params, Long(), max_observation=8)
    forced = np.asarray(found.tokens[0])[int(found.prompt_lengths[0]) :][
        ~np.asarray(found.mask[0])[int(found.prompt_lengths[0]) :]
    ]
    assert LETTERS.decode(forced[:8]) == "abcdefop" and episodes[0].cut_tokens >= 8


def test_bad_input(params):
    class Three(Echo):
        def step(self, state, text):
            return state, text, 0.0

    class Empty(Echo):
        def reset(self, task):
            return task, ""

    class Broken(Echo):
        def reset(self, task):
            raise KeyError("no task")

    with pytest.raises(ValueError, match="env.step must return"):
        play(params, Three())
    with pytest.raises(ValueError, match="without tokens"):
        play(params, Empty())
    with pytest.raises(RuntimeError, match="env.reset failed for task 0 after 1 attempts: KeyError"):
        play(params, Broken())
    with pytest.raises(ValueError, match="leave no room"):
        play(params, Echo(), max_length=5)
    with pytest.raises(ValueError, match="timeout must be positive"):
        play(params, Echo(), call_limits=CallLimits(timeout=0))
    with pytest.raises(ValueError, match="steps must be at least 1"):
        play(params, Echo(), steps=0)
    with pytest.raises(ValueError, match="max_seconds must be positive or None, got 0"):
        play(params, Echo(), max_seconds=0)
    with pytest.raises(ValueError, match="max_calls must be at least 1 or None, got 0"):
        play(params, Echo(), max_calls=0)
