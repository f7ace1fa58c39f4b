import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data import geography_tokenizer, make_questions
from jaxrl_llm.data.worlds.geography import CORRECTION, geography_index, geography_passages
from jaxrl_llm.envs import encode_tasks, make_geography_env, make_geography_host_env

WIDTH = 40  # tokens of a turn
EPISODES = 510
TOKENIZER = geography_tokenizer()
DEFAULT = make_geography_env(TOKENIZER)
TAGS = ("<search>", "</search>", "<answer>", "</answer>", "<think>", "</think>", "<information>", "<eos>")
single_step = jax.jit(lambda env, state, tokens, length: env.step(state, tokens, length))
step = jax.jit(lambda env, state, tokens, lengths: jax.vmap(env.step)(state, tokens, lengths))


def questions_of(num):
    return [q for hops in (1, 2, 3) for q in make_questions("train", hops, num // 3 + 1)][:num]


def padded(rows):
    """Turns as an array, with other tokens behind their ends, which must not matter."""
    out = np.full((len(rows), WIDTH), TOKENIZER.special_ids["</answer>"], np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return jnp.array(out), jnp.array([len(row) for row in rows], jnp.int32)


def scripted_turn(rng, question, turn):
    """Tokens of a turn: what an oracle would write, something like it, or broken tags of all kinds."""
    titles, _ = geography_passages()
    right = question.path[turn] if turn < len(question.path) else question.answers[0]
    oracle = f"<search> {right}</search>" if turn < len(question.path) else f"<answer> {right}</answer>"
    other = titles[rng.integers(len(titles))]
    gold = question.answers[0]
    texts = [
        f"<think> {other}</think>{oracle}",
        f"<search>{right} {other}</search>",
        f"<search> {other}</search>",
        f"<search> the {right.upper()}!</search>",
        f"<search> {question.question}</search>",
        "<search></search>",
        "<search> qqq</search>",
        f"<answer> The {gold.upper()}.</answer>",
        f"<answer> {other}</answer>",
        "<answer></answer>",
        f"<search> {right}",
        f"{right}</search>",
        f"</search> {right}<search>",
        f"<answer> {gold}",
        right,
        "",
        f"<search> {other}<search> {right}</search></search>",
        f"<search> {other}<answer> {gold}</answer>",
        f"<search><answer> {gold}</answer></search>",
        f"<answer> {other}</answer>{oracle}",
        f"<search> {right}</search><search> {other}</search>",
        f"{oracle} and more",
        f"<answer> {other}<eos>",
        f"<information> {gold}</information>",
        f"<answer> {gold}<answer></answer>",
        f"<search> {' '.join(titles[i] for i in rng.integers(len(titles), size=5))}</search>",
    ]
    kind = rng.random()
    if kind < 0.5:
        return TOKENIZER.encode(oracle)[:WIDTH]
    if kind < 0.9:
        return TOKENIZER.encode(texts[rng.integers(len(texts))])[:WIDTH]
    tags = [TOKENIZER.special_ids[tag] for tag in TAGS]
    words = TOKENIZER.encode(f"{right} {other} {gold} the") + rng.integers(266, TOKENIZER.vocab_size, 4).tolist()
    return [int(rng.choice(tags if rng.random() < 0.4 else words)) for _ in range(rng.integers(1, 14))]


@pytest.mark.parametrize(
    ("max_searches", "search_enabled", "num_passages"), [(3, True, 1), (1, True, 3), (2, False, 1)]
)
def test_device_and_host_environments_agree(max_searches, search_enabled, num_passages):
    options = {"max_searches": max_searches, "search_enabled": search_enabled, "num_passages": num_passages}
    env, host = make_geography_env(TOKENIZER, **options), make_geography_host_env(**options)
    rng, questions = np.random.default_rng(max_searches), questions_of(EPISODES)
    tasks = encode_tasks(questions, TOKENIZER)
    state, prompts, lengths = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), EPISODES), tasks)
    host_states, running, right = [], [True] * EPISODES, 0
    for i, question in enumerate(questions):
        host_state, prompt = host.reset(question)
        host_states.append(host_state)
        assert prompts[i, : lengths[i]].tolist() == TOKENIZER.encode(prompt)
    compared = 0
    for turn in range(max_searches + 1):
        rows = [scripted_turn(rng, question, turn) for question in questions]
        state, observations, lengths, rewards, done = jax.tree.map(np.asarray, step(env, state, *padded(rows)))
        assert observations.shape == (EPISODES, env.max_observation) and rewards.dtype == np.float32
        for i in (i for i in range(EPISODES) if running[i]):
            host_states[i], observation, reward, over = host.step(host_states[i], TOKENIZER.decode(rows[i]))
            assert observations[i, : lengths[i]].tolist() == TOKENIZER.encode(observation), TOKENIZER.decode(rows[i])
            assert (rewards[i], done[i]) == (reward, over), TOKENIZER.decode(rows[i])
            running[i] = not over
            compared += 1
            right += reward
    assert not any(running)  # every episode ends
    assert right > 0.05 * EPISODES and compared > 1.5 * EPISODES


