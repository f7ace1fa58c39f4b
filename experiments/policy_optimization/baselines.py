"""PPO, GRPO, Dr. GRPO, DAPO, RLOO, ReMax, REINFORCE++, GSPO and CISPO: the standard forms, side by side.

Every other page of the family says only what it changes here. With rollouts of one prompt as a group, rewards `r`, and
`ratio = exp(logprobs - old_logprobs)`:

    GRPO            A = (r - mean_group) / (std_group + 1e-6)
    Dr. GRPO        A = r - mean_group; a sequence's loss is its sum over a constant length
    RLOO            A = r - mean of the others in the group
    ReMax           A = r - r of the greedy response
    REINFORCE++     A = whiten(returns); with a baseline: whiten(r - mean_group)
    PPO             A = whiten(GAE(r on the last token, V)), and + mean (V - R)^2 / 2
    clipped loss    mean max(-A ratio, -A clip(ratio, 1 - low, 1 + high))
    GSPO            the same with one ratio a sequence, exp(mean of its log-ratios)
    CISPO           mean -min(ratio, 1 + high) A logprobs, the ratio without gradient
    DAPO            GRPO with high = 0.28, without the groups that have no spread, with a penalty near the length limit

Definitions are those in which verl and TRL agree; where they do not, `jaxrl_llm.ops` says which is the default. The
world is ours: sums of two to four terms modulo 10, with or without written partial sums, after a warm start on
demonstrations that are often wrong. In the table `length` the policy may wait behind its answer as long as it likes; in
`mismatch` it draws from a disturbed copy of itself, and tokens are weighed by the truncated ratio of the two.

    python -m experiments.run --config=configs/policy_optimization/baselines.py --config.advantages=rloo
    python -m experiments.sweep baselines --table=main --vmap-seeds
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from experiments.policy_optimization._training import (
    Parts,
    World,
    arithmetic_world,
    check_choice,
    critic_values,
    describe_lengths,
    describe_rollout,
    draw_tasks,
    init_policy,
    make_optimizer,
    make_policy,
    make_step,
    play,
    ppo_batch,
    score,
    train_policy,
)
from jaxrl_llm import ops, train
from jaxrl_llm.models import Model
from jaxrl_llm.sampling import score_rollout
from jaxrl_llm.types import Batch, Decoding, Metrics, Params, Rollout, TrainState

ADVANTAGES = ("grpo", "rloo", "remax", "reinforce_pp", "reinforce_pp_baseline", "gae")
LOSSES = {  # and the settings that each reads
    "ppo_clip": (ops.ppo_clip_loss, ("clip_low", "clip_high")),
    "gspo": (ops.gspo_loss, ("clip_low", "clip_high")),
    "cispo": (ops.cispo_loss, ("clip_high",)),
    "reinforce": (ops.reinforce_loss, ()),
}


def make_train_step(config: ConfigDict, model: Model, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """`step(state, batch) -> (state, metrics)`: one pass over a batch, an update for each mini-batch."""
    policy_loss, options = LOSSES[config.loss]

    def loss_fn(params: Params, batch: Batch, denominator: jax.Array) -> tuple[jax.Array, Metrics]:
        mean = {"agg": config.agg, "max_len": config.max_turn_tokens, "denominator": denominator}
        decoding = Decoding(**config.decoding)
        logprobs, entropy = score_rollout(model, params["policy"], batch.rollout, mask=batch.mask, decoding=decoding)
        chosen: dict[str, Any] = mean | {name: config[name] for name in options}
        loss, metrics = policy_loss(
            logprobs, batch.old_logprobs, batch.advantages, batch.mask, weights=batch.weights, **chosen
        )
        if config.kl_coefficient:
            assert batch.ref_logprobs is not None  # make_batch puts it there, and what GAE needs
            kl = ops.kl_estimate(logprobs, batch.ref_logprobs, kind="k3", mask=batch.mask)
            loss += config.kl_coefficient * ops.reduce_loss(kl, batch.mask, **mean)
            metrics["kl"] = ops.masked_mean(kl, batch.mask)
        if config.advantages == "gae":
            assert batch.returns is not None
            values = critic_values(config, model, params, batch.rollout)
            error, value_metrics = ops.value_loss(
                values, batch.old_values, batch.returns, batch.mask, clip=config.value_clip, denominator=denominator
            )
            loss, metrics = loss + error, metrics | value_metrics
        return loss, metrics | {"entropy": ops.masked_mean(entropy, batch.mask)}

    return make_step(config, loss_fn, optimizer)


def make_batch(
    config: ConfigDict, model: Model, state: TrainState, sampled: Rollout, greedy_rewards: Any
) -> tuple[Batch, Metrics]:
    """Rewards and advantages of the rollouts, and what else the update reads."""
    mask, groups, valid = sampled.mask & sampled.scorable[:, None], sampled.group_ids, sampled.scorable
    rewards, values, returns = sampled.rewards, None, None
    if config.overlong.buffer:
        lengths = jnp.sum(sampled.mask, axis=1)
        rewards += ops.overlong_penalty(lengths, max_len=config.max_turn_tokens, **config.overlong)
    informative = ops.dynamic_sampling_mask(sampled.rewards, groups, valid)
    if config.dynamic_sampling:
        mask &= informative[:, None]
    if config.advantages == "grpo":
        advantages = ops.grpo_advantages(rewards, groups, mask, scale=config.std, valid=valid)
    elif config.advantages == "rloo":
        advantages = ops.rloo_advantages(rewards, groups, mask, valid=valid)
    elif config.advantages == "remax":
        advantages = ops.remax_advantages(rewards, greedy_rewards, mask)
    elif config.advantages == "reinforce_pp":
        advantages = ops.reinforce_pp_advantages(ops.place_turn_rewards(rewards[:, None], sampled.turn_ids), mask)
    elif config.advantages == "reinforce_pp_baseline":
        centered = ops.grpo_advantages(rewards, groups, mask, scale="none", valid=valid)
        advantages = ops.masked_whiten(centered, mask)
    else:
        token_rewards = ops.place_turn_rewards(rewards[:, None], sampled.turn_ids)
        critic_part = ppo_batch(config, model, state.params, sampled, token_rewards)
        advantages, values, returns = critic_part.advantages, critic_part.old_values, critic_part.returns
    # the trainer's own log-probs, where the sampler is another policy than the one to be improved
    old_logprobs, weights = sampled.logprobs, None
    if config.sampler_noise:
        old_logprobs = score(model, state.params["policy"], sampled)[0]
    if config.importance_cap:
        weights = ops.importance_weights(old_logprobs, sampled.logprobs, mask, cap=config.importance_cap)
    ref_logprobs = score(model, state.ref_params, sampled)[0] if config.kl_coefficient else None
    batch = Batch(sampled, mask, old_logprobs, advantages, ref_logprobs, returns, values, weights)
    return batch, {"informative_groups": jnp.mean(informative, dtype=jnp.float32)}


def disturb(params: Params, key: jax.Array, size: float) -> Params:
    """Weights with noise of `size` times their root mean square: a sampler that is not quite the trainer."""
    noise = optax.tree.random_like(key, params)
    return jax.tree.map(lambda x, y: x + size * jnp.sqrt(jnp.mean(x**2)) * y, params, noise)


def make_iteration(
    config: ConfigDict, model: Model, world: World, optimizer: optax.GradientTransformation
) -> Callable[[TrainState], tuple[TrainState, Metrics]]:
    """One turn of the algorithm: sample, score, update."""
    train_step = make_train_step(config, model, optimizer)

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        tasks, key = draw_tasks(config, world.train_tasks, state)
        sampler, greedy_rewards = state.params["policy"], None
        if config.sampler_noise:
            sampler = disturb(sampler, jax.random.fold_in(key, 1), config.sampler_noise)
        sampled = play(config, model, sampler, world, tasks, key, config.group_size)
        if config.advantages == "remax":
            greedy = Decoding(**config.decoding, greedy=True)
            greedy_rewards = jnp.repeat(
                play(config, model, sampler, world, tasks, key, 1, greedy).rewards, config.group_size
            )
        batch, metrics = make_batch(config, model, state, sampled, greedy_rewards)
        state, updates = train_step(state, batch)
        return state, {**metrics, **updates, **describe_rollout(sampled)}

    return iteration


def build(config: ConfigDict) -> Parts:
    check_choice("advantages", config.advantages, ADVANTAGES)
    check_choice("loss", config.loss, LOSSES)
    world = arithmetic_world(config)
    model, critic = make_policy(config, world), config.advantages == "gae"
    optimizer = make_optimizer(config, critic=critic)

    iteration = make_iteration(config, model, world, optimizer)
    return Parts(world, model, init_policy(config, optimizer, critic=critic), iteration, describe_lengths)


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Warm start, then sample, score and update until the steps are done, then the report."""
    train_policy(config, log, build(config))


