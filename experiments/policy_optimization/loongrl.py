"""LoongRL: the question itself is hidden behind a chain of keys in a long window (KeyChain, arXiv 2510.19363).

The paper (LoongRL: Reinforcement Learning for Advanced Reasoning over Long Contexts, 2025) claims that training on
KeyChain data, long windows in which a chain of key-value pairs leads to the question, teaches to plan, retrieve, reason
and check, beats as much plain long question answering (72.4 against 66.2 with 7B), and carries from 16K to 128K tokens.

    data    seed questions with a pass rate strictly between 0 and 1 over 8 answers, distractor documents, and chains of
            key -> next key of which one ends in the question and the others in other questions
    reward  1 if the boxed answer contains the gold or is contained in it (`rewards.boxed_containment_reward`), else 0
    GRPO    A = (r - mean_group) / std_group, k3 KL 0.001, no entropy term
    stages  without KeyChain; with it; then only the problems that are not solved 8 times of 8

The pipeline is one run here: the stage says which problems may be drawn, and the pass rate of a problem is that of the
last time it was drawn [our choice; the paper samples all of them anew]. The world is ours: keys and names are single
tokens, facts are pairs, the answer is what stands before the end of a trail that is written down step by step, so that
containment is equality. The warm start gives up along the way, and has seen all kinds of windows. The table trains in
windows of 64 tokens and asks in windows of 64, 128 and 256.

    python -m experiments.sweep loongrl --table=main --vmap-seeds
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from experiments.policy_optimization._long import describe_by, long_world
from experiments.policy_optimization._training import (
    Parts,
    choose_problems,
    describe_rollout,
    make_clip_step,
    make_optimizer,
    make_policy,
    play,
    score,
    train_policy,
)
from jaxrl_llm import ops, train
from jaxrl_llm.data.worlds.keychains import KINDS
from jaxrl_llm.types import Batch, Metrics, Params, TrainState

KIND = "pipeline"
NEEDS_SCALE = (
    "mean of five question sets of LongBench 48.9 -> 72.4 (7B) and 53.1 -> 74.2 (14B); RULER at 128K 69.4 -> 76.8; "
    "short tasks move by at most 2.8",
)
UNTRIED = -1.0


def hard_subset(pass_rate: Float[Array, "N"], *, keep_below: float = 1.0) -> Bool[Array, "N"]:
    """Problems that are not yet solved every time, untried ones (a rate below 0) among them."""
    return ops.pass_rate_mask(pass_rate, low=-jnp.inf, high=keep_below)


def stage_of(config: ConfigDict, step: Array) -> Array:
    """0 without KeyChain, 1 with it, 2 with what is still hard."""
    return (step >= config.warmup_steps).astype(jnp.int32) + (step >= config.hard_from)


def build(config: ConfigDict) -> Parts:
    """One turn of the pipeline: draw what the stage allows, sample, record the pass rates, update."""
    world = long_world(config)
    model, optimizer = make_policy(config, world), make_optimizer(config)
    train_step = make_clip_step(config, model, optimizer)
    hidden = world.train_tasks["kind"] == KINDS.index("keychain")
    plain = ~hidden if config.world.train.mix.keychain < 1 else jnp.ones_like(hidden)

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        stages = jnp.stack([plain, jnp.ones_like(hidden), hard_subset(state.memory)])
        probs = ops.score_probs(stages[stage_of(config, state.step)].astype(jnp.float32), transform="proportional")
        chosen, key = choose_problems(config, world.train_tasks, state, probs)
        tasks = jax.tree.map(lambda leaf: leaf[chosen], world.train_tasks)
        sampled = play(config, model, state.params["policy"], world, tasks, key, config.group_size)
        mask = sampled.mask & sampled.scorable[:, None]
        advantages = ops.grpo_advantages(sampled.rewards, sampled.group_ids, mask, valid=sampled.scorable)
        ref_logprobs = score(model, state.ref_params, sampled)[0] if config.kl_coefficient else None
        memory = state.memory.at[chosen].set(jnp.mean(sampled.rewards.reshape(-1, config.group_size), axis=1))
        state, metrics = train_step(state, Batch(sampled, mask, sampled.logprobs, advantages, ref_logprobs))
        state = dataclasses.replace(state, memory=memory)
        return state, metrics | describe_rollout(sampled) | {"hard": jnp.mean(stages[2], dtype=jnp.float32)}

    def init(reference: Params, seed: Array) -> TrainState:
        rates = jnp.full(hidden.shape, UNTRIED)
        return train.init_state({"policy": reference}, optimizer, seed, ref_params=reference, memory=rates)

    return Parts(world, model, init, iteration, describe_by)


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Warm start, then the stages, then the report."""
    train_policy(config, log, build(config))


QA = {"world.train.mix.keychain": 0.0, "world.train.mix.qa": 1.0, "world.train.mix.needle": 0.0}
TABLES = {
    "main": train.Table(
        arms={
            "keychain": {},
            "qa": QA,
            "needle": QA | {"world.train.mix.qa": 0.0, "world.train.mix.needle": 1.0},
            "keychain_no_stages": {"warmup_steps": 0, "hard_from": 1_000_000},
        },
        metrics=[
            "trained.success_keychain",
            "trained.success_qa",
            "trained.success_qa_64",
            "trained.success_256",
            "trained.success_keychain_256",
            "warm_start.success_keychain",
            "warm_start.success_qa",
        ],
        claims=[
            train.better("keychain", "qa"),
            train.better("keychain", "needle"),
            train.better("keychain", "qa", metric="trained.success_256"),
            train.better("keychain", "qa", by=-0.05, metric="trained.success_qa_64"),
            train.better("keychain", "keychain_no_stages"),
        ],
    ),
}
