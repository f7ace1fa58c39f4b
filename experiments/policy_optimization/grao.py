"""GRAO: explore by one's own samples, imitate a reference, widen the gap between the two (arXiv 2508.07750).

The paper (Learning to Align, Aligning to Learn: Group Relative Alignment Optimization, 2025) claims better alignment
than SFT, DPO, PPO and GRPO, in half the steps to the best policy: imitation alone cannot surpass its reference, and
GRPO learns nothing where every sample fails. Per prompt, with `l_i`, `l_y` the mean log-probs of a token of sample i
and of the reference, and rewards `r_i`, `r_y` by one scorer:

    A_i = (r_i - mean r) / std r,   A_y = (r_y - mean r) / std r        population std over the samples
    J   = mean A_i l_i + beta A_y l_y + lambda mean A_i (l_i - l_y),    beta = 0.5, lambda = 0.6

As the A_i add up to 0, the last term is lambda times the first unless the reference is among the statistics
(`include_reference`). Choices of ours: a standard deviation of at least 0.1 and advantages within 5, so that the
reference still teaches where all samples are equal. The world is ours: strings, references worth 0.8 of the best.

    python -m experiments.sweep grao --table=main --vmap-seeds
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from experiments.policy_optimization._training import (
    Parts,
    World,
    describe_rollout,
    draw_tasks,
    init_policy,
    make_optimizer,
    make_policy,
    play,
    read_curve,
    train_policy,
)
from jaxrl_llm import ops, train
from jaxrl_llm.data.worlds import strings
from jaxrl_llm.envs import SingleTurnEnv
from jaxrl_llm.sampling import as_rollout, score_rollout
from jaxrl_llm.types import Metrics, Params, Rollout, TrainState

NEEDS_SCALE = ("answers that a judge puts above the reference: 64.6% and 68.0%, against GRPO's 60.9% and 65.6%",)


class Pairs(NamedTuple):
    """The samples of each prompt, its reference, and their advantages."""

    samples: Rollout  # arrays [P, G, ...]
    reference: Rollout  # arrays [P, ...]
    sample_advantages: Float[Array, "P G"]
    ref_advantages: Float[Array, "P"]


def grao_advantages(
    rewards: Float[Array, "P G"],
    ref_rewards: Float[Array, "P"],
    *,
    include_reference: bool = False,
    sd_floor: float = 0.1,
    clip: float = 5.0,
) -> tuple[Float[Array, "P G"], Float[Array, "P"]]:
    """Advantages of samples and reference by the mean and population standard deviation of the prompt's samples.

    Raises:
      ValueError: a prompt with one sample.
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"GRAO needs at least 2 samples per prompt, got {rewards.shape[1]}")
    both = jnp.concatenate([rewards, ref_rewards[:, None]], axis=1)
    counted = both if include_reference else rewards
    mean, sd = jnp.mean(counted, axis=1, keepdims=True), jnp.std(counted, axis=1, keepdims=True)
    advantages = jnp.clip((both - mean) / jnp.maximum(sd, sd_floor), -clip, clip)
    return advantages[:, :-1], advantages[:, -1]


def grao_loss(
    sample_logps: Float[Array, "P G"],
    ref_logps: Float[Array, "P"],
    sample_advantages: Float[Array, "P G"],
    ref_advantages: Float[Array, "P"],
    *,
    explore: float = 1.0,
    beta: float = 0.5,
    lam: float = 0.6,
) -> tuple[Float[Array, ""], Metrics]:
    """`-J`, the mean over prompts (eqs. 2 to 4), and its three terms.

    Raises:
      ValueError: a negative weight.
    """
    if min(explore, beta, lam) < 0:
        raise ValueError(f"explore={explore}, beta={beta} and lam={lam} must not be negative")
    own, theirs = jax.lax.stop_gradient((sample_advantages, ref_advantages))
    terms = {
        "explore": jnp.mean(own * sample_logps),
        "imitate": jnp.mean(theirs * ref_logps),
        "align": jnp.mean(own * (sample_logps - ref_logps[:, None])),
    }
    return -(explore * terms["explore"] + beta * terms["imitate"] + lam * terms["align"]), terms


