"""A policy that many threads talk to, and the same policy as a tool."""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl_llm.envs import CHAT, ToolEnv
from jaxrl_llm.models import DecoderConfig, load_tokenizer, make_decoder, render_chat
from jaxrl_llm.sampling import PolicyServer, host_rollout, rollout_spans, score_rollout
from jaxrl_llm.tools import call_tool, policy_tool
from jaxrl_llm.types import Decoding

TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "models/golden/tokenizers/chatml")
MODEL = make_decoder(
    DecoderConfig(TOKENIZER.vocab_size, width=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=16)
)
OPTIONS = dict(tokenizer=TOKENIZER, max_length=128, max_turn_tokens=12, session_options={"num_slots": 4})


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def serve(params, **options):
    return PolicyServer(MODEL, params, jax.random.key(1), **{**OPTIONS, **options})


def ask(text):
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]


def test_many_threads_get_what_one_would(params):
    questions = [f"What is {i % 7} times 7?" for i in range(14)]
    with serve(params) as server:
        alone = [server.chat(ask(question)) for question in questions]
        with ThreadPoolExecutor(14) as pool:
            again = list(pool.map(server.chat, map(ask, questions)))
    with serve(params) as server, ThreadPoolExecutor(14) as pool:
        crowd = list(pool.map(server.chat, map(ask, questions)))
    assert sorted(alone) == sorted(crowd)  # two of one question may swap their replies
    assert len(set(alone)) == 14 and not set(alone) & set(again)  # each is drawn anew
    assert not any("<|im_end|>" in text for text in alone)


def test_requests_are_decoded_side_by_side(params):
    """13 requests that come while the first is decoded take a few looks together."""
    looks, first, rest = [], threading.Event(), 13

    def counted():
        looks.append(len(looks) + 1)
        first.set()
        while len(looks) == 1 and len(server._requests) < rest:
            time.sleep(0.001)
        return params, len(looks)

    with serve(counted, session_options={"num_slots": 16}) as server, ThreadPoolExecutor(14) as pool:
        asked = [pool.submit(server.chat, ask("0"))]
        first.wait()
        asked += [pool.submit(server.chat, ask(str(i))) for i in range(1, 14)]
        assert len({future.result() for future in asked}) == 14
    assert len(looks) <= 1 + 12  # a look that ends early has ended an eighth of the rows; most take 8 steps of 12
    rollout = server.take_rollout(lambda reply: 0.0)
    assert set(np.asarray(rollout.versions)[np.asarray(rollout.mask)].tolist()) == set(looks)


def test_replies_can_be_trained_on(params):
    with serve(params) as server:
        texts = [server.chat(ask(text)) for text in ("one", "two", "three")]
        rollout = server.take_rollout(lambda reply: float("nan") if reply.text == texts[2] else len(reply.text))
        with pytest.raises(ValueError, match="no reply was recorded"):
            server.take_rollout(len)
    assert rollout.rewards.tolist() == [len(texts[0]), len(texts[1]), 0]
    assert rollout.scorable.tolist() == [True, True, False] and rollout.turn_mask.tolist() == [[True]] * 3
    for row, text in enumerate(("one", "two", "three")):
        prompt = TOKENIZER.encode(render_chat(TOKENIZER, ask(text), add_generation_prompt=True))
        start, end = int(rollout.prompt_lengths[row]), int(rollout.lengths[row])
        assert rollout.tokens[row, :start].tolist() == prompt
        assert np.flatnonzero(rollout.mask[row]).tolist() == list(range(start, end))
        stopped = int(rollout.tokens[row, end - 1]) in TOKENIZER.eos_ids
        assert TOKENIZER.decode(rollout.tokens[row, start : end - stopped]) == texts[row]
        assert bool(rollout.truncated[row]) == (not stopped)
    logprobs, _ = jax.jit(partial(score_rollout, MODEL, decoding=Decoding()))(params, rollout)
    np.testing.assert_allclose(logprobs, rollout.logprobs, atol=1e-4)  # float32, step by step and all at once


