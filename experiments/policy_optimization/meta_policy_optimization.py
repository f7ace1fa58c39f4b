"""MPO: the rubric that a policy is judged by is rewritten where the policy games it (arXiv 2504.20157).

The paper (Meta Policy Optimization with Evolving Reward Models, 2025) claims that policies trained with a rubric that a
meta reward model rewrites during training match or beat those with rubrics written by hand at length, with less reward
hacking. Every `interval` updates, on a few sampled rollouts and never with a reset of the policy:

    reward         r = sum of the scores of the rubric's items, - 1 without an end
    token reward   - beta (log pi - log pi_ref), + r on the last token; beta = 0.02; whitened GAE, PPO-clip, a critic
    meta step      rubric' = Merge({Refine(Analyze(sample, rubric))})

For large models judge and meta judge are `rewards.judge_by_rubric` and `rewards.revise_rubric`. Here the rubric is data
[our choice]: weights of features of an essay, which a rule takes the place of the meta judge for. An item whose feature
does not correlate with the true quality is dropped; then, if there is room, the best unused feature is taken in:

    c_j       correlation of feature j with the quality over the sampled rollouts; 0 if it does not vary
    dropped   active and c_j <= 0
    added     argmax c_j of the unused with c_j > tau, with the mean weight of those kept
    weights   scaled to `total_points`; if nothing is left, those before

The first rubric counts praise, which can be written again and again; a prompt asks for three topics, without
repetitions. Rollouts of the step in which the rubric changes are judged by the new one [our choice].

    python -m experiments.sweep meta_policy_optimization --table=main --vmap-seeds
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from experiments.policy_optimization._training import (
    Parts,
    World,
    check_choice,
    describe_rollout,
    draw_tasks,
    make_clip_step,
    make_optimizer,
    make_policy,
    play,
    ppo_batch,
    responses,
    score,
    start_params,
    train_policy,
)
from jaxrl_llm import ops, train
from jaxrl_llm.data.worlds import essays
from jaxrl_llm.envs import SingleTurnEnv
from jaxrl_llm.types import Metrics, Params, Rollout, TrainState

NEEDS_SCALE = (
    "Elo of essays 1168 with judges of 32B and 72B, against 1084 with an expert's rubric and 984 with the first one",
)
RUBRICS = {  # indices into `essays.FEATURES`
    "praise": (0, 1, 2, 3, 4),
    "oracle": (4, 5, 6, 7),
}


@dataclasses.dataclass(frozen=True)
class MetaRewardSchedule:
    """When the rubric is rewritten, and by how many rollouts.

    Raises:
      ValueError: `interval` below 1, or not 2 to `num_rollouts` samples.
    """

    interval: int
    num_samples: int
    num_rollouts: int

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1, got {self.interval}")
        if not 2 <= self.num_samples <= self.num_rollouts:
            raise ValueError(f"num_samples={self.num_samples} must be 2 to the {self.num_rollouts} rollouts of a step")

    def due(self, step: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether the rubric is rewritten in this step; never in the first."""
        return (step % self.interval == 0) & (step > 0)


def rubric_reward(features: Float[Array, "B C"], weights: Float[Array, "C"]) -> Float[Array, "B"]:
    """The points of each answer."""
    return jnp.sum(features * weights, axis=1)


def meta_update_rubric(
    features: Float[Array, "M C"],
    quality: Float[Array, "M"],
    weights: Float[Array, "C"],
    *,
    max_items: int,
    tau: float,
    total_points: float,
) -> Float[Array, "C"]:
    """The weights after a meta step; an item is active if its weight is not 0."""
    x, y = features - jnp.mean(features, axis=0), (quality - jnp.mean(quality))[:, None]
    spread = jnp.sqrt(jnp.sum(x**2, axis=0) * jnp.sum(y**2))
    # of numbers about 1: what is below that varies by rounding alone
    correlation = jnp.where(spread > 1e-6, jnp.sum(x * y, axis=0) / jnp.maximum(spread, 1e-6), 0.0)
    active = weights > 0
    kept = active & (correlation > 0)
    candidates = jnp.where(~active & (correlation > tau), correlation, -jnp.inf)
    best = jnp.argmax(candidates)
    added = (jnp.arange(len(weights)) == best) & jnp.isfinite(candidates[best]) & (jnp.sum(kept) < max_items)
    revised = jnp.where(kept, weights, 0.0)
    mean = jnp.where(jnp.any(kept), jnp.sum(revised) / jnp.maximum(jnp.sum(kept), 1), 1.0)
    revised = jnp.where(added, mean, revised)
    total = jnp.sum(revised)
    return jnp.where(total > 0, revised * total_points / jnp.where(total > 0, total, 1.0), weights)