def string_world(config: ConfigDict) -> World:
    """Keys and their preferred strings; nothing is demonstrated."""

    def tasks(seed: int, number: int) -> dict[str, Array]:
        return jax.tree.map(jnp.asarray, strings.make_preferences(np.random.default_rng(seed), number))

    return World(
        SingleTurnEnv(strings.preference_reward),
        train_tasks=tasks(1, config.world.train_problems),
        test_tasks=tasks(2, config.world.test_problems),
        stop_sequences=[[strings.EOS]],
        vocab_size=strings.vocab_size(),
        demonstrate=lambda rng, number: {},
    )


def build(config: ConfigDict) -> Parts:
    """One turn of the algorithm: sample, score samples and references together, update."""
    world = string_world(config)
    model, optimizer = make_policy(config, world), make_optimizer(config)
    weights = {"explore": config.explore, "beta": config.beta, "lam": config.lam}

    def mean_logprobs(params: Params, rows: Rollout) -> Float[Array, "B"]:
        logprobs = score_rollout(model, params["policy"], rows, decoding=rows.decoding)[0]
        return ops.sequence_logprob(logprobs, rows.mask, length_power=1)

    def loss_fn(params: Params, pairs: Pairs) -> tuple[Array, Metrics]:
        grid = pairs.sample_advantages.shape
        samples = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), pairs.samples)
        ref_logps = mean_logprobs(params, pairs.reference)
        if config.only_imitate:
            return -jnp.mean(ref_logps) * grid[0], {}
        sample_logps = mean_logprobs(params, samples).reshape(grid)
        loss, terms = grao_loss(sample_logps, ref_logps, pairs.sample_advantages, pairs.ref_advantages, **weights)
        return loss * grid[0], terms  # the sum over prompts, as prompts come in micro-batches

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        tasks, key = draw_tasks(config, world.train_tasks, state)
        sampled = play(config, model, state.params["policy"], world, tasks, key, config.group_size)
        answer_lengths = jnp.full(config.prompts, tasks["reference"].shape[1])
        reference = as_rollout(tasks["prompt_tokens"], tasks["prompt_length"], tasks["reference"], answer_lengths)
        reference = dataclasses.replace(reference, decoding=sampled.decoding)  # both at the sampling temperature
        rewards = sampled.rewards.reshape(config.prompts, config.group_size)
        ref_rewards = strings.preference_score(tasks["best"], tasks["reference"], answer_lengths)
        advantages = grao_advantages(
            rewards,
            ref_rewards,
            include_reference=config.include_reference,
            sd_floor=config.sd_floor,
            clip=config.advantage_clip,
        )
        grouped = jax.tree.map(lambda leaf: leaf.reshape(config.prompts, config.group_size, *leaf.shape[1:]), sampled)
        loss, grads, metrics = train.accumulate_gradients(
            loss_fn, state.params, Pairs(grouped, reference, *advantages), config.micro_batches, config.prompts
        )
        state, norms = train.apply_gradients(state, grads, optimizer, loss)
        better = {"beats_reference": jnp.mean(rewards > ref_rewards[:, None]), "ref_advantage": jnp.mean(advantages[1])}
        return state, {"loss": loss, **metrics, **norms, **better, **describe_rollout(sampled)}

    def describe(sampled: Rollout, tasks: dict[str, Array]) -> Metrics:
        return describe_rollout(sampled) | {"beats_reference": jnp.mean(sampled.rewards > 0.9, dtype=jnp.float32)}

    return Parts(world, model, init_policy(config, optimizer), iteration, describe)


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Trains, and reports the first quarter of the run by itself."""
    train_policy(config, log, build(config))
    curve = read_curve(config, log, "eval/success")
    log.summary({"early": curve[..., : max(1, curve.shape[-1] // 4)].mean(axis=-1)})


TABLES = {
    "main": train.Table(
        arms={
            "grao": {},
            "grpo": {"beta": 0.0, "lam": 0.0},
            "sft": {"only_imitate": True},
            "no_imitation": {"beta": 0.0},
            "no_exploration": {"explore": 0.0},
            "no_alignment": {"lam": 0.0},
            "reference_in_group": {"include_reference": True},
        },
        metrics=["trained.success", "early", "trained.beats_reference"],
        claims=[
            train.better("grao", "grpo", metric="early"),
            train.better("grao", "sft"),
            train.better("grao", "no_imitation"),
            train.better("grao", "no_exploration"),
            train.better("grao", "no_alignment"),
        ],
    ),
}
