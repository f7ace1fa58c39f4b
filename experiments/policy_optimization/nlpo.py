"""NLPO: PPO among the tokens that an older copy of the policy finds likely (arXiv 2210.01241).

The paper (Is Reinforcement Learning (Not) for Natural Language Processing?, 2022) claims that NLPO is more stable than
PPO and better on the six tasks of its benchmark GRUE, and keeps text as fluent. A masking policy, the policy as it was
up to `refresh` iterations ago, names its nucleus: the smallest set of likeliest tokens whose probability reaches p.

    acting policy    softmax over the nucleus and the end token; it samples, and both log-probs of the ratio are its own
    token reward     task reward on the last token - beta (log pi(a) - log pi_ref(a)), of the policy WITHOUT the mask
    beta             <- beta (1 + 0.1 clip(KL / target - 1, -0.2, 0.2)), KL per token
    advantages       whiten(GAE(lambda = 0.95)), PPO-clip 0.2, critic

The discount is 1 [our choice; 0.99 there, from memory]. With p = 1 there is no mask: PPO. The world is ours: reviews in
a small grammar, paid by good words less bad ones, which tempts a policy to write nothing else; perplexity is that under
the language model that the run started from, of what the acting policy writes.

    python -m experiments.sweep nlpo --table=main --vmap-seeds
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from experiments.policy_optimization._training import (
    Parts,
    World,
    describe_rollout,
    draw_tasks,
    make_clip_step,
    make_optimizer,
    make_policy,
    play,
    ppo_batch,
    score,
    start_params,
    train_policy,
)
from jaxrl_llm import ops, train
from jaxrl_llm.data.worlds import reviews
from jaxrl_llm.envs import SingleTurnEnv
from jaxrl_llm.models import Model, nucleus_model
from jaxrl_llm.types import Metrics, Params, TrainState

NEEDS_SCALE = ("IMDB continuation with GPT-2: sentiment 0.611 at perplexity 33.8, against 0.602 at 33.8 of PPO",)


def review_world(config: ConfigDict) -> World:
    """Beginnings of reviews to be gone on with; demonstrations are reviews in either mood."""

    def starts(seed: int, number: int) -> dict[str, Array]:
        return jax.tree.map(jnp.asarray, reviews.make_review_starts(np.random.default_rng(seed), number))

    return World(
        SingleTurnEnv(reviews.sentiment_reward),
        train_tasks=starts(1, config.world.train_problems),
        test_tasks=starts(2, config.world.test_problems),
        stop_sequences=[[reviews.EOS]],
        vocab_size=reviews.vocab_size(),
        demonstrate=reviews.demonstrate_reviews,
    )


def acting_policy(config: ConfigDict, model: Model, policy: Params, masking: Params) -> tuple[Model, Params]:
    """The policy among the masking policy's nucleus; the policy itself where p = 1 excludes nothing."""
    if config.top_p == 1:
        return model, policy
    nucleus = nucleus_model(model, top_p=config.top_p, always=(reviews.EOS,))
    return nucleus, {"policy": policy, "masking": masking}


def build(config: ConfigDict) -> Parts:
    """One turn of the algorithm: refresh the masking policy, sample in its nucleus, penalize, update both networks."""
    if config.refresh < 0:
        raise ValueError(f"config.refresh must be a number of iterations, 0 for never, got {config.refresh}")
    world = review_world(config)
    model, optimizer = make_policy(config, world), make_optimizer(config, critic=True)

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        tasks, key = draw_tasks(config, world.train_tasks, state)
        masking, beta = state.memory
        due = state.step % config.refresh == 0 if config.refresh else jnp.bool_(False)
        masking = ops.interpolate_params(masking, state.params["policy"], due.astype(jnp.float32))

        def acting(policy: Params) -> tuple[Model, Params]:
            return acting_policy(config, model, policy, masking)

        sampled = play(config, *acting(state.params["policy"]), world, tasks, key, config.group_size)
        logprobs, ref_logprobs = (
            score(model, params, sampled)[0] for params in (state.params["policy"], state.ref_params)
        )
        token_rewards = ops.kl_shaped_rewards(sampled.rewards, logprobs, ref_logprobs, sampled.mask, beta=beta)
        batch = ppo_batch(config, model, state.params, sampled, token_rewards)
        state, metrics = make_clip_step(config, model, optimizer, acting)(state, batch)

        kl = ops.masked_mean(logprobs - ref_logprobs, sampled.mask)
        perplexity = jnp.exp(-ops.masked_mean(ref_logprobs, sampled.mask))
        metrics |= describe_rollout(sampled) | {"kl": kl, "beta": beta, "perplexity": perplexity}
        beta = ops.update_kl_coefficient(beta, kl, target=config.target_kl, rate=0.1)
        return dataclasses.replace(state, memory=(masking, beta)), metrics

    def init(reference: Params, seed: jax.Array) -> TrainState:
        memory = (reference, jnp.float32(config.beta))
        params = start_params(config, reference, critic=True)
        return train.init_state(params, optimizer, seed, ref_params=reference, memory=memory)

    return Parts(world, model, init, iteration)


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Trains, and reports reward and perplexity of what the acting policy writes."""
    parts = build(config)
    state, start = train_policy(config, log, parts)

    def measure(policies: tuple[Params, Params, Params]) -> Metrics:
        policy, masking, reference = policies
        acting = acting_policy(config, parts.model, policy, masking)
        sampled = play(config, *acting, parts.world, parts.world.test_tasks, jax.random.key(2), 1)
        ref_logprobs = score(parts.model, reference, sampled)[0]
        perplexity = jnp.exp(-ops.masked_mean(ref_logprobs, sampled.mask))
        return {"reward": jnp.mean(sampled.rewards), "perplexity": perplexity}

    policies = (state.params["policy"], state.memory[0], start)
    log.summary({"acting": jax.device_get(train.over_seeds(measure, config.seed)(policies))})


TABLES = {
    "main": train.Table(
        arms={
            "nlpo": {},
            "ppo": {"top_p": 1.0},
            "p_0.5": {"top_p": 0.5},
            "refresh_1": {"refresh": 1},
            "never": {"refresh": 0},
        },
        metrics=["acting.reward", "acting.perplexity", "trained.success", "mean.success", "warm_start.success"],
        claims=[
            train.better("nlpo", "ppo", metric="acting.perplexity", lower=True),
            train.better("nlpo", "ppo", by=-0.05),
            train.better("nlpo", "never"),
            train.better("p_0.5", "nlpo", metric="acting.perplexity", lower=True),
        ],
    ),
}