def test_a_policy_as_a_tool(params):
    with serve(params, record=False) as server:
        expert = policy_tool("expert", "Knows much.", server.chat, system="Be brief.")
        with serve(params) as same:
            assert call_tool([expert], "expert", {"request": "one"}) == (same.chat(ask("one")), None)
        assert expert.parameters["required"] == ["request"]
        assert call_tool([expert], "expert", {"query": "one"}).error == "bad_arguments"
        too_long = call_tool([expert], "expert", {"request": "one " * 200})
        assert too_long.error == "failed" and "a prompt of" in too_long.text
    closed = call_tool([expert], "expert", {"request": "one"})
    assert closed.error == "failed" and "the policy server is not open" in closed.text


def test_a_policy_as_the_user_of_another(params):
    """Two policies decode at a time, each in its session; both have rollouts to be trained on."""
    with serve(params) as server:

        def user(trajectory):
            heard = [{"role": "user", "content": turn.answer or "."} for turn in trajectory.turns[-1:]]
            return server.chat(heard) if len(trajectory.turns) < 3 else None

        env = ToolEnv(protocol=CHAT, tokenizer=TOKENIZER, user=user, reward=lambda trajectory: len(trajectory.turns))
        rollout, episodes = host_rollout(
            MODEL, params, env, list("abcdef"), jax.random.key(2), tokenizer=TOKENIZER, max_length=256, max_turns=4,
            max_turn_tokens=8, stop_sequences=env.stop_sequences, num_slots=4, render_error=env.render_error,
        )  # fmt: skip
        replies = server.take_rollout(lambda reply: 0.0)
    assert rollout.rewards.tolist() == [3] * 6 and not any(episode.errors for episode in episodes)
    assert len(replies.rewards) == 12
    said = {TOKENIZER.decode(replies.tokens[row][replies.mask[row]]).removesuffix("<|im_end|>") for row in range(12)}
    for row in range(6):
        spans = rollout_spans(rollout, row, TOKENIZER)
        assert [span.role for span in spans] == ["prompt", *["policy", "observation"] * 2, "policy"]
        heard = [span.text.split("user\n")[1].split("<|im_end|>")[0] for span in spans if span.role == "observation"]
        assert all(any(text.strip() in reply for reply in said) for text in heard)


def test_bad_input(params):
    bare = dataclasses.replace(TOKENIZER, chat_template=None)
    with pytest.raises(ValueError, match="carries no tokenizer"):
        serve(params, tokenizer=None)
    with pytest.raises(ValueError, match="has no chat template; give render="):
        serve(params, tokenizer=bare)
    with pytest.raises(RuntimeError, match="not open"):
        serve(params).chat(ask("one"))
    with serve(params, tokenizer=bare, render=lambda messages: messages[-1]["content"]) as server:
        server.chat(ask("one"))
        (row,) = server.take_rollout(lambda reply: 0.0).tokens
        assert row[: len(TOKENIZER.encode("one"))].tolist() == TOKENIZER.encode("one")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_error_of_the_policy_reaches_whoever_waits(params):
    broken = jax.tree.map(lambda x: x * np.nan, params)
    with serve(broken) as server:
        with pytest.raises(RuntimeError, match="the policy server ended: logits"):
            server.chat(ask("one"))
        with pytest.raises(RuntimeError, match="not open"):
            server.chat(ask("one"))


def test_closing_ends_what_is_under_way(params):
    started = threading.Event()

    def slow():
        started.set()
        return params, 0

    with ThreadPoolExecutor(1) as pool:
        with serve(slow, max_length=4096, max_turn_tokens=4000, stop_sequences=[], steps=1) as server:
            future = pool.submit(server.chat, ask("one"))
            started.wait(10)
        with pytest.raises(RuntimeError, match="was closed"):
            future.result(10)
