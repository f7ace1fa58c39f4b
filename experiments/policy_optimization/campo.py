"""CAMPO: a limit that grows in stages, and a penalty for answers that end in a loop (arXiv 2507.14683).

The paper (MiroMind-M1, Context-Aware Multi-Stage Policy Optimization, 2025) trains 7B and 32B models that reason as
well as others of their size with fewer tokens. On top of DAPO (clip-higher, no KL, groups without spread left out,
token mean):

    stages       a response that exceeds the limit of the stage scores 0; the limit grows once lengths have stopped
                 growing for a while (how long is a choice of ours)
    repetition   A = (r - f - mean_group) / (std_group + 1e-6), f in [0, 1] the share of the response inside the loop
                 that it ends in (`ops.repetition_scores`)

`repetition="fixed_if_truncated"` is what the released code does: a constant, for responses that loop to the limit. The
world is ours: sums where the policy may wait behind its answer, and one demonstration in five never stops.

    python -m experiments.sweep campo --table=main --vmap-seeds
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from experiments.policy_optimization._training import (
    Parts,
    arithmetic_world,
    check_choice,
    describe_rollout,
    draw_tasks,
    make_clip_step,
    make_optimizer,
    make_policy,
    play,
    responses,
    train_policy,
)
from jaxrl_llm import ops, train
from jaxrl_llm.data.worlds.arithmetic import EOS
from jaxrl_llm.types import Batch, Metrics, Params, Rollout, TrainState

NEEDS_SCALE = ("AIME24 60.4 -> 73.4 and AIME25 45.0 -> 57.8 (7B); 77.5 and 65.6 (32B), in fewer tokens than its peers",)


def campo_rewards(
    rewards: Float[Array, "B"],
    repetition: Float[Array, "B"],
    truncated: Bool[Array, "B"],
    *,
    mode: str = "subtract",
    fixed: float = 0.2,
) -> Float[Array, "B"]:
    """The reward less the penalty for a loop: its share of the response, or a constant where it filled the limit."""
    if mode == "none":
        return rewards
    if mode == "subtract":
        return rewards - repetition
    return rewards - jnp.where(truncated & (repetition > 0), fixed, 0.0)


def loops(sampled: Rollout, limit: int | Int[Array, ""]) -> Float[Array, "B"]:
    """How much of each response, its end mark aside and cut at the limit, is the loop that it ends in."""
    tokens, lengths = responses(sampled)
    last = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
    return ops.repetition_scores(tokens, jnp.minimum(lengths - (last == EOS), limit))


def build(config: ConfigDict) -> Parts:
    """One turn of the algorithm: sample, cut at the stage's limit, penalize loops, update."""
    check_choice("repetition", config.repetition, ("subtract", "fixed_if_truncated", "none"))
    stages = train.PlateauStages(tuple(config.limits), config.patience)
    world = arithmetic_world(config)
    model, optimizer = make_policy(config, world), make_optimizer(config)
    train_step = make_clip_step(config, model, optimizer)

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        tasks, key = draw_tasks(config, world.train_tasks, state)
        sampled = play(config, model, state.params["policy"], world, tasks, key, config.group_size)
        # what a sampler with that limit would have returned: the tokens up to it are the same
        limit, lengths = stages.limit(state.memory), jnp.sum(sampled.mask, axis=1)
        truncated = sampled.truncated | (lengths > limit)
        correct = jnp.where(truncated, 0.0, sampled.rewards)
        kept = jnp.minimum(lengths, limit)
        within = jnp.arange(config.max_length) < (sampled.prompt_lengths + limit)[:, None]

        repetition = loops(sampled, limit)
        rewards = campo_rewards(correct, repetition, truncated, mode=config.repetition, fixed=config.fixed)
        informative = ops.dynamic_sampling_mask(correct, sampled.group_ids)
        mask = sampled.mask & within & informative[:, None]
        advantages = ops.grpo_advantages(rewards, sampled.group_ids, mask)
        memory = stages.advance(state.memory, jnp.mean(kept, dtype=jnp.float32))
        state, metrics = train_step(state, Batch(sampled, mask, sampled.logprobs, advantages))
        tokens = jnp.mean(kept, dtype=jnp.float32)
        cut = {"success": jnp.mean(correct), "response_tokens": tokens, "loops": jnp.mean(repetition), "limit": limit}
        return dataclasses.replace(state, memory=memory), metrics | describe_rollout(sampled) | cut

    def init(reference: Params, seed: jax.Array) -> TrainState:
        return train.init_state({"policy": reference}, optimizer, seed, memory=stages.init())

    def describe(sampled: Rollout, tasks: dict) -> Metrics:
        return describe_rollout(sampled) | {"loops": jnp.mean(loops(sampled, config.max_turn_tokens))}

    return Parts(world, model, init, iteration, describe)


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Warm start, then sample, score and update until the steps are done, then the report."""
    train_policy(config, log, build(config))


TABLES = {
    "main": train.Table(
        arms={
            "full_limit": {"repetition": "none", "limits": (24,)},
            "stages": {"repetition": "none"},
            "stages_and_penalty": {},
            "released_penalty": {"repetition": "fixed_if_truncated"},
        },
        metrics=["trained.success", "trained.loops", "mean.train_tokens", "mean.success", "warm_start.loops"],
        claims=[
            train.better("stages_and_penalty", "stages", metric="trained.loops", lower=True),
            train.better("stages", "full_limit", metric="trained.loops", lower=True),
            train.better("stages", "full_limit", metric="mean.train_tokens", lower=True),
            train.better("stages_and_penalty", "full_limit", by=-0.02),
        ],
    ),
}
