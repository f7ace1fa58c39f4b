"""Rollouts that branch: forks go on in the state of their turn, policies keep to budgets, shared tokens count once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.sampling import (
    Fork,
    NewContext,
    own_mask,
    path_weights,
    random_positions,
    rows_to_rollout,
    split_evenly,
    surprising_positions,
    tree_rollout,
    turn_starts,
    uncertain,
    unsolved,
)
from jaxrl_llm.sampling.rows import forked_row, new_row
from jaxrl_llm.types import Decoding
from tests.sampling.test_host import LETTERS, LIMITS, QUICK
from tests.sampling.worlds import MODEL

PROMPT = [9, 8, 7]


class Tally:
    """Its state is all turns so far, from which the observation and the reward are made; ends after three turns."""

    def reset(self, task):
        return (str(task),), LETTERS.decode([*PROMPT, task])

    def step(self, state, text):
        state = (*state, text)
        total = sum(map(sum, map(LETTERS.encode, state)))
        return state, LETTERS.decode([total % 64] * (total % 5)), float(total % 7), len(state) == 4


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def play(params, expand, **options):
    options = {"budget": 8, "group_size": 2, "call_limits": QUICK, "max_observation": 16, **LIMITS, **options}
    return tree_rollout(
        MODEL, params, Tally(), range(3), jax.random.key(1), tokenizer=LETTERS, expand=expand, **options
    )


def check_tree(params, found):
    """Every row is what its own turns would have got from the environment, and every log-prob that of a full pass."""
    table = jax.nn.log_softmax(jax.jit(MODEL.logits)(params, found.tokens))
    full = jnp.take_along_axis(table[:, :-1], found.tokens[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(found.logprobs[:, 1:], jnp.where(found.mask[:, 1:], full, 0), atol=1e-4)
    env = Tally()
    for row in range(len(found.lengths)):
        tokens, turn_ids = np.asarray(found.tokens[row]), np.asarray(found.turn_ids[row])
        state, prompt = env.reset(int(found.group_ids[row]))
        written, rewards = LETTERS.encode(prompt), []
        for turn in range(turn_ids.max() + 1):
            own = tokens[turn_ids == turn].tolist()
            state, observation, reward, done = env.step(state, LETTERS.decode(own))
            written += own + LETTERS.encode(observation)
            rewards.append(reward)
        length = int(found.lengths[row])
        np.testing.assert_array_equal(tokens[:length], written[:length])
        assert found.turn_rewards[row][: len(rewards)].tolist() == rewards
        parent, position = int(found.parent[row]), int(found.fork_position[row])
        assert parent < row and (position > 0) == (parent >= 0)
        np.testing.assert_array_equal(tokens[:position], found.tokens[max(parent, 0), :position])


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("expand", [random_positions, surprising_positions, turn_starts])
def test_forks_go_on_in_the_state_of_their_turn(params, expand, rounds):
    found, episodes = play(params, expand, rounds=rounds)
    assert len(found.lengths) == len(episodes) == 14 and np.sum(found.parent >= 0) == 8
    assert np.all(np.diff(found.group_ids) >= 0) and found.rollout_ids.tolist() == list(range(14))
    check_tree(params, found)
    assert episodes[-1].calls <= 3


def test_a_fork_behind_a_turn_asks_the_environment_again(params):
    def ends(groups, budget, rng):
        return [Fork(rows[0], rows[0].turn_ends[1], 2) for rows in groups]

    found, episodes = play(params, ends)
    check_tree(params, found)
    assert [episode.calls for episode in episodes] == [3, 3, 2, 2] * 3  # the second turn's call again, and the third's
    again, _ = play(params, ends)
    np.testing.assert_array_equal(found.tokens, again.tokens)


def test_forks_of_replaced_contexts(params):
    """A fork of the second piece of an episode keeps the turns that lie before it."""

    def summarize(context):
        return NewContext(LETTERS.decode([5, 6])) if len(context.state) == 2 else None

    def second_pieces(groups, budget, rng):
        return [Fork(rows[1], rows[1].turn_starts[1]) for rows in groups]

    found, episodes = play(params, second_pieces, edit_context=summarize, group_size=1)
    assert found.rollout_ids.tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5] and len(episodes) == 6
    assert found.turn_mask.sum(axis=1).tolist() == [1, 2, 2] * 3 and not np.any(found.truncated)
    assert found.parent.tolist() == [-1, -1, 1, -1, -1, 4, -1, -1, 7]


def rows_of(*turns, fork_position=0, rewards=(1.0,)):
    """A row with a prompt of two tokens and turns of the given log-probs, one token between them."""
    row = new_row([1, 1], np.zeros(2, np.uint32), 16, -1)
    row.fork_position, row.turn_rewards = fork_position, list(rewards)
    for turn, logprobs in enumerate(turns):
        if turn:
            row.known += 1
            row.turn_starts.append(row.known)
        end = row.known + len(logprobs)
        row.logprobs[row.known : end], row.mask[row.known : end] = logprobs, True
        row.known = end
        row.turn_ends.append(end)
    return row


def test_policies_of_expansion():
    rng = np.random.default_rng(0)
    first = rows_of([-1.0, -5.0], [-2.0], rewards=[1.0])
    child = rows_of([-1.0, -9.0], [-3.0], fork_position=4, rewards=[0.0])  # what is taken over is not seen twice
    other = rows_of([-0.5, -4.0], rewards=[np.nan])
    groups = [[first, child], [other]]
    assert surprising_positions(groups, 3, rng) == [Fork(first, 3), Fork(other, 3), Fork(child, 5)]
    assert surprising_positions(groups, 5, rng, count=2) == [Fork(first, 3, 2), Fork(other, 3, 2)]

    def counted(expand, budget=6000):
        return {(id(row), position): count for row, position, count in expand(groups, budget, rng)}

    drawn = counted(random_positions)
    places = [(first, 2), (first, 3), (first, 5), (child, 5), (other, 2), (other, 3)]
    assert set(drawn) == {(id(row), position) for row, position in places}
    # 1000 expected of each, standard deviation 29: five of them
    assert sum(drawn.values()) == 6000 and max(abs(count - 1000) for count in drawn.values()) < 145
    starts = counted(turn_starts)
    assert set(starts) == {(id(first), 2), (id(first), 5), (id(child), 5), (id(other), 2)}
    assert not random_positions([[]], 3, rng)

    assert uncertain(groups[0]) and not uncertain(groups[1]) and not uncertain([first, other])
    assert unsolved([child, other]) and not unsolved(groups[0]) and unsolved([first], threshold=1.0)
    shares = [sum(fork.children for fork in split_evenly([group], 5, rng, expand=turn_starts)) for group in groups]
    assert shares == [5, 5]
    forks = split_evenly(groups, 5, rng, expand=surprising_positions)
    assert sorted(fork.row is other for fork in forks) in ([False] * 3 + [True] * 2,)
    kept = functools.partial(split_evenly, expand=random_positions, keep=uncertain)
    assert {fork.row is other for fork in kept(groups, 9, rng)} == {False} and not kept([groups[1]], 9, rng)


def linked(forks, length=12):
    """A rollout of rows that fork as given, (parent, position); a row without a parent begins with a prompt of two."""
    rows, key = [], np.zeros(2, np.uint32)
    for index, (parent, position) in enumerate(forks):
        if parent < 0 or not rows:
            row = new_row([1, 1], key, length, -1)
        else:
            source = rows[parent % len(rows)]
            row = forked_row(source, min(position, source.known), key)
        row.tokens[row.known :] = 100 + index
        row.mask[row.known : length - index % 3] = True
        row.known = max(row.known, length - index % 3)
        rows.append(row)
    return rows_to_rollout(rows, decoding=Decoding(), group_ids=[0] * len(rows))


def test_path_weights_of_a_small_tree():
    """A trunk of four tokens, of which the second row has three and the third, a child of the second, all it shares."""
    found = linked([(-1, 0), (0, 3), (1, 5)], length=8)
    weights = path_weights(found)
    third, half = np.float32(1 / 3), 0.5
    np.testing.assert_array_equal(
        weights,
        [[third] * 3 + [1] * 5, [third] * 3 + [half] * 2 + [1, 1, 0], [third] * 3 + [half] * 2 + [1, 0, 0]],
    )
    assert own_mask(found).sum(axis=1).tolist() == [6, 4, 1]


compiled = jax.jit(lambda rollout: (path_weights(rollout), own_mask(rollout)))


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(-1, 6), st.integers(1, 12)), min_size=7, max_size=7), st.permutations(range(7)))
def test_each_token_of_a_tree_counts_once(forks, order):
    """In any order of the rows a weighted sum over them is one over distinct tokens, and `own_mask` holds each once."""
    found = linked(forks)
    order = np.array(order)
    place = np.argsort(order)
    parent = np.asarray(found.parent)[order]
    found = jax.tree.map(lambda x: np.asarray(x)[order], found)
    found = type(found)(**{**vars(found), "parent": np.where(parent >= 0, place[parent], -1)})

    def node(row, column):
        while found.parent[row] >= 0 and column < found.fork_position[row]:
            row = found.parent[row]
        return row, column

    value = np.random.default_rng(0).normal(size=found.tokens.shape)
    seen, own = {}, {}
    for row, column in np.ndindex(*found.tokens.shape):
        if column < found.lengths[row]:
            key = node(row, column)
            value[row, column] = seen.setdefault(key, value[row, column])
            if found.mask[row, column]:
                own[key] = True
    weights, own_tokens = jax.device_get(compiled(found))
    # float32 weights, 84 terms
    np.testing.assert_allclose(np.sum(weights * value), sum(seen.values()), atol=1e-5)
    assert np.all(weights[np.arange(12) >= found.lengths[:, None]] == 0)
    held = {(int(row), int(column)) for row, column in np.argwhere(own_tokens)}
    assert held == {(int(row), int(column)) for row, column in own}


def test_rollouts_without_a_tree():
    found = linked([(-1, 0)] * 3)
    bare = type(found)(**{**vars(found), "parent": None, "fork_position": None})
    np.testing.assert_array_equal(path_weights(bare), path_weights(found))
    np.testing.assert_array_equal(own_mask(bare), found.mask)


def test_bad_input(params):
    with pytest.raises(ValueError, match="expand asked for 9 rows, expected at most the 8"):
        play(params, lambda groups, budget, rng: [Fork(groups[0][0], 4, 9)])
    with pytest.raises(ValueError, match=r"a fork at position=3: expected a place in one of the row's turns, \[\(4, "):
        play(params, lambda groups, budget, rng: [Fork(groups[0][0], 3)])
    with pytest.raises(ValueError, match="a row that is not of this rollout"):
        play(params, lambda groups, budget, rng: [Fork(rows_of([-1.0]), 2)])
    with pytest.raises(ValueError, match="budget must be at least 1"):
        play(params, random_positions, budget=0)
