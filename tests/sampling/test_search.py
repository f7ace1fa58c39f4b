"""Best of n and majorities by hand, beams against every sequence there is, search over turns against every line."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.sampling import (
    Vote,
    beam_search,
    best_of_n,
    constrain,
    first_positions,
    play_turn,
    sample_turns,
    self_consistency,
    token_trie,
    turn_search,
)
from jaxrl_llm.types import Decoding
from tests.sampling.worlds import MODEL, VOCAB, random_prompts

PROMPTS = random_prompts(2)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 3 * x, jax.jit(MODEL.init)(jax.random.key(0)))  # sharper than a fresh model


full_logits = jax.jit(MODEL.logits)


def test_best_of_n():
    nan = np.nan
    rows = best_of_n([0.5, 2.0, 2.0, nan, -1.0, nan, nan, 3.0], [4, 4, 4, 1, 1, 7, 7, 9])
    assert rows.tolist() == [4, 1, 5, 7]  # groups 1, 4, 7 and 9; the first of equals; NaN only where all are


def test_self_consistency():
    answers = ["b", "a", None, "a", "b", None, None, (1, 2), (1, 2), "x"]
    groups = [3, 3, 3, 3, 3, 5, 5, 1, 1, 1]
    assert self_consistency(answers, groups) == [Vote((1, 2), 2 / 3, 7), Vote("b", 0.4, 0), Vote(None, 0.0, 5)]


def sequences_of(seed):
    rng = np.random.default_rng(seed)
    return sorted({tuple(rng.integers(4, 14, rng.integers(1, 5)).tolist()) for _ in range(24)})


def brute_force(params, tries, end, renormalize):
    """[(log-prob, tokens)] of every sequence behind each prompt, from full passes."""
    found = []
    for prompt, (sequences, length) in enumerate(zip(tries, PROMPTS["prompt_length"].tolist(), strict=True)):
        closed = [(*sequence, *end) for sequence in sequences]
        tokens = np.zeros((64, 16), np.int32)
        tokens[:, :length] = PROMPTS["prompt_tokens"][prompt, :length]
        for line, sequence in zip(tokens, closed, strict=False):
            line[length : length + len(sequence)] = sequence
        logits = np.asarray(full_logits(params, tokens), np.float64)
        scored = []
        for row, sequence in enumerate(closed):
            total = 0.0
            for place, token in enumerate(sequence):
                allowed = {other[place] for other in closed if other[:place] == sequence[:place] and len(other) > place}
                line = logits[row, length + place - 1]
                among = line[sorted(allowed)] if renormalize else line
                total += line[token] - np.log(np.sum(np.exp(among - among.max()))) - among.max()
            scored.append((total, sequence))
        found.append(scored)
    return found


@pytest.mark.parametrize(("renormalize", "length_penalty"), [(False, 0.0), (True, 1.0)])
def test_wide_beams_find_the_best_of_all_sequences(params, renormalize, length_penalty):
    tries = [sequences_of(1), sequences_of(2)]
    constraint = constrain(*(token_trie(s, end=[3]) for s in tries), vocab_size=VOCAB, choices=[0, 1])
    beams = beam_search(
        MODEL, params, PROMPTS["prompt_tokens"], PROMPTS["prompt_length"], num_beams=24, max_tokens=6, end=[3],
        constraint=constraint, renormalize=renormalize, length_penalty=length_penalty,
    )  # fmt: skip
    for prompt, scored in enumerate(brute_force(params, tries, (3,), renormalize)):
        scored.sort(key=lambda entry: -entry[0] / len(entry[1]) ** length_penalty)
        for place, (logprob, sequence) in enumerate(scored[:24]):
            length = int(beams.lengths[prompt, place])
            assert tuple(beams.tokens[prompt, place, :length].tolist()) == sequence
            assert not beams.tokens[prompt, place, length:].any()
            # float32 sums over a cache against one full pass
            np.testing.assert_allclose(beams.logprobs[prompt, place], logprob, rtol=1e-5, atol=1e-4)
            np.testing.assert_allclose(
                beams.scores[prompt, place], logprob / len(sequence) ** length_penalty, rtol=1e-5, atol=1e-4
            )
        assert not beams.lengths[prompt, len(scored) :].any()


def test_narrow_beams_write_sequences_of_the_trie(params):
    """A trie that is left by its last token, and a beam that cannot hold all beginnings."""
    sequences = [(a, b, c) for a in (5, 6, 7) for b in (8, 9, 10, 11) for c in (5, 6)]
    constraint = constrain(token_trie(sequences), vocab_size=VOCAB)
    beams = beam_search(
        MODEL, params, PROMPTS["prompt_tokens"], PROMPTS["prompt_length"], num_beams=3, max_tokens=5,
        constraint=constraint,
    )  # fmt: skip
    for prompt, scored in enumerate(brute_force(params, [sequences] * 2, (), False)):
        logprobs = {sequence: logprob for logprob, sequence in scored}
        found = [tuple(tokens[:3].tolist()) for tokens in beams.tokens[prompt]]
        assert len(set(found)) == 3 and beams.lengths[prompt].tolist() == [3, 3, 3]
        np.testing.assert_allclose(beams.logprobs[prompt], [logprobs[each] for each in found], rtol=1e-5, atol=1e-4)
        assert np.all(np.diff(beams.scores[prompt]) <= 0)


def test_one_free_beam_is_greedy_decoding(params):
    beams = beam_search(MODEL, params, PROMPTS["prompt_tokens"], PROMPTS["prompt_length"], num_beams=1, max_tokens=5)
    assert beams.lengths.tolist() == [[5], [5]]
    for prompt, length in enumerate(PROMPTS["prompt_length"].tolist()):
        tokens = np.zeros((64, 16), np.int32)
        tokens[0, :length] = PROMPTS["prompt_tokens"][prompt, :length]
        tokens[0, length : length + 5] = beams.tokens[prompt, 0]
        best = np.argmax(full_logits(params, tokens)[0], axis=-1)
        np.testing.assert_array_equal(best[length - 1 : length + 4], beams.tokens[prompt, 0])


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Patience:
    """An odd first token pays 0.3 at once and ends; an even one pays nothing, but whatever is said next then pays
    `(first % 8) / 8`."""

    def reset(self, key, task):
        return jnp.array([0, 0]), task["prompt_tokens"], task["prompt_length"]

    def step(self, state, turn_tokens, length):
        turn, first = state
        token = jnp.where(turn == 0, turn_tokens[0], first)
        reward = jnp.where(turn == 0, jnp.where(token % 2 == 1, 0.3, 0.0), (token % 8) / 8)
        return jnp.array([turn + 1, token]), jnp.array([1, 2]), jnp.int32(2), reward, (turn == 1) | (token % 2 == 1)


SEARCH = dict(num_candidates=4, max_turn_tokens=2, stop_sequences=((3,),), decoding=Decoding(temperature=3.0))
TASKS = random_prompts(8, seed=3)


def search(params, value=None, **options):
    options = {"num_simulations": 24, "value": value, **SEARCH, **options}
    position = first_positions(Patience(), TASKS, jax.random.key(0), max_length=20)
    return position, jax.jit(functools.partial(turn_search, MODEL, **options))(
        params, Patience(), position, jax.random.key(5)
    )


def returns_of(candidates):
    """Of every candidate at the root, played to the end."""
    first = np.asarray(candidates.tokens[..., 0])
    return np.where(first % 2 == 1, 0.3, (first % 8) / 8)


def test_looking_ahead_beats_what_pays_at_once(params):
    position, found = search(params)
    returns = returns_of(found.candidates)
    chosen = np.take_along_axis(returns, np.asarray(found.chosen)[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(chosen, returns.max(axis=1))
    at_once = np.argmax(np.where(returns == np.float64(0.3), 0.3, 0.0), axis=1)
    assert chosen.mean() > np.take_along_axis(returns, at_once[:, None], axis=1).mean() + 0.1
    assert found.visits.sum(axis=1).tolist() == [24] * 8 and np.all(found.visits >= 1)
    # the search's line, played: the same returns, and the tokens are prompt, turn, observation
    after, reward = play_turn(Patience(), position, found.turn_tokens, found.turn_lengths)
    last, second = play_turn(Patience(), after, *(x[:, 0] for x in (found.candidates.tokens, found.candidates.lengths)))
    np.testing.assert_allclose(reward + second, chosen, rtol=1e-6)
    assert np.all(last.done)
    for row in range(8):
        start, turn = int(position.lengths[row]), int(found.turn_lengths[row])
        expected = [*position.tokens[row, :start].tolist(), *found.turn_tokens[row, :turn].tolist()]
        expected += [] if after.done[row] else [1, 2]
        assert after.tokens[row, : int(after.lengths[row])].tolist() == expected


def test_a_true_value_gives_the_true_q_values(params):
    """With the value of a position known, every q value is the return of its line (float32 means of equal numbers)."""

    def value(params, position):
        turn, first = position.env_state[:, 0], position.env_state[:, 1]
        return jnp.where(turn == 1, (first % 8) / 8, 0.0)

    _, found = search(params, value)
    np.testing.assert_allclose(found.q_values, returns_of(found.candidates), rtol=1e-5, atol=1e-6)
    _, halved = search(params, value, discount=0.5, prior="logprobs")
    returns = returns_of(halved.candidates)
    discounted = np.where(np.asarray(halved.candidates.tokens[..., 0]) % 2 == 1, returns, returns / 2)
    tried = halved.visits > 0
    np.testing.assert_allclose(halved.q_values, np.where(tried, discounted, 0), rtol=1e-5, atol=1e-6)


def test_candidates_are_turns_of_the_policy(params):
    """Their log-probs are those of a full pass; a position without room, or that is over, gets turns of one token."""
    position = first_positions(Patience(), TASKS, jax.random.key(0), max_length=20)
    position = position._replace(lengths=position.lengths.at[0].set(19), done=position.done.at[1].set(True))
    found = jax.jit(functools.partial(sample_turns, MODEL, **SEARCH))(params, position, jax.random.key(2))
    assert np.all(found.lengths[:2] == 1) and set(np.unique(found.lengths[2:])) <= {1, 2}
    for row in range(2, 8):
        start = int(position.lengths[row])
        tokens = np.zeros((64, 16), np.int32)
        tokens[:4, :start], tokens[:4, start : start + 2] = position.tokens[row, :start], found.tokens[row]
        table = jax.nn.log_softmax(full_logits(params, tokens) / 3.0)[:4]
        each = [table[np.arange(4), start - 1 + k, found.tokens[row, :, k]] for k in range(2)]
        expected = each[0] + np.where(found.lengths[row] > 1, each[1], 0.0)
        # a cache against a full pass: one rounding of the weights moves logits, which reach 33, by 1.5e-4 to 2.5e-3,
        # and the temperature divides that by 3
        np.testing.assert_allclose(found.logprobs[row], expected, atol=3e-4)


def test_bad_input(params):
    prompts = PROMPTS["prompt_tokens"], PROMPTS["prompt_length"]
    with pytest.raises(ValueError, match="num_beams must be at least 1, got 0"):
        beam_search(MODEL, params, *prompts, num_beams=0, max_tokens=3)
    with pytest.raises(ValueError, match="length_penalty must be at least 0, got -1"):
        beam_search(MODEL, params, *prompts, num_beams=2, max_tokens=3, length_penalty=-1)
    with pytest.raises(ValueError, match="the constraint is for 9 tokens, the model has 64"):
        constraint = constrain(token_trie([[1]]), vocab_size=9)
        beam_search(MODEL, params, *prompts, num_beams=2, max_tokens=3, constraint=constraint)
    with pytest.raises(ValueError, match="num_simulations=3 cannot try each of 4 candidates"):
        search(params, num_simulations=3)
    with pytest.raises(ValueError, match="leave no room in max_length=9"):
        first_positions(Patience(), TASKS, jax.random.key(0), max_length=9)
