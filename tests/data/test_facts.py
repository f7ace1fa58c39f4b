"""The world of facts known by heart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.worlds.facts import (
    ANSWER,
    ASK,
    ASK_DIRECTLY,
    EOS,
    FIRST_RELATION,
    INFORMATION,
    SEARCH,
    THINK,
    FactsEnv,
    demonstrate_searches,
    first_entity,
    known_facts,
    make_fact_questions,
    make_facts,
    read_blocks,
)

FACTS = make_facts(10, 2)
BASE = first_entity(2)


def padded(tokens, width=40):
    return jnp.array([*tokens, *[0] * (width - len(tokens))]), jnp.int32(len(tokens))


def block(tags, *content):
    return [tags[0], *content, tags[1]]


def test_questions_of_both_sets_differ_and_have_the_fact_of_the_fact():
    train, test = make_fact_questions(FACTS, train=25, test=15)
    asked = np.concatenate([train["prompt_tokens"], test["prompt_tokens"]])
    assert len({tuple(prompt) for prompt in asked}) == 40 and (asked[:, 3] == ASK).all()
    entity, first, second = asked[:, 0] - BASE, asked[:, 1] - FIRST_RELATION, asked[:, 2] - FIRST_RELATION
    answers = np.concatenate([train["answer"], test["answer"]])
    np.testing.assert_array_equal(answers - BASE, FACTS[FACTS[entity, first], second])
    assert (make_fact_questions(FACTS, train=1, test=1, direct=True)[0]["prompt_tokens"][:, 3] == ASK_DIRECTLY).all()
    with pytest.raises(ValueError, match="train=30 and test=11 .* at most 40"):
        make_fact_questions(FACTS, train=30, test=11)


def test_demonstrations():
    train, _ = make_fact_questions(FACTS, train=25, test=15)
    answers = {
        tuple(prompt[:3]): answer for prompt, answer in zip(train["prompt_tokens"], train["answer"], strict=True)
    }
    read = jax.jit(read_blocks)
    for direct, kinds in ((0.0, [0, 1, 2, 0, 1, 2, 0, 3]), (1.0, [0, 3])):
        shown = demonstrate_searches(np.random.default_rng(0), FACTS, train, 20, direct=direct)
        for tokens, mask, length in zip(*shown.values(), strict=True):
            response = tokens[mask]
            assert (tokens[3] == ASK_DIRECTLY) == (direct == 1) and length == 4 + len(response)
            assert response[-3] == answers[tuple(tokens[:3])]
            types, count = read(*padded(response))
            assert types[:count].tolist() == kinds
    shown = demonstrate_searches(np.random.default_rng(0), FACTS, train, 200, known=0.5, wrong=0.2, skip=0.3)
    right = [
        tokens[length - 3] == answers[tuple(tokens[:3])]
        for tokens, length in zip(shown["tokens"], shown["lengths"], strict=True)
    ]
    assert 0.1 < np.mean(right) < 0.6 and len(set(shown["lengths"])) > 2
    told, true = known_facts(jnp.asarray(FACTS), jnp.asarray(shown["tokens"]), jnp.asarray(shown["mask"]))
    # of 20 facts some half are known, the others are right by chance; each of the errors is a search for another fact
    assert told.sum() > 50 and 0.3 < true.sum() / told.sum() < 0.8


def test_blocks_that_are_not_closed_nest_or_are_empty():
    read = jax.jit(read_blocks)
    good = [*block(THINK, BASE), *block(ANSWER, BASE)]
    for broken in (
        good,  # no end
        [*good, EOS, EOS],
        [*good[:-1], EOS],
        [BASE, *good, EOS],
        [*block(THINK, *block(SEARCH, BASE)), *good, EOS],
        [*block(THINK), *good, EOS],
        [*good[:3], BASE, *good[3:], EOS],
        [THINK[0], BASE, ANSWER[1], *good, EOS],
        [],
    ):
        assert read(*padded(broken))[1] == 0
    types, count = read(*padded([*good, EOS, ANSWER[0]])[:1], jnp.int32(7))
    assert types[:count].tolist() == [0, 3]  # what lies behind the length is not read


def test_searches_are_real_where_the_task_says_so():
    env, step = FactsEnv(jnp.asarray(FACTS)), jax.jit(FactsEnv.step)
    train, _ = make_fact_questions(FACTS, train=1, test=1)
    task = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), train) | {"real": jnp.array([True, False, True])}
    state, prompt, length = env.reset(jax.random.key(0), task)
    assert prompt.shape == (4,) and length == 4
    query = [*block(THINK, BASE), *block(SEARCH, BASE + 3, FIRST_RELATION + 1)]
    state, seen, size, reward, done = step(env, state, *padded(query))
    assert seen[:size].tolist() == block(INFORMATION, BASE + FACTS[3, 1]) and reward == 0 and not done
    state, _, size, _, done = step(env, state, *padded(query))
    assert size == 0 and not done  # the policy goes on by itself
    state, seen, size, _, done = step(env, state, *padded(block(SEARCH, FIRST_RELATION, BASE)))
    assert seen[:size].tolist() == list(INFORMATION) and not done
    answer = [*block(ANSWER, task["answer"]), EOS]
    assert [x.item() for x in step(env, state, *padded(answer))[3:]] == [1, True]
    wrong = [*block(ANSWER, BASE + (task["answer"] - BASE + 1) % 10), EOS]
    for end in (wrong, answer[:-1], answer[1:], [BASE], [EOS]):
        assert [x.item() for x in step(env, state, *padded(end))[3:]] == [0, True]
