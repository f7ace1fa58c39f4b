"""Training in stages: pipelines whose stages start from each other's weights, and limits that grow during a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from jaxrl_llm.train.logging import RunLog, read_metrics
from jaxrl_llm.train.loops import loop
from jaxrl_llm.train.state import init_state
from jaxrl_llm.types import Metrics, Params, TrainState


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a pipeline: it starts from the weights of the stage before, with a fresh optimizer.

    Attributes:
      name: of its lines and checkpoints.
      iteration: `iteration(state, data) -> (state, metrics)`, pure. `state.seed` is the stage's own, made from the
        run's, so that stages do not repeat each other's draws.
      data: what it draws from: a pytree of arrays, the same for all seeds.
      steps: iterations.
      optimizer: of all its updates.
      reference: which weights `state.ref_params` are: "start", those that the stage starts from, or "previous", those
        that the stage before it started from (of the first stage: its own). None: there are no reference weights.

    Raises:
      ValueError: no data, or an unknown reference.
    """

    name: str
    iteration: Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]
    data: PyTree
    steps: int
    optimizer: optax.GradientTransformation
    reference: Literal["start", "previous"] | None = None

    def __post_init__(self) -> None:
        leaves = jax.tree.leaves(self.data)
        if not leaves or any(jnp.size(leaf) == 0 for leaf in leaves):
            raise ValueError(f"stage {self.name!r} has no data; give it arrays to draw from, or leave the stage out")
        if self.reference not in ("start", "previous", None):
            raise ValueError(f"reference={self.reference!r} of stage {self.name!r} must be start, previous or None")


def run_stages(
    params: Params,
    stages: Sequence[Stage],
    *,
    log: RunLog,
    evaluate: Callable[[TrainState], Metrics] | None = None,
    evaluate_every: int | None = None,
) -> tuple[Params, dict[str, dict[str, Any]]]:
    """Trains stage after stage (QianfanHuijin 2025), each in a `loop` of its own with its own checkpoints: the same
    call again goes on where it stopped.

    Args:
      params: what the first stage starts from, the same for all seeds.
      evaluate, evaluate_every: as `loop` takes them.

    Returns:
      The weights after the last stage, with an axis of seeds in front if `log.config.seed` is a tuple; and what
      `evaluate` found before the first stage ("start") and after each (by its name): `{row: {metric: number}}`, with
      the seeds' numbers as lists where there are several.

    Raises:
      ValueError: no stage, or names that are not all different; see also `loop`.
    """
    rows = ["start", *(stage.name for stage in stages)]
    if len(rows) < 2 or len(set(rows)) < len(rows):
        raise ValueError(f"stages need names that are all different, and none is 'start'; got {rows[1:]}")
    seed = log.config.get("seed", 0)
    if isinstance(seed, tuple | list):
        params = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(seed), *jnp.shape(leaf))), params)
    before = params
    table: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(stages):
        state = loop(
            lambda seed, weights, stage=stage, number=number: _begin(stage, number, seed, *weights),
            jax.tree_util.Partial(lambda data, state, stage=stage: stage.iteration(state, data), stage.data),
            steps=stage.steps,
            log=log,
            stage=stage.name,
            previous=(params, before),
            evaluate=evaluate,
            evaluate_every=evaluate_every,
        )
        before, params = params, state.params
        if evaluate is not None:
            if number == 0:
                table["start"] = _evaluation(log, stage.name, 0)
            table[stage.name] = _evaluation(log, stage.name, stage.steps)
    return params, table


def _begin(stage: Stage, number: int, seed: Int[Array, ""], params: Params, before: Params) -> TrainState:
    own_seed = jax.random.randint(jax.random.fold_in(jax.random.key(seed), number), (), 0, jnp.iinfo(jnp.int32).max)
    references = {"start": params, "previous": before, None: None}
    return init_state(params, stage.optimizer, own_seed, ref_params=references[stage.reference])


def _evaluation(log: RunLog, stage: str, step: int) -> dict[str, Any]:
    """What the record says of that step, so that a run which goes on need not evaluate finished stages again."""
    lines = [line for line in read_metrics(log.workdir) if (line["stage"], line["step"]) == (stage, step)]
    found = {
        name.removeprefix("eval/"): [line[name] for line in lines] for name in lines[0] if name.startswith("eval/")
    }
    return found if "seed" in lines[0] else {name: values[0] for name, values in found.items()}


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
