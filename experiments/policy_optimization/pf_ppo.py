"""PF-PPO: PPO on the samples whose rewards can be trusted, the best and the worst of several (arXiv 2409.06957).

The paper (Policy Filtration for RLHF, 2024) claims that a reward model is more reliable at the ends of its range than
in the middle, and that PPO on filtered samples of N = 5 responses a prompt beats PPO on all of them. Weights of a
prompt's responses, from which as many are drawn as are trained on:

    best_worst     1 for the best and the worst, 0 for the others
    best_random    0.4 for the best, 0.1 for every other
    best           1 for the best
    all            1: PPO on several samples (PPO-M); with one response a prompt, PPO-S

A strategy is to be chosen by R^2 between reward and true score over the samples that it keeps: `reward_r2`. The world
is ours: sums whose answer may be near. With q the closeness of the answer to the right one (1 exact, 0 farthest), the
reward model says `q + error (4 q (1 - q))^2 tanh(2 u)` with a liking u for each digit: its error is largest in the
middle and the same every time, so that it does not average out. What counts is whether the answer is right. With an
error of 1 instead of 0.5 some wrong answers please the reward model more than the right one: then every arm unlearns,
from 0.26 to between 0.12 and 0.14.

    python -m experiments.sweep pf_ppo --table=main --vmap-seeds
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
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
    ppo_batch,
    read_curve,
    responses,
    train_policy,
)
from jaxrl_llm import ops, train
from jaxrl_llm.data.worlds.arithmetic import FIRST_NUMBER, read_answer, sum_reward
from jaxrl_llm.types import Metrics, TrainState

NEEDS_SCALE = ("HumanEval 82.4 to 82.9, LeetCode 30.4 to 33.0 with a 7B model, against 80.2 and 29.8 of PPO-M",)


def reward_r2(
    rewards: Float[Array, "M"], scores: Float[Array, "M"], weights: Float[Array, "M"] | None = None
) -> Float[Array, ""]:
    """Share of the scores' variance that a straight line of the rewards explains, under weights; 0 if scores do not
    vary."""
    weights = jnp.ones_like(rewards) if weights is None else weights
    weights = weights / jnp.sum(weights)
    x, y = rewards - jnp.sum(weights * rewards), scores - jnp.sum(weights * scores)
    xx, yy, xy = (jnp.sum(weights * a * b) for a, b in ((x, x), (y, y), (x, y)))
    return jnp.where((xx > 0) & (yy > 0), xy**2 / jnp.where(xx * yy > 0, xx * yy, 1.0), 0.0)


def select_strategy(
    rewards: Float[Array, "P N"], scores: Float[Array, "P N"], strategies: Sequence[str]
) -> tuple[str, dict[str, float]]:
    """The strategy under whose weights rewards tell most about scores, and R^2 of each."""
    group_ids = jnp.repeat(jnp.arange(rewards.shape[0]), rewards.shape[1])
    flat, r2 = rewards.ravel(), {}
    for name in strategies:
        weights = ops.reward_filter_weights(flat, group_ids, strategy=name)  # type: ignore[arg-type]  # checked there
        r2[name] = float(reward_r2(flat, scores.ravel(), weights))
    return max(r2, key=lambda name: r2[name]), r2


def model_reward(config: ConfigDict, task: dict, tokens: Int[Array, "L"], length: Int[Array, ""]) -> Float[Array, ""]:
    """What the reward model says: the closeness of the answer, with an error that depends on the digit answered."""
    modulus = config.world.modulus
    liking = jax.random.normal(jax.random.key(7), (modulus,))
    token, given = read_answer(tokens, length)
    digit = token - FIRST_NUMBER
    apart = jnp.abs(digit - task["answer"])
    closeness = 1 - 2 * jnp.minimum(apart, modulus - apart) / modulus
    error = (
        config.error * (4 * closeness * (1 - closeness)) ** 2 * jnp.tanh(2 * liking[jnp.clip(digit, 0, modulus - 1)])
    )
    return jnp.where(given & (digit >= 0), closeness + error, 0.0)


def build(config: ConfigDict) -> Parts:
    """One turn of the algorithm: sample, keep what can be trusted, update policy and critic."""
    world = arithmetic_world(config)
    judged = arithmetic_world(config, reward=lambda *answer: model_reward(config, *answer))
    model, optimizer = make_policy(config, world), make_optimizer(config, critic=True)
    train_step = make_clip_step(config, model, optimizer)

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        tasks, key = draw_tasks(config, world.train_tasks, state)
        sampled = play(config, model, state.params["policy"], judged, tasks, key, config.group_size)
        weights = ops.reward_filter_weights(sampled.rewards, sampled.group_ids, strategy=config.strategy)
        grid = (config.prompts, config.group_size)
        draw_key = jax.random.fold_in(key, 1)
        drawn = ops.resample_indices(draw_key, weights.reshape(grid), config.keep, method="systematic")
        rows = (drawn + config.group_size * jnp.arange(config.prompts)[:, None]).ravel()
        kept = jax.tree.map(lambda leaf: leaf[rows], sampled)
        token_rewards = ops.place_turn_rewards(kept.rewards[:, None], kept.turn_ids)
        state, metrics = train_step(state, ppo_batch(config, model, state.params, kept, token_rewards))

        right = jax.vmap(sum_reward)(
            jax.tree.map(lambda leaf: jnp.repeat(leaf, config.group_size, 0), tasks), *responses(sampled)
        )
        metrics |= describe_rollout(sampled) | {"success": jnp.mean(right), "reward": jnp.mean(sampled.rewards)}
        return state, metrics | {"r2": reward_r2(sampled.rewards, right, weights)}

    return Parts(world, model, init_policy(config, optimizer, critic=True), iteration)


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Trains, and reports how well the rewards of what was kept told right from wrong."""
    train_policy(config, log, build(config))
    log.summary({"r2": read_curve(config, log, "r2").mean(axis=-1)})


TABLES = {
    "main": train.Table(
        arms={
            "best_worst": {},
            "best_random": {"strategy": "best_random"},
            "best": {"strategy": "best"},
            "ppo_m": {"strategy": "all"},
            "ppo_s": {"strategy": "all", "group_size": 1, "keep": 1},
        },
        metrics=["trained.success", "mean.success", "r2", "warm_start.success"],
        claims=[
            train.better("best_worst", "ppo_m"),
            train.better("best_worst", "best"),
            train.better("ppo_m", "best"),
            train.better("best_random", "ppo_m"),
        ],
    ),
    "exact": train.Table(
        arms={"best_worst": {"error": 0.0}, "ppo_m": {"error": 0.0, "strategy": "all"}},
        title="PF-PPO where the reward model does not err",
        metrics=["trained.success", "mean.success", "r2"],
        claims=[train.better("ppo_m", "best_worst", by=-0.05)],
    ),
}