def essay_world(config: ConfigDict) -> World:
    """Prompts for essays, rewarded by their true quality, which only meta step and report see."""

    def tasks(seed: int, number: int) -> dict[str, Array]:
        return jax.tree.map(jnp.asarray, essays.make_essay_prompts(np.random.default_rng(seed), number))

    return World(
        SingleTurnEnv(essays.essay_quality),
        train_tasks=tasks(1, config.world.train_problems),
        test_tasks=tasks(2, config.world.test_problems),
        stop_sequences=[[essays.EOS]],
        vocab_size=essays.VOCAB_SIZE,
        demonstrate=essays.demonstrate_essays,
    )


def build(config: ConfigDict) -> Parts:
    """One turn of the algorithm: sample, perhaps rewrite the rubric, judge by it, update policy and critic."""
    check_choice("rubric", config.rubric, RUBRICS)
    schedule = MetaRewardSchedule(config.interval, config.num_samples, config.prompts * config.group_size)
    world = essay_world(config)
    model, optimizer = make_policy(config, world), make_optimizer(config, critic=True)
    train_step = make_clip_step(config, model, optimizer)
    items = {
        name: jnp.zeros(len(essays.FEATURES)).at[jnp.array(chosen)].set(config.total_points / len(chosen))
        for name, chosen in RUBRICS.items()
    }

    def judge(sampled: Rollout, tasks: dict[str, Array]) -> tuple[Float[Array, "B C"], Float[Array, "B"]]:
        """Features of the essays, and 1 for those without an end."""
        written = responses(sampled)
        return jax.vmap(essays.essay_features)(tasks, *written), 1.0 - jax.vmap(essays.has_ended)(*written)

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        tasks, key = draw_tasks(config, world.train_tasks, state)
        policy, weights = state.params["policy"], state.memory
        sampled = play(config, model, policy, world, tasks, key, config.group_size)
        features, endless = judge(sampled, jax.tree.map(lambda leaf: jnp.repeat(leaf, config.group_size, 0), tasks))

        rows = jax.random.permutation(jax.random.fold_in(key, 1), len(endless))[: config.num_samples]
        limits = {"max_items": config.max_items, "tau": config.tau, "total_points": config.total_points}
        revised = meta_update_rubric(features[rows], sampled.rewards[rows], weights, **limits)
        weights = jnp.where(schedule.due(state.step) & config.meta, revised, weights)

        rewards = rubric_reward(features, weights) - endless
        ref_logprobs = score(model, state.ref_params, sampled)[0]
        token_rewards = ops.kl_shaped_rewards(rewards, sampled.logprobs, ref_logprobs, sampled.mask, beta=config.beta)
        state, metrics = train_step(state, ppo_batch(config, model, state.params, sampled, token_rewards))
        metrics |= describe_rollout(sampled) | {"rubric_score": jnp.mean(rewards), "items": jnp.sum(weights > 0)}
        return dataclasses.replace(state, memory=weights), metrics

    def init(reference: Params, seed: Array) -> TrainState:
        params = start_params(config, reference, critic=True)
        return train.init_state(params, optimizer, seed, ref_params=reference, memory=items[config.rubric])

    def describe(sampled: Rollout, tasks: dict[str, Array]) -> Metrics:
        features = judge(sampled, tasks)[0]
        return describe_rollout(sampled) | {"praise_score": jnp.mean(rubric_reward(features, items["praise"]))}

    return Parts(world, model, init, iteration, describe)


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Trains, and reports which items the rubric ended with."""
    state, _ = train_policy(config, log, build(config))
    log.summary({"rubric": train.fetch(state.memory).tolist()})


FIXED: dict[str, Any] = {"meta": False}
TABLES = {
    "main": train.Table(
        arms={
            "fixed": FIXED,
            "mpo_10": {"interval": 10},
            "mpo_20": {},
            "mpo_50": {"interval": 50},
            "oracle": FIXED | {"rubric": "oracle"},
            "fine_tuned": FIXED | {"steps": 0},
        },
        # success is the true quality here
        metrics=["trained.success", "mean.success", "trained.praise_score"],
        claims=[
            train.better("fixed", "fine_tuned", metric="trained.praise_score"),
            train.better("fine_tuned", "fixed"),
            train.better("mpo_20", "fine_tuned"),
            train.better("mpo_10", "mpo_50", metric="mean.success"),
            train.better("mpo_20", "oracle", by=-0.05),
        ],
    ),
}
