"""Token automata on the device, worked out by hand, and the distributions that tokens are drawn from."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from jaxrl_llm.sampling import constraints
from jaxrl_llm.sampling.constraints import constrain, start_states, token_trie
from jaxrl_llm.sampling.draw import draw_tokens
from jaxrl_llm.types import Decoding
from tests.sampling.worlds import VOCAB, ScriptedModel

MODEL = ScriptedModel(jnp.zeros((1, 1)))  # its head is the identity: hidden states are logits
SEQUENCES = [(1, 2, 3), (1, 2), (4,), (1, 5)]
END = 9
TRIE = token_trie(SEQUENCES, end=(END,))
NUM_DRAWS = 100_000
allowed_tokens, next_states = jax.jit(constraints.allowed_tokens), jax.jit(constraints.next_states)


@partial(jax.jit, static_argnames="decoding")
def draw(logits, key, decoding=Decoding(), constraint=None, states=None):
    keys = jax.random.split(key, len(logits))
    return draw_tokens(MODEL, {}, logits, keys, decoding, constraint, states)


draw_one = partial(draw, jnp.zeros((1, VOCAB)), jax.random.key(0))


def walk(constraint, tokens, group=0):
    """The allowed tokens before each of `tokens` and behind the last, and the state at the end."""
    states, seen = start_states(constraint, jnp.array([group])), []
    for token in tokens:
        seen.append(np.flatnonzero(allowed_tokens(constraint, states)[0]).tolist())
        states = next_states(constraint, states, jnp.array([token]))
    seen.append(np.flatnonzero(allowed_tokens(constraint, states)[0]).tolist())
    return seen, int(states[0])


def test_a_trie_by_hand():
    constraint = constrain(TRIE, vocab_size=VOCAB)
    everything = list(range(VOCAB))
    assert walk(constraint, [1, 2, 3, 9]) == ([[1, 4], [2, 5], [3, 9], [9], everything], -1)
    assert walk(constraint, [4, 9])[0] == [[1, 4], [9], everything]
    assert walk(constraint, [1, 2, 9])[1] == -1 and walk(constraint, [1, 2])[1] >= 0
    left_open = constrain(token_trie([(1, 2, 3), (4,)]), vocab_size=VOCAB)
    assert walk(left_open, [1, 2, 3]) == ([[1, 4], [2], [3], everything], -1)
    ends = constrain(token_trie([(1,)], end=(8, 9)), vocab_size=VOCAB)
    assert walk(ends, [1])[0] == [[1], [8, 9]] and walk(ends, [1, 8])[1] == walk(ends, [1, 9])[1] == -1


@given(
    st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=4), min_size=1, max_size=12),
    st.lists(st.integers(0, 7), max_size=4),
)
def test_a_trie_allows_what_may_follow(sequences, prefix):
    """Against the definition, for a prefix that some sequence begins with."""
    prefix = prefix if any(s[: len(prefix)] == prefix for s in sequences) else sequences[0][:1]
    follow = {s[len(prefix)] for s in sequences if s[: len(prefix)] == prefix and len(s) > len(prefix)}
    follow |= {END} if prefix in sequences else set()
    assert walk(constrain(token_trie(sequences, end=(END,)), vocab_size=16), prefix)[0][-1] == sorted(follow)


def test_forced_banned_and_trigger():
    """A forced opening, then freedom but for the banned token, until the trigger 7 7 8 is written, also as 7 7 7 8."""
    constraint = constrain(TRIE, vocab_size=VOCAB, trigger=(7, 7, 8), forced=(6, 11), banned=(11, 3))
    free = [token for token in range(VOCAB) if token not in (3, 11)]
    allowed, state = walk(constraint, [6, 11, 8, 7, 7, 7, 8, 1, 2, 9, 7, 7, 8, 4])
    assert allowed[:2] == [[6], [11]] and allowed[2:7] == [free] * 5
    assert allowed[7:10] == [[1, 4], [2, 5], [9]] and allowed[10:13] == [free] * 3  # (1, 2, 3) needs a banned token
    assert allowed[13:] == [[1, 4], [9]] and state >= 0
    assert walk(constraint, [6, 11, 7, 7, 9, 8])[0][-1] == free
    only_banned = constrain(vocab_size=VOCAB, banned=(5,))
    assert walk(only_banned, [1, 2])[0] == [[token for token in range(VOCAB) if token != 5]] * 3
    directly = constrain(TRIE, vocab_size=VOCAB, forced=(6,))
    assert walk(directly, [6, 4])[0] == [[6], [1, 4], [9]]


def test_groups_may_differ():
    """A trie per question: each is left to the freedom of its own group, whose next trigger enters it again."""
    tries = [token_trie([(10 + i, 20), (30 + i, 20)]) for i in range(3)]
    constraint = constrain(*tries, vocab_size=VOCAB, choices=[2, 0, 1, 2], trigger=(7, 8))
    for group, own in enumerate([2, 0, 1, 2]):
        allowed, _ = walk(constraint, [7, 8, 30 + own, 20, 7, 8], group)
        assert allowed[2] == allowed[6] == [10 + own, 30 + own] and allowed[3] == [20]
        assert len(allowed[0]) == len(allowed[4]) == VOCAB


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: token_trie([]), "at least one sequence"),
        (lambda: token_trie([(1,), ()]), "sequence 1 of the trie must have tokens"),
        (lambda: token_trie([(1, -2)]), r"at least 0, got \[1, -2\]"),
        (lambda: token_trie([(1, 2), (1,)]), "give end tokens"),
        (lambda: token_trie([(1, 9), (1,)], end=(9,)), "end token 9 also goes on"),
        (lambda: constrain(token_trie([(1, 64)]), vocab_size=64), "token 64 is outside the vocabulary of 64"),
        (lambda: constrain(TRIE, vocab_size=64, banned=(-1,)), "banned: token -1 is outside"),
        (lambda: constrain(TRIE, vocab_size=64, banned=(9,)), "no way through"),
        (lambda: constrain(TRIE, vocab_size=64, trigger=(5,), banned=(5,)), "every token of the trigger"),
        (lambda: constrain(vocab_size=4, banned=(0, 1, 2, 3)), "must leave some token"),
        (lambda: constrain(vocab_size=64, trigger=(5,)), "a trigger needs an automaton"),
        (lambda: constrain(vocab_size=64), "nothing to constrain"),
        (lambda: constrain(TRIE, TRIE, vocab_size=64), "one of the 2 automata"),
        (lambda: constrain(TRIE, vocab_size=64, choices=[0, 1]), r"one of the 1 automata, 0 to 0, got \[0, 1\]"),
        (lambda: draw_one(constraint=constrain(TRIE, vocab_size=64)), "needs states"),
        (
            lambda: draw_one(constraint=constrain(TRIE, vocab_size=65), states=jnp.zeros(1, int)),
            "for 65 tokens, the model has 64",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def expected_distribution(logits, decoding):
    """What the fields of `decoding` say, by sorting, in float64."""
    logits = np.asarray(logits, np.float64) / decoding.temperature
    order = np.argsort(-logits)
    probs = np.exp(logits[order] - logits.max())
    if decoding.top_k is not None:
        probs[decoding.top_k :] = 0
    probs /= probs.sum()
    probs[np.cumsum(probs) - probs >= decoding.top_p] = 0
    probs[probs < decoding.min_p * probs[0]] = 0
    found = np.zeros(len(logits))
    found[order] = probs / probs.sum()
    return found


def check_frequencies(tokens, expected):
    """Chi-square of 1e5 draws; a right sampler fails once in 1000 seeds, and the seed is fixed."""
    counts = np.bincount(np.asarray(tokens), minlength=len(expected))
    assert counts.sum() == NUM_DRAWS and not counts[expected == 0].any()
    assert chisquare(counts[expected > 0], NUM_DRAWS * expected[expected > 0]).pvalue > 1e-3


LOGITS = 1.5 * np.random.default_rng(0).normal(size=VOCAB).astype(np.float32)


@pytest.mark.parametrize(
    "decoding",
    [Decoding(temperature=0.7), Decoding(temperature=1.3), Decoding(top_k=7), Decoding(top_p=0.8), Decoding(min_p=0.1)]
    + [Decoding(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05)],
    ids=str,
)
def test_frequencies(decoding):
    drawn = draw(jnp.broadcast_to(LOGITS, (NUM_DRAWS, VOCAB)), jax.random.key(1), decoding)
    expected = expected_distribution(LOGITS, decoding)
    check_frequencies(drawn.tokens, expected)
    np.testing.assert_allclose(drawn.logprobs, np.log(expected[drawn.tokens]), atol=1e-5)  # float32 sums of 64 weights


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(temperature=0.8, top_k=3, top_p=0.9)], ids=str)
def test_frequencies_of_a_trie(decoding):
    """Whole sequences, drawn token by token: the product of the distributions over the edges of each state."""
    constraint = constrain(TRIE, vocab_size=VOCAB)
    table = 1.5 * np.random.default_rng(1).normal(size=(8, VOCAB)).astype(np.float32)  # logits by state
    states = start_states(constraint, jnp.zeros(NUM_DRAWS, int))
    codes, logprobs = np.zeros(NUM_DRAWS, int), np.zeros(NUM_DRAWS)
    for step in range(4):
        running = np.asarray(states) >= 0
        drawn = draw(table[states], jax.random.key(step), decoding, constraint, states)
        codes = np.where(running, codes * 16 + np.asarray(drawn.tokens), codes)
        logprobs += np.where(running, drawn.logprobs, 0)
        states = drawn.states
    assert np.all(np.asarray(states) < 0)

    found = {}  # probability by code
    for sequence in SEQUENCES:
        state, code, prob = jnp.zeros(1, int), 0, 1.0
        for token in (*sequence, END):
            allowed = np.flatnonzero(allowed_tokens(constraint, state)[0])
            among = expected_distribution(table[int(state[0])][allowed], decoding)
            prob *= among[list(allowed).index(token)]
            state, code = next_states(constraint, state, jnp.array([token])), code * 16 + token
        found[code] = prob
    assert sum(found.values()) == pytest.approx(1)
    order = {code: index for index, code in enumerate(found)}
    check_frequencies([order[code] for code in codes.tolist()], np.array(list(found.values())))
    np.testing.assert_allclose(logprobs, np.log([found[code] for code in codes.tolist()]), atol=1e-5)


@given(seed=st.integers(0, 1000), temperature=st.sampled_from([0.5, 1.0]))
def test_a_constraint_costs_the_mass_it_leaves_out(seed, temperature):
    """Without filters: constrained log-prob = free log-prob - log(probability of what is allowed)."""
    constraint = constrain(TRIE, vocab_size=VOCAB, banned=(13,))
    logits = jax.random.normal(jax.random.key(seed), (8, VOCAB)) * 3
    states = jnp.arange(8) - 2  # two free rows, the six states
    drawn = draw(logits, jax.random.key(seed), Decoding(temperature=temperature), constraint, states)
    free = jax.nn.log_softmax(logits / temperature)
    allowed = allowed_tokens(constraint, states)
    mass = jax.nn.logsumexp(free, where=allowed, axis=-1)
    assert allowed[jnp.arange(8), drawn.tokens].all()
    np.testing.assert_allclose(drawn.free_logprobs, free[jnp.arange(8), drawn.tokens], atol=1e-5)  # sums of 64
    np.testing.assert_allclose(drawn.logprobs, drawn.free_logprobs - mass, atol=1e-5)


def test_greedy_among_the_allowed():
    constraint = constrain(TRIE, vocab_size=VOCAB)
    logits = jnp.zeros((3, VOCAB)).at[:, 30].set(50.0).at[0, 4].set(-90.0).at[0, 1].set(-99.0)
    drawn = draw(logits, jax.random.key(0), Decoding(greedy=True), constraint, jnp.array([0, 5, -1]))
    assert drawn.tokens.tolist() == [4, 9, 30]
    # e^-9 of the mass is the other token's, and a free log-prob may be as low as the logits are
    np.testing.assert_allclose(drawn.logprobs, [-np.log1p(np.exp(-9.0)), 0, 0], atol=1e-6)
    np.testing.assert_allclose(drawn.free_logprobs, [-140, -50, 0], rtol=1e-6)


def test_no_constraint_is_the_plain_sampler():
    from jaxrl_kernels import sample_tokens

    logits, key, decoding = jax.random.normal(jax.random.key(5), (16, VOCAB)), jax.random.key(6), Decoding(top_p=0.9)
    tokens, logprobs = sample_tokens(logits, key, **dataclasses.asdict(decoding))
    drawn = draw(logits, key, decoding)
    np.testing.assert_array_equal(drawn.tokens, tokens)
    np.testing.assert_array_equal(drawn.logprobs, logprobs)
    assert drawn.free_logprobs is None and drawn.states is None
