"""What the family's pipelines share: stages that imitate and stages of GRPO, their run and its report."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, PyTree
from ml_collections import ConfigDict

from experiments.policy_optimization._training import (
    Parts,
    World,
    describe_rollout,
    draw_tasks,
    make_clip_step,
    make_optimizer,
    make_step,
    play,
    score,
    warm_start,
)
from experiments.policy_optimization._training import programs as plan_programs
from jaxrl_llm import ops, train
from jaxrl_llm.models import Model
from jaxrl_llm.sampling import as_rollout, score_rollout
from jaxrl_llm.types import Batch, Metrics, Params, Rollout, TrainState


class Rows(NamedTuple):
    """Sequences to imitate, and which of their tokens."""

    rollout: Rollout
    mask: Bool[Array, "B T"]


class Pipeline(NamedTuple):
    """What is trained, in which stages, and how it is looked at."""

    world: World
    model: Model
    stages: list[train.Stage]
    evaluate: Callable[[TrainState], Metrics]


def as_rows(config: ConfigDict, shown: dict[str, np.ndarray]) -> Rows:
    """Demonstrations (`tokens`, `mask`, `lengths`, no wider than `config.max_length`), to be imitated."""
    width = config.max_length - shown["tokens"].shape[1]
    tokens, mask = (jnp.pad(shown[name], ((0, 0), (0, width))) for name in ("tokens", "mask"))
    lengths = jnp.asarray(shown["lengths"])
    return Rows(as_rollout(tokens[:, :1], jnp.ones_like(lengths), tokens[:, 1:], lengths - 1), mask)


def make_imitation_step(config: ConfigDict, model: Model, optimizer: optax.GradientTransformation) -> Callable:
    """`step(state, rows) -> (state, metrics)`: negative log-likelihood of the `Rows`' tokens, the config's mean."""

    def loss_fn(params: Params, rows: Rows, denominator: Array) -> tuple[Array, Metrics]:
        decoding = rows.rollout.decoding
        logprobs, _ = score_rollout(model, params["policy"], rows.rollout, mask=rows.mask, decoding=decoding)
        return ops.sft_loss(logprobs, rows.mask, agg=config.agg, denominator=denominator)

    return make_step(config, loss_fn, optimizer)


def imitation_stage(config: ConfigDict, model: Model, name: str, rows: Rows) -> train.Stage:
    """`config.sft_steps` steps on `config.sft_rows` of the rows each."""
    optimizer = train.make_optimizer(config.sft_optimizer, total_updates=config.sft_steps * config.mini_batches)
    step = make_imitation_step(config, model, optimizer)

    def iteration(state: TrainState, rows: Rows) -> tuple[TrainState, Metrics]:
        return step(state, draw_tasks(config, rows, state, count=config.sft_rows)[0])

    return train.Stage(name, iteration, rows, config.sft_steps, optimizer)


def grpo_stage(config: ConfigDict, model: Model, name: str, world: World, tasks: PyTree) -> train.Stage:
    """`config.steps` steps of GRPO on tasks; a KL, if the config has one, is to the stage's start."""
    optimizer = make_optimizer(config)
    step = make_clip_step(config, model, optimizer)

    def iteration(state: TrainState, tasks: PyTree) -> tuple[TrainState, Metrics]:
        tasks, key = draw_tasks(config, tasks, state)
        sampled = play(config, model, state.params["policy"], world, tasks, key, config.group_size)
        mask = sampled.mask & sampled.scorable[:, None]
        advantages = ops.grpo_advantages(sampled.rewards, sampled.group_ids, mask, valid=sampled.scorable)
        ref = None if state.ref_params is None else score(model, state.ref_params["policy"], sampled)[0]
        state, metrics = step(state, Batch(sampled, mask, sampled.logprobs, advantages, ref))
        return state, {**metrics, **describe_rollout(sampled)}

    return train.Stage(name, iteration, tasks, config.steps, optimizer, "start" if config.kl_coefficient else None)


def run_pipeline(config: ConfigDict, log: train.RunLog, pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    """Warm start, then the stages. The summary has what was found at the start and after each stage, and `final`, which
    is the last of these; they are returned too."""
    params = {"policy": warm_start(config, pipeline.model, pipeline.world)}
    _, table = train.run_stages(params, pipeline.stages, log=log, evaluate=pipeline.evaluate)
    minutes = round((time.perf_counter() - log.opened) / 60, 2)
    log.summary({"after": table, "final": table[pipeline.stages[-1].name], "minutes": minutes})
    return table


def stage_programs(config: ConfigDict, pipeline: Pipeline, name: str) -> dict[str, train.Program]:
    """What `experiments.plan` compiles for one of the stages of GRPO."""
    (stage,) = [stage for stage in pipeline.stages if stage.name == name]

    def init(policy: Params, seed: jax.Array) -> TrainState:
        ref_params = {"policy": policy} if stage.reference else None
        return train.init_state({"policy": policy}, stage.optimizer, seed, ref_params=ref_params)

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        return stage.iteration(state, stage.data)

    return plan_programs(config, Parts(pipeline.world, pipeline.model, init, iteration))
