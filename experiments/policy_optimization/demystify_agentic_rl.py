"""GRPO-TCR: token mean, clip-higher and shaped rewards for rollouts with tools, on problems of the right difficulty.

The paper (Demystifying Reinforcement Learning in Agentic Reasoning, 2025, arXiv 2510.11701) claims that this recipe
makes a 4B model reason with tools as 14B to 32B models do; that clip-higher, shaped rewards and entropy help; and that
few, deliberate calls beat many.

    base        1 for a right answer, -1 for a wrong one
    wrong, with tools    min(-0.6, base + 0.1 (messages - 2) / 2): each round of the tool adds 0.1, up to -0.6
    long        and less DAPO's ramp over the last tokens of the response, what tools said included
    A           (r - mean_group) / (std_group + 1e-6); groups that are all right or all wrong are left out
    loss        PPO-clip, 0.2 below and 0.28 above, dual clip 10, token mean, no KL
    data        problems that the policy, before training, solves sometimes: 0 < pass rate < 1

The thresholds of the last line are ours, as the paper's are not known; and groups that are left out are not refilled
here. The world is ours: sums of which some are too long for the turns that there are, with a calculator that adds two
numbers. Some demonstrations use it, others answer from the head.

    python -m experiments.sweep demystify_agentic_rl --table=main --vmap-seeds
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from ml_collections import ConfigDict

from experiments.policy_optimization._training import (
    Parts,
    World,
    choose_problems,
    describe_rollout,
    make_clip_step,
    make_optimizer,
    make_policy,
    play,
    read_curve,
    train_policy,
)
from jaxrl_llm import ops, train
from jaxrl_llm.data.worlds import arithmetic, calculator
from jaxrl_llm.types import Batch, Metrics, Params, Rollout, TrainState

NEEDS_SCALE = ("DemyAgent-4B: AIME24 72.6, AIME25 70.0, GPQA-diamond 58.5, against 17.9, 16.3 and 44.3 untrained",)


def calculator_world(config: ConfigDict) -> World:
    """Sums with a calculator; demonstrations as `config.world.shown` says."""
    modulus, shown = config.world.modulus, dict(config.world.shown)

    def sums(rng: np.random.Generator, number: int) -> dict[str, np.ndarray]:
        return arithmetic.make_sums(rng, number, terms=tuple(config.world.terms), modulus=modulus)

    def tasks(seed: int, number: int) -> PyTree:
        return arithmetic.as_tasks(sums(np.random.default_rng(seed), number))

    return World(
        calculator.CalculatorEnv(modulus),
        train_tasks=tasks(1, config.world.train_problems),
        test_tasks=tasks(2, config.world.test_problems),
        stop_sequences=calculator.STOP_SEQUENCES,
        vocab_size=arithmetic.FIRST_NUMBER + modulus,
        demonstrate=lambda rng, number: calculator.demonstrate_calls(
            rng, sums(rng, number), modulus=modulus, max_calls=config.max_turns - 1, **shown
        ),
    )


def tool_shaped_score(
    base: Float[Array, "B"], num_turns: Int[Array, "B"], *, per_round: float = 0.1, cap: float = -0.6
) -> Float[Array, "B"]:
    """The score with less for an error that used tools: `min(cap, base + per_round * rounds)` wherever it is negative.

    `num_turns` counts all messages, question, answer and two for each round of tools. The cap holds for every negative
    score, so scores are to be -1 and 1.

    Raises:
      ValueError: outside jit, fewer than two messages.
    """
    if not isinstance(num_turns, jax.core.Tracer) and np.min(num_turns, initial=2) < 2:
        raise ValueError(f"num_turns must be at least 2, a question and an answer, got {np.min(num_turns)}")
    return jnp.where(base < 0, jnp.minimum(cap, base + per_round * (num_turns - 2) / 2), base)


def describe_tools(sampled: Rollout) -> Metrics:
    """Success, length, and rounds of the tool in an episode."""
    rounds = jnp.sum(sampled.turn_mask, axis=1, dtype=jnp.float32) - 1
    return describe_rollout(sampled) | {"rounds": jnp.mean(rounds)}


def build(config: ConfigDict) -> Parts:
    """One turn of the algorithm: sample with the tool, shape the rewards, drop groups that teach nothing, update."""
    world = calculator_world(config)
    model, optimizer = make_policy(config, world), make_optimizer(config)
    train_step = make_clip_step(config, model, optimizer)
    room = config.max_length - world.train_tasks["prompt_tokens"].shape[1]

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        chosen, key = choose_problems(config, world.train_tasks, state, state.memory)
        tasks = jax.tree.map(lambda leaf: leaf[chosen], world.train_tasks)
        sampled = play(config, model, state.params["policy"], world, tasks, key, config.group_size)

        messages = 2 * jnp.sum(sampled.turn_mask, axis=1)
        rewards = tool_shaped_score(2 * sampled.rewards - 1, messages, **config.tool_bonus)
        if config.overlong.buffer:
            rewards += ops.overlong_penalty(sampled.lengths - sampled.prompt_lengths, max_len=room, **config.overlong)
        informative = ops.dynamic_sampling_mask(sampled.rewards, sampled.group_ids, sampled.scorable)
        mask = sampled.mask & informative[:, None]
        advantages = ops.grpo_advantages(rewards, sampled.group_ids, mask, valid=sampled.scorable)
        state, metrics = train_step(state, Batch(sampled, mask, sampled.logprobs, advantages))
        shares = {"informative": jnp.mean(informative, dtype=jnp.float32)}
        return state, {**metrics, **describe_tools(sampled), **shares}

    def init(reference: Params, seed: Array) -> TrainState:
        """The state, whose memory has the chances of the problems: those of the right difficulty, or all."""
        kept = jnp.ones(config.world.train_problems, bool)
        if config.model_aware:
            tried = play(config, model, reference, world, world.train_tasks, jax.random.key(2), config.tries)
            kept = ops.pass_rate_mask(jnp.mean(tried.rewards.reshape(-1, config.tries), axis=1))
        state = train.init_state({"policy": reference}, optimizer, seed)
        return dataclasses.replace(state, memory=kept / jnp.maximum(jnp.sum(kept), 1))

    return Parts(world, model, init, iteration, lambda sampled, tasks: describe_tools(sampled))


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Trains, and reports how often the tool was used in the first quarter of the run and in all of it."""
    train_policy(config, log, build(config))
    rounds, informative = (read_curve(config, log, name) for name in ("rounds", "informative"))
    early = rounds[..., : max(1, config.steps // 4)]
    log.summary({"rounds": rounds.mean(-1), "early_rounds": early.mean(-1), "informative": informative.mean(axis=-1)})


NO_BONUS = {"tool_bonus.per_round": 0.0, "tool_bonus.cap": -1.0}
ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "clip_0.2": {"clip_high": 0.2},
    "sequence_mean": {"agg": "seq"},
    "no_overlong": {"overlong.buffer": 0},
    "no_tool_bonus": NO_BONUS,
    "large_tool_bonus": {"tool_bonus.per_round": 0.3, "tool_bonus.cap": -0.1},
    "all_problems": {"model_aware": False},
}
TABLES = {
    "main": train.Table(
        arms=ARMS,
        metrics=["trained.success", "mean.success", "mean.entropy", "early_rounds", "trained.rounds", "informative"],
        claims=[
            *(
                train.better("full", arm)
                for arm in ("clip_0.2", "sequence_mean", "no_overlong", "no_tool_bonus", "all_problems")
            ),
            train.better("full", "clip_0.2", metric="mean.entropy"),
            train.better("full", "no_tool_bonus", metric="early_rounds"),
            train.better("full", "no_tool_bonus", by=-0.02),
            train.better("large_tool_bonus", "full", metric="trained.rounds"),
        ],
    ),
}