DR_GRPO = {"std": "none", "agg": "const"}
DAPO = {"clip_high": 0.28, "dynamic_sampling": True, "overlong.buffer": 2}
WAITING = {
    "world.shown.waits": 3.0,
    "world.shown.wait_first": False,
    "max_length": 34,
    "max_turn_tokens": 28,
    "warm_start.row_length": 96,
}
TABLES = {
    "main": train.Table(
        arms={
            "grpo": {},
            "dr_grpo": DR_GRPO,
            "dapo": DAPO,
            "rloo": {"advantages": "rloo"},
            "remax": {"advantages": "remax"},
            "reinforce_pp": {"advantages": "reinforce_pp"},
            "reinforce_pp_baseline": {"advantages": "reinforce_pp_baseline"},
            "ppo": {"advantages": "gae"},
            "gspo": {"loss": "gspo", "agg": "seq", "clip_low": 3e-4, "clip_high": 4e-4},
            "cispo": {"loss": "cispo", "clip_high": 4.0},
        },
        metrics=["trained.success", "mean.success", "warm_start.success", "mean.entropy"],
        claims=[train.better("dapo", "grpo", metric="mean.entropy")],
    ),
    "length": train.Table(
        arms={
            "seq": WAITING | {"agg": "seq"},
            "seq_no_std": WAITING | {"agg": "seq", "std": "none"},
            "token": WAITING,
            "const": WAITING | DR_GRPO,
        },
        metrics=["trained.tokens_wrong", "trained.tokens_right", "trained.success"],
        claims=[
            train.better("seq", "token", metric="trained.tokens_wrong"),
            train.better("seq", "const", metric="trained.tokens_wrong"),
            train.better("seq", "token", metric="trained.tokens_right", lower=True),
            train.better("seq", "const", metric="trained.tokens_right", lower=True),
        ],
    ),
    "mismatch": train.Table(
        arms={
            "clean": {},
            "noisy": {"sampler_noise": 0.3},
            "corrected": {"sampler_noise": 0.3, "importance_cap": 2.0},
        },
        metrics=["trained.success", "mean.train_success"],
        claims=[train.better("corrected", "noisy"), train.better("clean", "corrected")],
    ),
}
