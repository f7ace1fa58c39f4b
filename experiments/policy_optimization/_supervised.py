"""What the family's supervised pages share: rows to learn from, the run and its report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from experiments.policy_optimization._training import World, warm_start
from jaxrl_llm import train
from jaxrl_llm.models import Model
from jaxrl_llm.types import Metrics, Params, TrainState


class Parts(NamedTuple):
    """What a page hands to `fine_tune`; shapes of all of it can be had without running anything."""

    world: World
    model: Model
    init: Callable[[Params, jax.Array], TrainState]  # from the warm start and a seed
    iteration: Callable[[TrainState], tuple[TrainState, Metrics]]
    evaluate: Callable[[TrainState], dict[str, Array]]  # numbers, or `[N]` outcomes of held-out questions


def device_rows(rows: dict[str, np.ndarray], length: int) -> dict[str, Array]:
    """`tokens` and `mask` of a world's demonstrations, padded to `length` columns, for rows of one sequence each.

    Raises:
      ValueError: they are longer.
    """
    width = rows["tokens"].shape[1]
    if width > length:
        raise ValueError(f"demonstrations have {width} tokens, more than max_length={length}; raise it")
    return {name: jnp.pad(rows[name], ((0, 0), (0, length - width))) for name in ("tokens", "mask")}


def fine_tune(
    config: ConfigDict,
    log: train.RunLog,
    parts: Parts,
    *,
    reference: Params | None = None,
    memory: PyTree | None = None,
) -> TrainState:
    """Iterations from the warm start until the steps are done.

    Args:
      reference: the warm start, where it was made before.
      memory: `state.memory` to begin with, with an axis of seeds in front if the run has several.
    """
    reference = warm_start(config, parts.model, parts.world) if reference is None else reference

    def init(reference: Params, seed: jax.Array, *memory: PyTree) -> TrainState:
        state = parts.init(reference, seed)
        return dataclasses.replace(state, memory=memory[0]) if memory else state

    start = jax.tree_util.Partial(init, reference)
    return train.loop(start, parts.iteration, steps=config.steps, log=log, previous=memory)


def report(config: ConfigDict, log: train.RunLog, parts: Parts, state: TrainState) -> None:
    """Puts what `parts.evaluate` finds under `trained` into the summary, and keeps the outcomes of single questions."""
    found = train.fetch(train.over_seeds(parts.evaluate, config.seed)(state))
    for metric, values in found.items():
        if np.ndim(values) > np.ndim(state.step):
            log.outcomes(f"trained.{metric}", values)
            found[metric] = np.mean(values, axis=-1)
    log.summary({"trained": found, "minutes": round((time.perf_counter() - log.opened) / 60, 2)})
