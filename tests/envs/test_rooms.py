"""The house of rooms: what is seen, what turns do, and how episodes end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import RoomsEnv
from jaxrl_llm.envs.rooms import FIRST_OBJECT, LEFT, PAD, RIGHT, SEE, TAKE, RoomsState, demonstrate_rooms, room_tasks

A, B, C = FIRST_OBJECT, FIRST_OBJECT + 1, FIRST_OBJECT + 2
ENV = RoomsEnv(max_objects=3, max_quest=3, dense=True)
step = jax.jit(ENV.step)


def house(room=0, score=0):
    """Three rooms, A and C in the first, B in the last; A, B and A are wanted."""
    arrays = {"rooms": 3, "names": [A, B, C], "places": [0, 2, 0], "goals": [A, B, A], "quest": 3}
    return RoomsState(
        **{name: jnp.array(value, jnp.int32) for name, value in (arrays | dict(room=room, score=score)).items()}
    )


def act(state, *turn):
    tokens = jnp.array([*turn, *[PAD] * (2 - len(turn))], jnp.int32)
    state, observation, length, reward, done = step(state, tokens, jnp.int32(len(turn)))
    return state, observation[: int(length)].tolist(), float(reward), bool(done)


def test_turns():
    state, seen, reward, done = act(house(), TAKE, A)
    assert (seen, reward, done) == ([B, SEE, A, C], 1, False)
    state, seen, reward, done = act(state, LEFT)
    assert (int(state.room), seen, reward, done) == (2, [B, SEE, B], 0, False)
    state, seen, reward, done = act(state, TAKE, B)
    assert (seen, reward, done) == ([A, SEE, B], 1, False)
    state, seen, _, _ = act(state, RIGHT)
    assert (int(state.room), seen) == (0, [A, SEE, A, C])
    assert act(state, TAKE, C)[1:] == ([A, SEE, A, C], 0, False)  # allowed, but not what is wanted
    assert act(state, TAKE, A)[2:] == (1, True)


def test_what_is_no_turn_ends_the_episode():
    for turn in ([TAKE, B], [TAKE, PAD], [TAKE], [SEE], [LEFT, RIGHT], [A], []):
        assert act(house(), *turn)[2:] == (0, True)


def test_the_reward_of_a_finished_quest_alone():
    env = RoomsEnv(max_objects=3, max_quest=3)
    for score, reward in ((0, 0), (2, 1)):
        assert float(env.step(house(score=score), jnp.array([TAKE, A]), jnp.int32(2))[3]) == reward


def test_sensible_demonstrations_win():
    env = RoomsEnv(max_objects=6, max_quest=8, dense=True)
    tasks = room_tasks(16, rooms=4, objects=5, quest=6)
    show = jax.jit(lambda key, wrong: demonstrate_rooms(env, tasks, key, max_turns=24, max_length=160, wrong=wrong))
    shown = jax.device_get(show(jax.random.key(0), 0.0))
    states, *_ = jax.vmap(env.reset)(jax.random.split(jax.random.split(jax.random.key(0))[0], 16), tasks)
    assert not np.any(np.asarray(states.names)[:, 5:]) and np.all(np.asarray(states.places) < 4)
    goals = np.asarray(states.goals)
    assert (goals[:, 1:] != goals[:, :-1]).all()
    for row in range(16):
        own = shown["tokens"][row][shown["mask"][row]]
        assert own[np.flatnonzero(own == TAKE) + 1].tolist() == goals[row, :6].tolist()
        assert shown["mask"][row, shown["lengths"][row] - 1] and not shown["mask"][row, shown["lengths"][row] :].any()
        assert shown["tokens"][row, 0] == goals[row, 0] and shown["tokens"][row, 1] == SEE
    short = jax.device_get(show(jax.random.key(0), 0.9))
    assert short["lengths"].mean() < shown["lengths"].mean()  # errors end episodes


def test_sizes():
    with pytest.raises(ValueError, match="objects at most 8"):
        room_tasks(2, rooms=2, objects=9, quest=4)