def play(env, question, turns):
    question = question._replace(answers=(*question.answers, question.answers[0])[:2])  # one shape for all
    state, _, _ = env.reset(jax.random.key(0), jax.tree.map(lambda x: x[0], encode_tasks([question], TOKENIZER)))
    out = []
    for text in turns:
        tokens, lengths = padded([TOKENIZER.encode(text)])
        state, observation, length, reward, done = single_step(env, state, tokens[0], lengths[0])
        out.append((TOKENIZER.decode(observation[:length]), float(reward), bool(done)))
    return out


def test_an_episode():
    question = next(
        q
        for q in make_questions("train", 2, None)
        if q.question == "What is the currency of the country that Nairobi lies in?"
    )
    nairobi = "<information> Nairobi is a city in Kenya, time zone Africa/Nairobi.</information>"
    kenya = (
        "<information> Kenya is a country. Capital Nairobi, continent Africa, currency Shilling, domain .ke, "
        "language en.</information>"
    )
    env = dataclasses.replace(DEFAULT, max_searches=2)
    turns = ["<search> Nairobi</search>", "<search> Kenya</search>", "<answer> Shilling</answer>"]
    assert play(env, question, turns) == [(nairobi, 0.0, False), (kenya, 0.0, False), ("", 1.0, True)]
    assert play(env, question, ["I do not know", "<search> Kenya", "<search> Kenya</search>"]) == [
        (CORRECTION, 0.0, False),
        (CORRECTION, 0.0, False),
        ("", 0.0, True),
    ]
    assert play(env, question, ["<answer> Dollar</answer>"]) == [("", 0.0, True)]
    blind = dataclasses.replace(DEFAULT, max_searches=1, search_enabled=False)
    assert play(blind, question, ["<search> Nairobi</search>", "<answer> Shilling</answer>"]) == [
        ("<information></information>", 0.0, False),
        ("", 1.0, True),
    ]


def test_the_oracle_always_succeeds():
    questions = [q for split in ("train", "test") for hops in (1, 2, 3) for q in make_questions(split, hops, 85)]
    env = DEFAULT
    tasks = encode_tasks(questions, TOKENIZER)
    state, _, _ = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), len(questions)), tasks)
    total, ended = np.zeros(len(questions)), np.zeros(len(questions), bool)
    for turn in range(4):
        texts = [
            f"<search> {q.path[turn]}</search>" if turn < q.hops else f"<answer> {q.answers[0]}</answer>"
            for q in questions
        ]
        rows = TOKENIZER.encode_batch(texts)
        state, _, _, rewards, done = step(env, state, *padded(rows))
        total += np.where(ended, 0, rewards)
        ended |= np.asarray(done)
    assert (total == 1).all()


def test_several_golds():
    question = make_questions("train", 1, 1)[0]._replace(answers=("Shilling", "the KES"))
    env = DEFAULT
    tasks = encode_tasks([question, question._replace(answers=("Euro",))], TOKENIZER)
    assert tasks.answer_mask.tolist() == [[True, True], [True, False]]
    for answer, reward in [("shilling", 1.0), ("KES", 1.0), ("Euro", 0.0), ("", 0.0)]:
        assert play(env, question, [f"<answer> {answer}</answer>"]) == [("", reward, True)]
    # The second question's missing gold must not be matched by an empty answer, whose hash is that of the padding.
    state, _, _ = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 2), tasks)
    _, _, _, rewards, done = step(env, state, *padded([TOKENIZER.encode("<answer></answer>")] * 2))
    assert rewards.tolist() == [0, 0] and done.all()


def test_arrays_are_arguments_of_a_compiled_step():
    env = DEFAULT
    task = jax.tree.map(lambda x: x[0], encode_tasks(questions_of(3), TOKENIZER))
    state, _, _ = env.reset(jax.random.key(0), task)
    jaxpr = jax.make_jaxpr(lambda env, state, tokens, n: env.step(state, tokens, n))(
        env, state, jnp.zeros(WIDTH, jnp.int32), jnp.int32(3)
    )
    assert sum(np.size(const) for const in jaxpr.consts) < 1000
    assert sum(leaf.size for leaf in jax.tree.leaves(env)) > 100_000


def test_bad_input():
    with pytest.raises(ValueError, match="max_searches must be at least 0"):
        make_geography_env(TOKENIZER, max_searches=-1)
    with pytest.raises(ValueError, match="num_passages must be at least 1"):
        make_geography_host_env(num_passages=0)
    question = make_questions("train", 1, 1)[0]
    with pytest.raises(ValueError, match="questions is empty"):
        encode_tasks([], TOKENIZER)
    with pytest.raises(ValueError, match="has no answer"):
        encode_tasks([question._replace(answers=())], TOKENIZER)
    with pytest.raises(ValueError, match="max_prompt is 2"):
        encode_tasks([question], TOKENIZER, max_prompt=2)
    with pytest.raises(ValueError, match="min_prompt is 60, .* has [0-9]+ tokens"):
        encode_tasks([question], TOKENIZER, min_prompt=60)
    assert len(geography_index().passages) == 6325
