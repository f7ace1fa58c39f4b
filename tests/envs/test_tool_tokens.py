"""Trap 1: the ids that a loss sees are the ids that were sampled and the ids that were forced, byte for byte."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.envs import CHAT, SEARCH_R1, ToolEnv, Trajectory
from jaxrl_llm.models import DecoderConfig, make_decoder
from jaxrl_llm.models.tokenizer import wrap_tokenizer
from jaxrl_llm.sampling import CallLimits, host_rollout, score_rollout
from jaxrl_llm.tools import tool
from jaxrl_llm.types import Decoding

WORDS = ("<search>", "</search>\n", "<answer>", "</answer>\n", "User:", "\nUser:", "ab", " a", " ab", "\n\n", "é ")
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def byte_tokenizer():
    """All bytes, and each word and its beginnings as merged tokens, so that tokens end in the middle of characters and
    behind the tag that ends a turn."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = {piece: i for i, piece in enumerate(alphabet)}, []
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for word in WORDS:
        ((piece, _),) = level.pre_tokenize_str(word)
        for end in range(2, len(piece) + 1):
            if piece[:end] not in vocabulary:
                vocabulary[piece[:end]] = len(vocabulary)
                merges.append((piece[: end - 1], piece[end - 1]))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    backend.pre_tokenizer, backend.decoder = level, tokenizers.decoders.ByteLevel()
    return dataclasses.replace(wrap_tokenizer(backend, {"eos_token": "<|end|>"}), chat_template=TEMPLATE)


TOKENIZER = byte_tokenizer()
LIKELY = ["<search>", "</search>", "</search>Ċ", "<answer>", "</answer>Ċ", "<|end|>", "ab", "Ġa", "Ċ", "ĊĊ", "Ã", "©"]
MODEL = make_decoder(
    DecoderConfig(TOKENIZER.vocab_size, width=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=16,
                  tie_embeddings=False)
)  # fmt: skip
CALLS = CallLimits(timeout=30.0, retries=0)


@cache
def likely_params():
    """A random policy to which some tokens are more likely: one feature is alike behind every token, and the rows of
    the likely tokens answer to it."""
    params = jax.jit(MODEL.init)(jax.random.key(0))
    rows = jnp.array([TOKENIZER.pieces.index(piece) for piece in LIKELY])
    embedding = params["embedding"].at[:, 0].set(10.0)
    return params | {"embedding": embedding, "head": params["head"].at[:, 0].set(0.0).at[rows, 0].set(1.5)}


class Spy:
    """The tokenizer as the sampler sees it, with all that passes through."""

    def __init__(self):
        self.encoded, self.decoded = [], []

    def encode(self, text):
        self.encoded.append(text)
        return TOKENIZER.encode(text)

    def encode_batch(self, texts):
        self.encoded += texts
        return TOKENIZER.encode_batch(texts)

    def decode(self, ids):
        self.decoded.append(tuple(map(int, ids)))
        return TOKENIZER.decode(ids)


@dataclasses.dataclass
class Recorder:
    """An environment that keeps the latest trajectory of every task."""

    env: ToolEnv
    last: dict[str, Trajectory] = dataclasses.field(default_factory=dict)

    async def reset(self, task):
        self.last[task], prompt = await self.env.reset(task)
        return self.last[task], prompt

    async def step(self, state, text):
        answer = await self.env.step(state, text)
        self.last[state.task] = answer[0]
        return answer


def play(env, seed):
    spy, recorder = Spy(), Recorder(env)
    rollout, _ = host_rollout(
        MODEL, likely_params(), recorder, [f"task {i} é" for i in range(6)], jax.random.key(seed), tokenizer=spy,
        max_length=256, max_turns=3, max_turn_tokens=16, num_slots=4, max_observation=192, call_limits=CALLS,
        stop_sequences=env.stop_sequences,
    )  # fmt: skip
    return jax.device_get(rollout), spy, list(recorder.last.values())


