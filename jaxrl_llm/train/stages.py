"""Limits that grow in stages: a length, a horizon, a difficulty, and when to go on to the next."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class StageState(NamedTuple):
    """Where a run stands; arrays, to be carried in `TrainState.memory`."""

    stage: Int[Array, ""]
    best: Float[Array, ""]  # the largest value in this stage
    waited: Int[Array, ""]  # steps since then


@dataclasses.dataclass(frozen=True)
class PlateauStages:
    """The next limit comes once a value has not grown for `patience` steps (MiroMind-M1 2025: the mean length of
    responses, under a growing limit of tokens; the threshold is ours, the paper gives none).

    State in, state out, on the host as well as inside of `jit`.

    Raises:
      ValueError: limits that do not grow, or `patience` below 1.
    """

    limits: tuple[int, ...]
    patience: int

    def __post_init__(self) -> None:
        if not self.limits or list(self.limits) != sorted(set(self.limits)):
            raise ValueError(f"limits must grow from stage to stage, got {self.limits}")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")

    def init(self) -> StageState:
        """The first stage."""
        return StageState(jnp.int32(0), jnp.float32(-jnp.inf), jnp.int32(0))

    def limit(self, state: StageState) -> Int[Array, ""]:
        """The limit of the stage that the run is in."""
        return jnp.asarray(self.limits)[state.stage]

    def advance(self, state: StageState, value: Float[Array, ""]) -> StageState:
        """The state after a step with this value: the next stage, if it was the last of `patience` without growth."""
        grown = value > state.best
        waited = jnp.where(grown, 0, state.waited + 1)
        move = (waited >= self.patience) & (state.stage + 1 < len(self.limits))
        stay = StageState(state.stage, jnp.maximum(value, state.best), waited)
        next_stage = self.init()._replace(stage=state.stage + 1)
        return StageState(*(jnp.where(move, new, old) for new, old in zip(next_stage, stay, strict=True)))
