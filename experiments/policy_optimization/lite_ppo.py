"""Lite PPO: rewards minus their group's mean over the batch's standard deviation, token mean (arXiv 2508.08221).

The paper (Part I: Tricks or Traps? A Deep Dive into RL for LLM Reasoning, 2025) claims that these two tricks on plain
PPO-clip without a critic beat GRPO and DAPO on base models: a group of a very easy or very hard prompt has rewards that
are nearly all equal, and dividing by its tiny deviation blows up the gradient of the prompt that teaches least, while
the deviation of the batch leaves the scale between prompts as it is.

    A = (r - mean_group r) / (std_batch r + 1e-6)         std of the raw rewards, divisor B - 1
    loss = sum over the batch's tokens of max(-A ratio, -A clip(ratio, 0.8, 1.2)) / number of tokens

A group, or a batch, without spread gets 0 under the level that its deviation is taken at [our choice]. The world is
ours: sums that are mostly easy (table `easy`) or mostly hard (`hard`), and rewards ten times as large (`scale`): there
the norm of the gradient is what to look at, as Adam takes the same steps whatever the scale.

    python -m experiments.sweep lite_ppo --table=easy --vmap-seeds
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.policy_optimization._training import (
    Parts,
    arithmetic_world,
    describe_rollout,
    draw_tasks,
    init_policy,
    make_clip_step,
    make_optimizer,
    make_policy,
    play,
    read_curve,
    train_policy,
)
from jaxrl_llm import ops, train
from jaxrl_llm.types import Batch, Metrics, TrainState

NEEDS_SCALE = ("above GRPO and DAPO on six mathematics benchmarks with Qwen3-4B and 8B base models",)


def build(config: ConfigDict) -> Parts:
    """One turn of the algorithm: sample, normalize at two levels, update."""
    world = arithmetic_world(config)
    model, optimizer = make_policy(config, world), make_optimizer(config)
    train_step = make_clip_step(config, model, optimizer)

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        tasks, key = draw_tasks(config, world.train_tasks, state)
        sampled = play(config, model, state.params["policy"], world, tasks, key, config.group_size)
        mask = sampled.mask & sampled.scorable[:, None]
        if config.drop_truncated:
            mask &= ~sampled.truncated[:, None]
        advantages = ops.group_relative_advantages(
            config.reward_scale * sampled.rewards,
            sampled.group_ids,
            mask,
            center=config.mean_level,
            scale=config.std_level,
            valid=sampled.scorable,
        )
        state, metrics = train_step(state, Batch(sampled, mask, sampled.logprobs, advantages))
        return state, {**metrics, **describe_rollout(sampled)}

    return Parts(world, model, init_policy(config, optimizer), iteration)


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Trains, and reports how much the gradient's norm varies: its standard deviation over its mean."""
    train_policy(config, log, build(config))
    norms = read_curve(config, log, "grad_norm")
    log.summary({"grad_norm_variation": np.std(norms, axis=-1) / np.mean(norms, axis=-1)})


GRPO = {"std_level": "group", "agg": "seq"}
ARMS: dict[str, dict[str, Any]] = {
    "lite_ppo": {},
    "grpo": GRPO,
    "batch_std_only": {"agg": "seq"},
    "token_mean_only": {"std_level": "group"},
    "dapo": {"std_level": "group", "clip_high": 0.28},
}
HARD: dict[str, Any] = {"world.terms": (2, 4, 4, 4), "world.shown.wrong": 0.5}
METRICS = ["trained.success", "grad_norm_variation", "mean.success", "warm_start.success"]
TABLES = {
    "easy": train.Table(
        arms=ARMS,
        metrics=METRICS,
        claims=[
            train.better("lite_ppo", "grpo", metric="grad_norm_variation", lower=True),
            train.better("batch_std_only", "grpo", metric="grad_norm_variation", lower=True),
            train.better("lite_ppo", "grpo"),
            train.better("lite_ppo", "dapo"),
        ],
    ),
    "hard": train.Table(
        arms={name: HARD | ARMS[name] for name in ("lite_ppo", "grpo")},
        metrics=METRICS,
        claims=[train.better("lite_ppo", "grpo")],
    ),
    "scale": train.Table(
        arms={
            f"{std}_x{scale}": {"std_level": std, "reward_scale": float(scale), "steps": 50}
            for std in ("batch", "none")
            for scale in (1, 10)
        },
        metrics=["mean.grad_norm", "trained.success"],
        claims=[
            train.better("none_x10", "none_x1", metric="mean.grad_norm"),
            train.better("batch_x1", "batch_x10", by=-0.01, metric="mean.grad_norm"),
        ],
    ),
}