def check(rollout, spy, trajectories):
    """How many turns there were, how many of them encode to other ids than were sampled, and how many calls."""
    sampled, drifted = Counter(), 0
    for row, trajectory in enumerate(trajectories):
        length = int(rollout.lengths[row])
        tokens, mask = rollout.tokens[row, :length].tolist(), rollout.mask[row, :length].tolist()
        expected, expected_mask = TOKENIZER.encode(trajectory.prompt), []
        assert int(rollout.prompt_lengths[row]) == len(expected)
        expected_mask = [False] * len(expected)
        for number, turn in enumerate(trajectory.turns):
            ids = rollout.tokens[row][rollout.turn_ids[row] == number].tolist()
            assert TOKENIZER.decode(ids) == turn.text
            sampled[tuple(ids)] += 1
            drifted += TOKENIZER.encode(turn.text) != ids
            forced = TOKENIZER.encode(turn.observation)
            expected, expected_mask = [*expected, *ids], [*expected_mask, *[True] * len(ids)]
            if number + 1 < len(trajectory.turns):
                expected, expected_mask = [*expected, *forced], [*expected_mask, *[False] * len(forced)]
        # the observation behind a last turn stands there or not, as the limits say
        assert (tokens, mask) in (
            (expected, expected_mask),
            ([*expected, *forced], [*expected_mask, *[False] * len(forced)]),
        )
        assert (
            not rollout.mask[row, length:].any() and (rollout.turn_ids[row] >= 0).tolist() == rollout.mask[row].tolist()
        )
    assert sampled == Counter(spy.decoded)  # what the environment was told is what was sampled
    allowed = Counter(trajectory.prompt for trajectory in trajectories)
    allowed.update(turn.observation for trajectory in trajectories for turn in trajectory.turns)
    # and no turn of the policy was encoded; nor need the observation behind a last turn be
    assert not Counter(spy.encoded) - allowed
    return sampled.total(), drifted, sum(trajectory.num_calls for trajectory in trajectories)


ODD = st.text(st.sampled_from(list("ab é\n\t\u00a0ñ\u200b</>😀\r")) | st.characters(codec="utf-8"), max_size=20)


@given(results=st.lists(ODD, min_size=1, max_size=4), seed=st.integers(0, 10**6), protocol=st.integers(0, 2))
@settings(max_examples=8)
def test_ids_of_the_loss_are_those_sampled_and_forced(results, seed, protocol):
    @tool
    def search(query: str) -> str:
        """Says something odd, and what it was asked."""
        return results[len(query) % len(results)] + query

    async def user(trajectory):
        await asyncio.sleep(0.0)
        return results[len(trajectory.turns) % len(results)] + trajectory.turns[-1].text

    options = {"protocol": CHAT, "user": user} if protocol == 2 else {"protocol": SEARCH_R1, "tools": [search]}
    env = ToolEnv(tokenizer=TOKENIZER, reward=lambda trajectory: 0.0, chat=protocol > 0, **options)
    env = dataclasses.replace(
        env, protocol=dataclasses.replace(env.protocol, instructions=lambda tools: "Instructions.", correction="No.")
    )
    check(*play(env, seed))


def test_the_transcripts_are_odd_enough():
    """The test above would notice: many of these turns encode to other ids than were sampled, turns end in merged
    tokens, and there are calls. The log-probs of the sampler are those of the ids in the rollout."""

    @tool
    def search(query: str) -> str:
        """Says what it was asked."""
        return query

    protocol = dataclasses.replace(SEARCH_R1, instructions=lambda tools: "Instructions.", correction="No.")
    env = ToolEnv(protocol=protocol, tokenizer=TOKENIZER, tools=[search], reward=lambda trajectory: 0.0, chat=False)
    rollout, spy, trajectories = play(env, 1)
    turns, drifted, calls = check(rollout, spy, trajectories)
    merged = sum(TOKENIZER.decode(ids).endswith(">\n") for ids in spy.decoded)
    assert drifted >= 3 and calls >= 3 and merged >= 1, (turns, drifted, calls, merged)
    logprobs, _ = jax.jit(partial(score_rollout, MODEL, decoding=Decoding()))(likely_params(), rollout)
    # float32, one matrix product step by step and all at once
    np.testing.assert_allclose(logprobs, rollout.logprobs, atol=1e-4)
