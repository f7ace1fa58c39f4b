"""Episodes of several roles, and contexts that are replaced between turns."""

import jax
import numpy as np
import pytest

from jaxrl_llm.sampling import Move, NewContext, Role, agents_rollout, host_rollout
from tests.sampling.test_host import LETTERS, QUICK, Echo
from tests.sampling.worlds import MODEL

LIMITS = dict(max_length=64, max_turns=6, num_slots=4, call_limits=QUICK, max_observation=16)


@pytest.fixture(scope="module")
def weights():
    init = jax.jit(MODEL.init)
    return init(jax.random.key(0)), init(jax.random.key(1))


class Debate:
    """A writer is judged after each of its turns, always in a fresh context; it is paid for what the judge thinks."""

    def reset(self, task):
        return (task, 0), Move("writer", LETTERS.decode([5, 6, task]))

    def step(self, state, role, text):
        task, turn = state
        if role == "writer":
            return (task, turn), Move("judge", LETTERS.decode([8, 9, *LETTERS.encode(text)]), fresh=True), {}, False
        rewards = {"writer": len(text) / 10, "judge": 0.5}
        return (task, turn + 1), Move("writer", LETTERS.decode([turn])), rewards, turn == 1


def test_roles_have_their_own_weights_prompts_and_rows(weights):
    roles = {
        "writer": Role(MODEL, weights[0], LETTERS, 5, ((3,),)),
        "judge": Role(MODEL, weights[1], LETTERS, 4),
    }
    found, episodes = agents_rollout(roles, Debate(), range(3), jax.random.key(0), group_size=2, **LIMITS)
    assert len(episodes) == 6 and not any(episode.stopped for episode in episodes)
    # each episode: a writer's row of two turns, and two judge's rows of one turn, in the order in which they began
    assert found.rollout_ids.tolist() == [e for e in range(6) for _ in range(3)]
    assert found.agent_ids.tolist() == [0, 1, 1] * 6 and found.row_of_episode.tolist() == [0, 1, 2] * 6
    assert found.group_ids.tolist() == [e // 2 for e in range(6) for _ in range(3)]
    assert found.turn_mask.sum(axis=1).tolist() == [2, 1, 1] * 6 and not found.truncated.any()
    np.testing.assert_allclose(found.rewards.reshape(6, 3)[:, 1:], 0.5)
    for row in range(0, 18, 3):
        judged = [found.mask[row + k].sum() / 10 for k in (1, 2)]
        np.testing.assert_allclose(found.turn_rewards[row, :2], judged, rtol=1e-6)
    # a judge's prompt is what the writer wrote, and log-probs are those of the role's own weights
    logits = jax.jit(MODEL.logits)
    for agent, params in enumerate(weights):
        rows = np.flatnonzero(found.agent_ids == agent)
        table = jax.nn.log_softmax(logits(params, found.tokens))[:, :-1]
        full = np.take_along_axis(np.asarray(table), np.asarray(found.tokens)[:, 1:, None], axis=2)[..., 0]
        expected = np.where(found.mask[:, 1:], full, 0)
        np.testing.assert_allclose(found.logprobs[rows, 1:], expected[rows], atol=1e-4)
    wrote = found.tokens[0][found.mask[0] & (found.turn_ids[0] == 0)]
    np.testing.assert_array_equal(found.tokens[1, 2 : 2 + len(wrote)], wrote)


def test_roles_of_one_policy_share_what_they_can(weights):
    """With the same weights and limits two roles are decoded in one session; results do not depend on it."""
    one = Role(MODEL, weights[0], LETTERS, 4)
    shared, _ = agents_rollout({"writer": one, "judge": one}, Debate(), range(3), jax.random.key(0), **LIMITS)
    apart, _ = agents_rollout(
        {"writer": one, "judge": Role(MODEL, weights[0], LETTERS, 4, ((99,),))}, Debate(), range(3), jax.random.key(0),
        **LIMITS,
    )  # fmt: skip
    np.testing.assert_array_equal(shared.tokens, apart.tokens)


def test_an_edited_context_becomes_a_row_of_its_own(weights):
    """Once a row is long a summary replaces it (here its last three tokens); rows of an episode are linked."""
    seen = []

    def summarize(context):
        seen.append(context.spans)
        if context.tokens > 14:
            return NewContext(LETTERS.decode([5, *context.row.tokens[context.row.known - 3 : context.row.known]]))
        return context.observation + LETTERS.decode([2]) if context.state[1] == 1 else None

    options = dict(tokenizer=LETTERS, max_turn_tokens=5, stop_sequences=((3,),), group_size=2, **LIMITS)
    found, episodes = host_rollout(
        MODEL, weights[0], Echo(5), range(3), jax.random.key(1), edit_context=summarize, **options
    )
    plain, _ = host_rollout(MODEL, weights[0], Echo(5), range(3), jax.random.key(1), **options)
    assert plain.rollout_ids.tolist() == list(range(6)) and not plain.row_of_episode.any()
    assert np.unique(found.rollout_ids).tolist() == list(range(6)) and len(found.lengths) > 6
    assert np.all(np.diff(found.rollout_ids) >= 0) and not any(episode.stopped for episode in episodes)
    for episode in range(6):
        rows = np.flatnonzero(found.rollout_ids == episode)
        assert found.row_of_episode[rows].tolist() == list(range(len(rows)))
        assert found.turn_mask[rows].sum() == 5
        for before, after in zip(rows, rows[1:], strict=False):  # the next prompt is made from the last row's end
            end = int(found.lengths[before])
            assert end > 14 and found.prompt_lengths[after] == 4
            np.testing.assert_array_equal(found.tokens[after, 1:4], found.tokens[before, end - 3 : end])
            assert not found.truncated[before]
    # the first turn, before any edit, is as ever
    first = (found.turn_ids == 0)[found.row_of_episode == 0]
    np.testing.assert_array_equal(found.tokens[found.row_of_episode == 0][first], plain.tokens[plain.turn_ids == 0])
    assert [span.role for span in seen[0]] == ["prompt", "policy"]
    assert [span.role for span in seen[-1]][-2:] == ["observation", "policy"]


def test_bad_input(weights):
    role = Role(MODEL, weights[0], LETTERS, 4)

    def play(env, roles):
        return agents_rollout(roles, env, [1], jax.random.key(0), **LIMITS)

    class Paid(Debate):
        def step(self, state, role, text):
            return state, Move("writer", "9"), {"judge": 1.0}, False

    class Words(Debate):
        def step(self, state, role, text):
            return state, "writer", {}, False

    with pytest.raises(ValueError, match="at least one role"):
        play(Debate(), {})
    with pytest.raises(ValueError, match="named role 'judge'; there are writer"):
        play(Debate(), {"writer": role})
    with pytest.raises(ValueError, match="paid role 'judge', which has not spoken"):
        play(Paid(), {"writer": role, "judge": role})
    with pytest.raises(ValueError, match="must return .state, Move, rewards by role, done"):
        play(Words(), {"writer": role})
