"""Rows directed from the host: the same tokens whatever shares the device, forks that share pages, and bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.models import LoraConfig, apply_lora, apply_prefix
from jaxrl_llm.ops import importance_weights
from jaxrl_llm.sampling import Session, constrain, rows_to_rollout, score_rollout, token_trie
from jaxrl_llm.sampling import session as session_module
from jaxrl_llm.types import Decoding
from tests.sampling.worlds import MODEL, VOCAB

PROMPTS = [list(range(5, 5 + length)) for length in (3, 20, 9, 4)]
OPTIONS = dict(max_length=48, max_turn_tokens=6, stop_sequences=((3,),), num_slots=4, page_size=4)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def score(model, params, rollout):
    return score_rollout(model, params, rollout, decoding=Decoding())[0]


@pytest.fixture(scope="module")
def full_logprobs(params):
    logits = jax.jit(lambda tokens: MODEL.logits(params, tokens[None])[0])

    def of(row):
        table = jax.nn.log_softmax(logits(jnp.asarray(row.tokens)))
        shifted = jnp.take_along_axis(table[:-1], row.tokens[1:, None], axis=1)[:, 0]
        return np.where(row.mask, np.pad(shifted, (1, 0)), 0)

    return of


def end_turn(session, params, row):
    while row.status == "ready":
        session.advance(params)


def to_end(session, params, turns=3):
    """Plays until no row is ready: observations are made from the turn, of 0 to 19 tokens."""
    while not session.idle:
        for row in session.advance(params):
            observation = [7] * (int(row.turn_tokens[0]) % 20)
            if len(row.turn_starts) == turns or len(observation) >= session.room(row):
                session.finish(row, 1.0)
            else:
                session.observe(row, observation, 0.5)


@pytest.mark.parametrize("options", [{}, {"num_slots": 2, "page_size": 8}, {"num_pages": 14}])
def test_tokens_depend_on_nothing_else(params, full_logprobs, options):
    """Neither on slots nor on pages, also where there are so few that rows are computed again and again; and recorded
    log-probs are those of a full pass (1e-4: float32 sums in another order)."""
    session = Session(MODEL, jax.random.key(1), **OPTIONS | options)
    rows = [session.add(prompt) for prompt in PROMPTS]
    to_end(session, params)
    alone = Session(MODEL, jax.random.key(1), **OPTIONS)
    for number, row in enumerate(rows):
        np.testing.assert_allclose(row.logprobs, full_logprobs(row), atol=1e-4)
        assert row.mask.sum() == sum(np.subtract(row.turn_ends, row.turn_starts))
        same = alone.add(PROMPTS[number], number=number)
        to_end(alone, params)
        np.testing.assert_array_equal(row.tokens, same.tokens)
    assert session.pool.in_use <= len(session.pool.holders)


def test_forks_go_on_where_they_left(params):
    """Inside the prompt, inside a turn, behind a turn, inside an observation."""
    session = Session(MODEL, jax.random.key(1), **OPTIONS)
    row = session.add(PROMPTS[2])
    end_turn(session, params, row)
    end = row.known
    session.observe(row, [7, 8, 9], 0.25)
    cases = {
        5: ("ready", 5, [5], []),
        10: ("ready", 9, [9], []),
        end: ("waiting", 9, [9], [end]),
        end + 2: ("ready", 9, [9, end + 2], [end]),
        end + 3: ("ready", 9, [9, end + 3], [end]),
    }
    for position, (status, prompt_length, starts, ends) in cases.items():
        (child,) = session.fork(row, position)
        assert (child.status, child.prompt_length) == (status, prompt_length), position
        assert (child.turn_starts, child.turn_ends, child.known) == (starts, ends, position)
        assert child.turn_rewards == ([0.25] if position > end else [])
        np.testing.assert_array_equal(child.tokens[:position], row.tokens[:position])
        assert not child.tokens[position:].any() and (child.parent, child.fork_position) == (row, position)


@settings(max_examples=8)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40), st.integers(1, 3)), min_size=1, max_size=4))
def test_any_tree_has_the_logprobs_of_unshared_rows(params, full_logprobs, forks):
    session = Session(MODEL, jax.random.key(2), **OPTIONS)
    rows = [session.add(PROMPTS[1])]
    for which, position, count in forks:
        session.advance(params)  # forks of live rows, waiting ones and finished ones
        parent = rows[which % len(rows)]
        rows += session.fork(parent, min(position, parent.known), count)
        for row in rows:
            if row.status == "waiting":
                session.finish(row, 0.0) if len(row.turn_starts) > 1 else session.observe(row, [4] * 5)
    while not session.idle:
        for row in session.advance(params):
            session.finish(row, 0.0)
    for row in rows:
        np.testing.assert_allclose(row.logprobs, full_logprobs(row), atol=1e-4)
    rollout = rows_to_rollout(rows, decoding=Decoding(), group_ids=[0] * len(rows))
    for child, (parent, position) in enumerate(zip(rollout.parent, rollout.fork_position, strict=True)):
        np.testing.assert_array_equal(rollout.tokens[child, :position], rollout.tokens[max(parent, 0), :position])
    for row in rows:
        session.release(row)
    assert session.pool.in_use == 0


def test_a_tree_uses_few_pages(params):
    """64 leaves over a trunk of 512 tokens: what is shared is held once."""
    session = Session(MODEL, jax.random.key(3), max_length=528, max_turn_tokens=16, num_slots=64, page_size=16)
    trunk = session.add(np.arange(512) % VOCAB)
    session.prefill(params, [trunk])
    session.finish(trunk)
    leaves = session.fork(trunk, 512, 64)
    while not session.idle:
        for leaf in session.advance(params):
            session.finish(leaf, 0.0)
    assert all(leaf.known == 528 for leaf in leaves)
    assert session.pool.in_use <= 1.2 * (512 / 16 + 64 * 16 / 16)


def test_a_group_computes_its_prompt_once(params, monkeypatch):
    computed = []
    original = session_module.compute_lanes
    monkeypatch.setattr(
        session_module,
        "compute_lanes",
        lambda *args, **kwargs: computed.append(args[4].sum()) or original(*args, **kwargs),
    )
    session = Session(MODEL, jax.random.key(3), **OPTIONS | {"num_slots": 16})
    first = session.add(PROMPTS[1])
    session.prefill(params, [first])
    for _ in range(15):
        session.add(PROMPTS[1], share=first)
    to_end(session, params, turns=1)
    assert computed == [len(PROMPTS[1])]


def test_weights_in_flight(params):
    """Each token has the version it was drawn under, and its log-prob is that of those weights."""
    other = jax.jit(MODEL.init)(jax.random.key(9))
    session = Session(MODEL, jax.random.key(4), **OPTIONS | {"max_turn_tokens": 12, "stop_sequences": ()})
    row = session.add(PROMPTS[0])
    session.advance(params, version=7, steps=7)  # two for the prompt
    session.release(row)  # computed again under the weights of the next call, as a full pass has it
    session.advance(other, version=8, steps=20)
    assert row.versions[row.mask].tolist() == [7] * 5 + [8] * 7 and np.all(row.versions[~row.mask] == -1)
    rollout = rows_to_rollout([row], decoding=Decoding(), group_ids=[0])
    for version, weights in ((7, params), (8, other)):
        scored = score(MODEL, weights, rollout)
        drawn = row.versions == version
        np.testing.assert_allclose(scored[0][drawn], row.logprobs[drawn], atol=1e-4)
    # what corrects for it under the newest weights: 1 where they drew the token, else the ratio, at most the cap
    corrected = importance_weights(scored, rollout.logprobs, rollout.mask, cap=2.0)[0]
    np.testing.assert_allclose(corrected[row.versions == 8], 1, atol=2e-4)
    older = row.versions == 7
    np.testing.assert_allclose(
        corrected[older], np.minimum(np.exp(scored[0][older] - row.logprobs[older]), 2), rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_adapters(params, kind):
    model = apply_lora(MODEL, LoraConfig(rank=2, targets=("query",))) if kind == "lora" else apply_prefix(MODEL, 3)
    adapted = jax.tree.map(lambda x: x + 0.3, jax.jit(model.init)(jax.random.key(5))[kind])
    tuned = {"base": params, kind: adapted}
    session = Session(model, jax.random.key(6), **OPTIONS)
    rows = [session.add(prompt) for prompt in PROMPTS]
    rows += session.fork(rows[0], 2, 2)
    to_end(session, tuned)
    rollout = rows_to_rollout(rows, decoding=Decoding(), group_ids=range(6))
    np.testing.assert_allclose(score(model, tuned, rollout), rollout.logprobs, atol=1e-4)


def test_constraints(params):
    """Each group writes one of its own sequences, also where a row was forked inside one; scored as it was sampled."""
    choices = [[(5, 6, 7), (5, 8, 9), (10, 11, 12)], [(20, 21, 22), (20, 21, 23), (24, 25, 26)]]
    tries = [token_trie(sequences, end=[3]) for sequences in choices]
    constraint = constrain(*tries, vocab_size=VOCAB, choices=[0, 1])
    session = Session(MODEL, jax.random.key(7), constraint=constraint, **OPTIONS)
    rows = [session.add(PROMPTS[0], group=group) for group in (0, 1, 1)]
    session.advance(params, steps=4)  # two steps for the prompt, two tokens of the turn
    groups = [0, 1, 1] + [group for group in (0, 1, 1) for _ in range(3)]
    for parent in rows[:3]:
        rows += session.fork(parent, parent.known, 3)
    while not session.idle:
        for row in session.advance(params):
            session.observe(row, [4, 4]) if len(row.turn_starts) == 1 else session.finish(row, 1.0)
    for row, group in zip(rows, groups, strict=True):
        for start, end in zip(row.turn_starts, row.turn_ends, strict=True):
            assert tuple(row.tokens[start:end][:-1].tolist()) in choices[group] and row.tokens[end - 1] == 3
    rollout = rows_to_rollout(rows, decoding=Decoding(), group_ids=groups, constrained=True)
    rescore = jax.jit(functools.partial(score_rollout, MODEL, decoding=Decoding()))
    scored, _ = rescore(params, rollout, constraint=constraint)
    np.testing.assert_allclose(scored, rollout.logprobs, atol=1e-4)
    free = score(MODEL, params, dataclasses.replace(rollout, free_logprobs=None))
    np.testing.assert_allclose(free, rollout.free_logprobs, atol=1e-4)


def test_bad_input(params):
    session = Session(MODEL, jax.random.key(0), **OPTIONS)
    with pytest.raises(ValueError, match="a prompt of 48 tokens"):
        session.add([1] * 48)
    row = session.add([1, 2, 3])
    with pytest.raises(ValueError, match="the row is ready"):
        session.observe(row, [4])
    with pytest.raises(ValueError, match="position=4: expected 1 to 3"):
        session.fork(row, 4)
    end_turn(session, params, row)
    with pytest.raises(ValueError, match="an observation of 45 tokens"):
        session.observe(row, [4] * 45)
    session.observe(row, [4])
    with pytest.raises(FloatingPointError, match=r"are not finite.*version 3"):
        session.advance(jax.tree.map(lambda x: x * jnp.nan, params), version=3)
    with pytest.raises(ValueError, match="num_pages=3 of 4 places"):
        Session(MODEL, jax.random.key(0), **OPTIONS | {"num_pages": 3})
    with pytest.raises(ValueError, match="num_slots must be at least 1"):
        Session(MODEL, jax.random.key(0), **OPTIONS | {"num_slots": 0})
