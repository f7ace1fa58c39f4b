"""Kimi k1.5: mirror descent on off-policy rollouts, a length reward after a warm-up, hard problems first (2501.12599).

The paper (Kimi k1.5: Scaling Reinforcement Learning with LLMs, 2025) reaches o1's level without tree search, value
function or process rewards. With `l`, `l_ref` the summed log-probs of a response under the policy and under the one
that the iteration started from, and `rbar` the mean reward of the prompt's responses:

    the optimum has            r - tau log Z = tau (l - l_ref), and rbar stands in for tau log Z
    loss                       mean -(r - rbar) l + tau / 2 (l - l_ref)^2
    length reward              0.5 - (length - min) / (max - min) over the prompt's responses; of a wrong one at most 0
    prioritized problems       drawn in proportion to 1 - success

There is no clip and no deviation. Several updates are made on one batch; then the policy becomes the reference and
the optimizer starts anew. Choices of ours, as the paper gives no numbers: tau = 0.1, 0.5 for the length reward's weight
and for the decay of a problem's record. Its partial rollouts are `jaxrl_llm.sampling.PartialRolloutBuffer`.

Afterwards a short model is made of the long one (table `long2short`): by RL with the length reward and a lower limit,
by DPO on `long2short_pairs`, by imitating its shortest right responses ("rejection"), or by averaging the weights with
those of the latter ("merge"; the paper's short model is one of its own).

    python -m experiments.sweep kimi_k1_5 --table=off_policy --vmap-seeds
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int
from ml_collections import ConfigDict

from experiments.policy_optimization._stages import Rows, make_imitation_step
from experiments.policy_optimization._training import (
    Parts,
    arithmetic_world,
    check_choice,
    choose_problems,
    describe_rollout,
    draw_tasks,
    make_optimizer,
    make_policy,
    make_step,
    play,
    score,
    train_policy,
)
from jaxrl_llm import ops, train
from jaxrl_llm.models import Model
from jaxrl_llm.sampling import score_rollout
from jaxrl_llm.types import Batch, Decoding, Metrics, Params, Rollout, TrainState

NEEDS_SCALE = (
    "AIME 77.5, MATH500 96.2 and Codeforces 94th percentile with long chains; 60.8 and 94.6 with short ones",
)


def long2short_pairs(
    lengths: Int[Array, "P G"], correct: Bool[Array, "P G"], *, ratio: float = 1.5
) -> tuple[Int[Array, "P"], Bool[Array, "P G"]]:
    """Pairs of responses that teach a model of long chains to be short, for DPO: of each prompt the shortest right one
    is chosen (-1: none is right), and rejected are the longer ones that are wrong or more than `ratio` times as long.

    Raises:
      ValueError: `ratio` below 1.
    """
    if ratio < 1:
        raise ValueError(f"ratio={ratio} must be at least 1: what is rejected is longer than what is chosen")
    groups = jnp.repeat(jnp.arange(lengths.shape[0]), lengths.shape[1])
    rows = ops.shortest_correct(lengths.ravel(), correct.ravel(), groups).reshape(lengths.shape)[:, 0]
    chosen = jnp.where(rows >= 0, rows % lengths.shape[1], -1)
    shortest = jnp.take_along_axis(lengths, jnp.maximum(chosen, 0)[:, None], axis=1)
    longer = (lengths > shortest) & (~correct | (lengths > ratio * shortest))
    return chosen, longer & (chosen >= 0)[:, None]


def make_train_step(config: ConfigDict, model: Model, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """`step(state, batch) -> (state, metrics)`: an update by one of three losses, which have the same gradient as
    long as the policy is the one that sampled."""

    def loss_fn(params: Params, batch: Batch, denominator: Array) -> tuple[Array, Metrics]:
        mask, sampled = batch.mask, batch.rollout
        decoding = Decoding(**config.decoding)
        logprobs, entropy = score_rollout(model, params["policy"], sampled, mask=mask, decoding=decoding)
        if config.loss == "mirror_descent":
            seq, ref_seq = (ops.sequence_logprob(x, mask) for x in (logprobs, batch.old_logprobs))
            loss, metrics = ops.mirror_descent_loss(
                seq, ref_seq, sampled.rewards, sampled.group_ids, tau=config.tau, denominator=denominator
            )
        else:
            policy_loss = {"ppo_clip": ops.ppo_clip_loss, "reinforce": ops.reinforce_loss}[config.loss]
            loss, metrics = policy_loss(
                logprobs, batch.old_logprobs, batch.advantages, mask, agg=config.agg, denominator=denominator
            )
        return loss, metrics | {"entropy": ops.masked_mean(entropy, mask)}

    return make_step(config, loss_fn, optimizer)


def build(config: ConfigDict) -> Parts:
    """One turn of the algorithm: draw problems, sample, add the length reward, some updates, a new reference."""
    check_choice("loss", config.loss, ("mirror_descent", "ppo_clip", "reinforce"))
    world = arithmetic_world(config)
    model, optimizer = make_policy(config, world), make_optimizer(config)
    train_step = make_train_step(config, model, optimizer)

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        probs = ops.score_probs(1 - state.memory, transform="proportional") if config.prioritized else None
        chosen, key = choose_problems(config, world.train_tasks, state, probs)
        tasks = jax.tree.map(lambda leaf: leaf[chosen], world.train_tasks)
        sampled = play(config, model, state.params["policy"], world, tasks, key, config.group_size)
        metrics = describe_rollout(sampled)

        right, lengths = sampled.rewards > 0, jnp.sum(sampled.mask, axis=1)
        weight = jnp.where(state.step >= config.length_from, config.length_weight, 0.0)
        rewards = sampled.rewards + weight * ops.group_length_rewards(lengths, right, sampled.group_ids)
        sampled = dataclasses.replace(sampled, rewards=rewards)
        advantages = ops.grpo_advantages(rewards, sampled.group_ids, sampled.mask, scale="none")
        batch = Batch(sampled, sampled.mask, sampled.logprobs, advantages)

        if config.optimizer_reset:
            state = dataclasses.replace(state, opt_state=train.init_optimizer(optimizer, state.params))
        state, updates = jax.lax.scan(lambda state, _: train_step(state, batch), state, length=config.epochs)
        success = jnp.mean(right.reshape(config.prompts, -1), axis=1, dtype=jnp.float32)
        record = state.memory.at[chosen].multiply(config.record_decay)
        record = record.at[chosen].add((1 - config.record_decay) * success)
        return dataclasses.replace(state, memory=record), metrics | train.mean_metrics(updates)

    def init(reference: Params, seed: Array) -> TrainState:
        record = jnp.full(config.world.train_problems, 0.5)  # success of each problem; not yet known
        return train.init_state({"policy": reference}, optimizer, seed, memory=record)

    return Parts(world, model, init, iteration)


def shorten(config: ConfigDict, parts: Parts) -> Parts:
    """The phase that makes a model of long responses short, in one of the paper's ways; the long model is where it
    starts, and for all but "rl" the one that samples."""
    if config.long2short == "rl":
        changes = {"length_weight": 0.5, "length_from": 0, "max_turn_tokens": config.short_limit}
        return build(ConfigDict({**config, **changes}))
    world, model, optimizer = parts.world, parts.model, make_optimizer(config)
    imitate = make_imitation_step(config, model, optimizer)

    def prefer(state: TrainState, rows: Rollout, valid: Bool[Array, "P"]) -> tuple[TrainState, Metrics]:
        def loss_fn(params: Params) -> tuple[Array, Metrics]:
            stats = ops.pair_margins(score(model, params["policy"], rows)[0], ref_logprobs, rows.mask)
            return ops.dpo_loss(stats, beta=config.dpo_beta, valid=valid)

        ref_logprobs = score(model, state.ref_params["policy"], rows)[0]  # type: ignore[index]  # see init
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        state, norms = train.apply_gradients(state, grads, optimizer, loss)
        return state, {"loss": loss, **metrics, **norms}

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        tasks, key = draw_tasks(config, world.train_tasks, state)
        assert state.ref_params is not None
        sampled = play(config, model, state.ref_params["policy"], world, tasks, key, config.group_size)
        lengths, grid = jnp.sum(sampled.mask, axis=1), (config.prompts, config.group_size)
        chosen, rejected = long2short_pairs(lengths.reshape(grid), (sampled.rewards > 0).reshape(grid))
        first = jnp.arange(config.prompts) * config.group_size
        if config.long2short == "dpo":
            longest = jnp.argmax(jnp.where(rejected, lengths.reshape(grid), -1), axis=1)
            rows = jnp.concatenate([first + jnp.maximum(chosen, 0), first + longest])
            return prefer(state, jax.tree.map(lambda leaf: leaf[rows], sampled), jnp.any(rejected, axis=1))
        best = jax.tree.map(lambda leaf: leaf[first + jnp.maximum(chosen, 0)], sampled)
        return imitate(state, Rows(best, best.mask & (chosen >= 0)[:, None]))

    def init(long: Params, seed: Array) -> TrainState:
        params = {"policy": long}
        return train.init_state(params, optimizer, seed, ref_params=params)

    return Parts(world, model, init, iteration)


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Warm start, then sample, score and update until the steps are done, then the report; then the short model."""
    parts = build(config)
    long = train_policy(config, log, parts)[0].params["policy"]
    short = long
    if config.long2short:
        check_choice("long2short", config.long2short, ("merge", "rejection", "dpo", "rl"))
        second = shorten(config, parts)
        state = train.loop(
            lambda seed, long: second.init(long, seed),
            second.iteration,
            steps=config.short_steps,
            log=log,
            stage="short",
            previous=long,
        )
        short = state.params["policy"]
        if config.long2short == "merge":
            short = train.over_seeds(lambda a, b: ops.interpolate_params(a, b, 0.5), config.seed)(long, short)

    def describe(policy: Params) -> Metrics:
        world = parts.world
        found = describe_rollout(play(config, parts.model, policy, world, world.test_tasks, jax.random.key(1), 1))
        return found | {"success_per_token": found["success"] / found["response_tokens"]}

    log.summary({"short": train.fetch(train.over_seeds(describe, config.seed)(short))})


