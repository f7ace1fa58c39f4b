"""A house of rooms in a ring, objects in the rooms, and a quest: to take objects in a given order.

    observation     the object wanted now, `see`, and the objects in the room
    turn            `left` or `right` (to the next room), or `take` and an object of the room

Any other turn ends the episode. Rooms, objects and the length of the quest make a house small or large, in one
vocabulary: what is learned in small houses can be tried in large ones. The optimal solution cannot be known from the
start, as a room is seen only from inside.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm.sampling.planning import first_positions, play_turn

PAD, LEFT, RIGHT, TAKE, SEE = range(5)
FIRST_OBJECT = 5
NAMES = 8
VOCAB_SIZE = FIRST_OBJECT + NAMES
STOP_SEQUENCES = [[LEFT], [RIGHT], *[[FIRST_OBJECT + name] for name in range(NAMES)]]
TURN_TOKENS = 2


class RoomsState(NamedTuple):
    """A house, and how far the quest has come."""

    rooms: Int[Array, ""]
    names: Int[Array, "O"]  # tokens of the objects; PAD beyond their number
    places: Int[Array, "O"]  # the room of each object
    goals: Int[Array, "Q"]  # tokens of the objects to take, in order
    quest: Int[Array, ""]  # how many of them count
    room: Int[Array, ""]  # where the policy is
    score: Int[Array, ""]  # goals reached


def room_tasks(number: int, *, rooms: int, objects: int, quest: int) -> dict[str, Int[Array, "number"]]:
    """Tasks for `RoomsEnv`: so many houses of one size, which differ by the key of their episode.

    Raises:
      ValueError: a size below 1, or more objects than there are names.
    """
    sizes = {"rooms": rooms, "objects": objects, "quest": quest}
    if min(number, *sizes.values()) < 1 or objects > NAMES:
        raise ValueError(f"number={number} and all of {sizes} must be at least 1, and objects at most {NAMES}")
    return {name: jnp.full(number, size, jnp.int32) for name, size in sizes.items()}


@dataclasses.dataclass(frozen=True)
class RoomsEnv:
    """The environment, a `DeviceEnv`: reward 1 for a finished quest; with `dense`, 1 for each goal that is reached.

    `max_objects` and `max_quest` are the sizes of the arrays, for the largest house that is played.
    """

    max_objects: int = NAMES
    max_quest: int = 8
    dense: bool = False

    def reset(
        self, key: Key[Array, ""], task: dict[str, Int[Array, ""]]
    ) -> tuple[RoomsState, Int[Array, "O+2"], Int[Array, ""]]:
        """A house at random, and what is seen in its first room. A goal differs from the one before where it can."""
        name_key, place_key, goal_key = jax.random.split(key, 3)
        objects = jnp.arange(self.max_objects)
        names = FIRST_OBJECT + jax.random.permutation(name_key, NAMES)[: self.max_objects]
        places = jax.random.randint(place_key, (self.max_objects,), 0, task["rooms"])
        steps = jax.random.randint(goal_key, (self.max_quest,), 1, jnp.maximum(task["objects"], 2))
        state = RoomsState(
            rooms=task["rooms"],
            names=jnp.where(objects < task["objects"], names, PAD),
            places=places,
            goals=names[jnp.cumsum(steps) % task["objects"]],
            quest=jnp.minimum(task["quest"], self.max_quest),
            room=jnp.int32(0),
            score=jnp.int32(0),
        )
        return state, *self._observe(state)

    def step(
        self, state: RoomsState, turn_tokens: Int[Array, "L"], length: Int[Array, ""]
    ) -> tuple[RoomsState, Int[Array, "O+2"], Int[Array, ""], Float[Array, ""], Bool[Array, ""]]:
        """Moves or takes; the episode is over with the quest, or with a turn that is neither."""
        first, taken = turn_tokens[0], turn_tokens[jnp.minimum(1, turn_tokens.shape[0] - 1)]
        moved = (length == 1) & ((first == LEFT) | (first == RIGHT))
        here = jnp.any((state.names == taken) & (state.places == state.room)) & (taken != PAD)
        took = (length == TURN_TOKENS) & (first == TAKE) & here
        gain = took & (taken == self._wanted(state))
        room = (state.room + jnp.where(moved, jnp.where(first == LEFT, -1, 1), 0)) % state.rooms
        state = state._replace(room=room, score=state.score + gain)
        won = state.score == state.quest
        reward = gain if self.dense else won & gain
        return state, *self._observe(state), reward.astype(jnp.float32), won | ~(moved | took)

    def sensible_turn(self, state: RoomsState) -> tuple[Int[Array, "2"], Int[Array, ""]]:
        """What one does who sees only this room: take what is wanted if it is here, else go right."""
        wanted = self._wanted(state)
        here = jnp.any((state.names == wanted) & (state.places == state.room))
        return jnp.where(here, jnp.stack([jnp.int32(TAKE), wanted]), jnp.array([RIGHT, PAD])), jnp.where(here, 2, 1)

    def _wanted(self, state: RoomsState) -> Int[Array, ""]:
        return state.goals[jnp.minimum(state.score, self.max_quest - 1)]

    def _observe(self, state: RoomsState) -> tuple[Int[Array, "O+2"], Int[Array, ""]]:
        here = (state.places == state.room) & (state.names != PAD)
        seen = jnp.where(here, state.names, PAD)[jnp.argsort(~here, stable=True)]
        return jnp.concatenate([jnp.stack([self._wanted(state), jnp.int32(SEE)]), seen]), 2 + jnp.sum(here)


def demonstrate_rooms(
    env: RoomsEnv,
    tasks: dict[str, Int[Array, "N"]],
    key: Key[Array, ""],
    *,
    max_turns: int,
    max_length: int,
    wrong: float = 0.0,
) -> dict[str, Array]:
    """An episode of each task: `tokens` int32[N, max_length], `mask` (of the turns), `lengths`.

    Turns are sensible, but with the chance `wrong` each is a move, or the taking of a name, at random.
    """
    number = tasks["rooms"].shape[0]
    reset_key, key = jax.random.split(key)
    position = first_positions(env, tasks, reset_key, max_length=max_length)
    names = jnp.arange(FIRST_OBJECT, VOCAB_SIZE)
    random_turns = jnp.stack([jnp.full(NAMES, TAKE), names], axis=1)
    random_turns = jnp.concatenate([jnp.array([[LEFT, PAD], [RIGHT, PAD]] * (NAMES // 2)), random_turns])

    def step(carry, key):
        position, mask = carry
        turns, lengths = jax.vmap(env.sensible_turn)(position.env_state)
        err_key, turn_key = jax.random.split(key)
        errs = jax.random.bernoulli(err_key, wrong, (number,))
        other = random_turns[jax.random.randint(turn_key, (number,), 0, len(random_turns))]
        turns = jnp.where(errs[:, None], other, turns)
        lengths = jnp.where(errs, jnp.where(other[:, 0] == TAKE, 2, 1), lengths)
        places = jnp.arange(max_length) - position.lengths[:, None]
        mask |= (places >= 0) & (places < lengths[:, None]) & ~position.done[:, None]
        return (play_turn(env, position, turns, lengths)[0], mask), None

    start = (position, jnp.zeros((number, max_length), bool))
    (position, mask), _ = jax.lax.scan(step, start, jax.random.split(key, max_turns))
    return {"tokens": position.tokens, "mask": mask, "lengths": position.lengths}