TABLES = {
    "off_policy": train.Table(
        arms={
            f"{loss}_x{epochs}": {"loss": loss, "epochs": epochs}
            for epochs in (1, 8)
            for loss in ("mirror_descent", "ppo_clip", "reinforce")
        },
        metrics=["trained.success", "mean.success", "warm_start.success"],
        claims=[
            train.better("mirror_descent_x8", "reinforce_x8"),
            train.better("mirror_descent_x8", "ppo_clip_x8"),
            train.better("mirror_descent_x8", "mirror_descent_x1", metric="mean.success"),
        ],
    ),
    "length": train.Table(
        arms={
            "none": {},
            "from_start": {"length_weight": 0.5},
            "after_warmup": {"length_weight": 0.5, "length_from": 100},
        },
        metrics=["trained.success", "mean.success", "trained.response_tokens"],
        claims=[
            train.better("after_warmup", "from_start"),
            train.better("after_warmup", "from_start", metric="mean.success"),
            train.better("after_warmup", "none", metric="trained.response_tokens", lower=True),
        ],
    ),
    "long2short": train.Table(
        arms={way: {"long2short": way} for way in ("rl", "dpo", "merge", "rejection")},
        metrics=["short.success_per_token", "short.success", "short.response_tokens", "trained.success"],
        claims=[train.better("rl", way) for way in ("dpo", "merge", "rejection")],
    ),
    "problems": train.Table(
        arms={"uniform": {}, "prioritized": {"prioritized": True}},
        metrics=["trained.success", "mean.success"],
        claims=[train.better("prioritized", "uniform")],
    ),
}
