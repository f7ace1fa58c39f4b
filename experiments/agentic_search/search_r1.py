"""Search-R1: a policy learns to search and answer from the outcome alone (Jin et al. 2025, arXiv 2503.09516).

The paper claims that reinforcement on exact match alone, with search calls inside the rollout, beats
retrieval-augmented baselines by 24% (Qwen2.5-7B) and 20% (3B) relative, averaged over seven question sets, and that
masking retrieved tokens out of the loss stabilizes training.

One policy writes `<search> query</search>` or `<answer> text</answer>`. A search appends `<information>
passage</information>`; these tokens are context, with no gradient and no KL (`mask` is false). The reward is 1 if the
normalized answer equals a gold answer, else 0, and nothing else. With `ratio = exp(logprobs - old_logprobs)`, means
over the masked tokens of the batch:

    GRPO   A = (r - mean_group) / (std_group + 1e-6)
           loss = mean max(-A ratio, -A clip(ratio, 0.8, 1.2)) + 0.001 mean k3(logprobs, ref_logprobs)
    PPO    A = whiten(GAE(r on the last token - 0.001 (old_logprobs - ref_logprobs), V; gamma = lambda = 1))
           loss = mean max(-A ratio, -A clip(ratio, 0.8, 1.2)) + mean (V - R)^2 / 2

Here the questions are about real geography (`jaxrl_llm.data.worlds.geography`): facts one or two searches away, test
questions about countries that no training question touches. Choices of ours: rewards and GAE run over the policy's
tokens only (the authors' critic also values retrieved tokens); there is no `<think>`; a turn that neither searches nor
answers is told so and counts as a search; the last turn has no search, as in the paper, so a search there ends the
episode. The policy starts from a supervised warm start on demonstrations about invented places, whose strategy is
noisy: they teach the format and to copy names, and leave it to reinforcement to learn what to ask and when to answer.

    python -m experiments.run --config=configs/agentic_search/search_r1.py --workdir=out/search_r1
    python -m experiments.sweep search_r1 --table=main --seeds=3
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from experiments.agentic_search._geography import (
    Agent,
    World,
    describe_rollout,
    make_agent,
    make_evaluation,
    make_init,
    make_optimizers,
    make_sample,
    make_world,
    report,
    shared_prompt,
    step_programs,
    warm_start,
)
from jaxrl_llm import distributed, ops, train
from jaxrl_llm.sampling import score_rollout
from jaxrl_llm.types import Batch, Decoding, Metrics, Params, Rollout, TrainState


def make_loss(config: ConfigDict, agent: Agent) -> Callable[..., tuple[jax.Array, Metrics]]:
    """The loss of a mini-batch or a part of one, for `train.make_policy_step`."""

    def loss_fn(params: Params, batch: Batch, denominator: jax.Array) -> tuple[jax.Array, Metrics]:
        logprobs, entropy = score_rollout(
            agent.policy,
            params["policy"],
            batch.rollout,
            mask=batch.mask,
            decoding=Decoding(**config.decoding),
            **shared_prompt(config),
        )
        loss, metrics = ops.ppo_clip_loss(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.mask,
            agg=config.agg,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            weights=batch.weights,
            denominator=denominator,
        )
        assert batch.ref_logprobs is not None  # make_batch puts it there
        kl = ops.kl_estimate(logprobs, batch.ref_logprobs, kind="k3", mask=batch.mask)
        if config.algorithm == "grpo":
            loss += config.kl_coefficient * ops.reduce_loss(kl, batch.mask, agg=config.agg, denominator=denominator)
        if config.algorithm == "ppo":
            assert batch.returns is not None
            error, value_metrics = ops.value_loss(
                agent.values(params, batch.rollout, config),
                batch.old_values,
                batch.returns,
                batch.mask,
                clip=config.value_clip,
                denominator=denominator,
            )
            loss, metrics = loss + error, metrics | value_metrics
        own = batch.rollout.mask & batch.mask
        return loss, metrics | {"kl": ops.masked_mean(kl, own), "entropy": ops.masked_mean(entropy, own)}

    return loss_fn


def make_batch(config: ConfigDict, agent: Agent, state: TrainState, sampled: Rollout) -> Batch:
    """Advantages and what else an update reads; computed once, before the first mini-batch."""

    def score(params: Params, mask: jax.Array) -> jax.Array:
        return score_rollout(
            agent.policy, params, sampled, decoding=sampled.decoding, mask=mask, **shared_prompt(config)
        )[0]

    mask, old_logprobs = sampled.mask & sampled.scorable[:, None], sampled.logprobs
    if not config.mask_observations:  # the ablation: retrieved tokens are trained on like the policy's own
        steps = jnp.arange(sampled.tokens.shape[1])
        mask = (
            (steps >= sampled.prompt_lengths[:, None]) & (steps < sampled.lengths[:, None]) & sampled.scorable[:, None]
        )
        old_logprobs = score(state.params["policy"], mask)
    weights = None
    if config.distributed.workers:  # sampled under older weights: the ratio is taken to those of now (decoupled PPO)
        now, cap = score(state.params["policy"], mask), config.distributed.importance_cap
        weights = ops.importance_weights(now, sampled.logprobs, sampled.mask & mask, cap=cap)
        weights = jnp.where(sampled.mask, weights, 1.0)  # what the policy did not draw has nothing to correct
        old_logprobs = now
    ref_logprobs = score(state.ref_params, mask)
    if config.algorithm == "grpo":
        advantages = ops.grpo_advantages(sampled.rewards, sampled.group_ids, mask, valid=sampled.scorable)
        return Batch(sampled, mask, old_logprobs, advantages, ref_logprobs, weights=weights)
    token_rewards = ops.kl_shaped_rewards(sampled.rewards, old_logprobs, ref_logprobs, mask, beta=config.kl_coefficient)
    values = agent.values(state.params, sampled, config)
    advantages = ops.gae_advantages(token_rewards, values, mask, gamma=1.0, lam=1.0)
    whitened = ops.masked_whiten(advantages, mask)
    return Batch(sampled, mask, old_logprobs, whitened, ref_logprobs, advantages + values, values, weights)


def make_update(config: ConfigDict, agent: Agent, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """One turn of the algorithm, from what was sampled to the next state."""
    parts: dict[str, Any] = {name: config[name] for name in ("agg", "micro_batches", "mini_batches")}
    train_step = train.make_policy_step(make_loss(config, agent), optimizer, **parts)

    def update(state: TrainState, samples: tuple[Rollout, jax.Array]) -> tuple[TrainState, Metrics]:
        sampled, hops = samples
        state, metrics = train_step(state, make_batch(config, agent, state, sampled))
        mismatch = metrics.pop("first_ratio_error")
        informative = ops.dynamic_sampling_mask(sampled.rewards, sampled.group_ids, sampled.scorable)
        return dataclasses.replace(state, step=state.step + 1), {
            **metrics,
            **describe_rollout(sampled, hops, config),
            "reward": jnp.mean(sampled.rewards),
            # before the first update the ratio is 1 but for rounding: sampler and trainer are the same model
            "sampler_mismatch": mismatch,
            "informative_groups": jnp.mean(informative, dtype=jnp.float32),
            "tokens": jnp.sum(sampled.lengths),
        }

    return update


def programs(config: ConfigDict) -> dict[str, train.Program]:
    """What `experiments.plan` compiles: an update on a mini-batch, and a step of the sampler."""
    agent, optimizer = make_agent(config), make_optimizers(config)
    step = train.make_update(make_loss(config, agent), optimizer, agg=config.agg, micro_batches=config.micro_batches)
    return step_programs(config, agent, step, make_init(config, agent, optimizer))


def check_config(config: ConfigDict) -> None:
    """Raises ValueError for settings that do not go together."""
    if config.algorithm not in ("grpo", "ppo"):
        raise ValueError(f"algorithm must be 'grpo' or 'ppo', got {config.algorithm!r}")
    if config.algorithm == "grpo" and config.group_size < 2:
        raise ValueError(
            f"group_size={config.group_size} with algorithm='grpo': the baseline is the mean of a prompt's group, "
            "which needs at least 2 rollouts; raise group_size, or use algorithm='ppo'"
        )
    if config.prompts % config.mini_batches:
        raise ValueError(
            f"mini_batches={config.mini_batches} must divide prompts={config.prompts}: a group stays together"
        )
    if config.prompts // config.mini_batches % config.micro_batches:
        raise ValueError(
            f"micro_batches={config.micro_batches} must divide the {config.prompts // config.mini_batches} prompts "
            "of a mini-batch: a group stays together"
        )
    if config.warm_start.from_scratch and not isinstance(config.seed, int):
        raise ValueError(
            "warm_start.from_scratch trains one warm start, which all seeds share: run it once with one seed and "
            "pass its file as warm_start.weights"
        )


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Warm start, then sample, score and update until the steps are done, then the report."""
    check_config(config)
    world, agent = make_world(config), make_agent(config)
    reference = warm_start(config, agent.policy, log)
    optimizer, evaluate = make_optimizers(config), make_evaluation(config, agent)
    init = make_init(config, agent, optimizer)

    def held_out(world: World, state: TrainState) -> Metrics:
        return evaluate(world.env, world.test_tasks, state.params["policy"], state.ref_params)[0]

    state = distributed.loop(
        jax.tree_util.Partial(init, reference),
        make_update(config, agent, optimizer),
        make_sample,
        policy=lambda params: params["policy"],
        steps=config.steps,
        log=log,
        evaluate=jax.tree_util.Partial(held_out, world),
        evaluate_every=config.evaluate_every,
    )
    report(config, world, evaluate, state, log)


SHORT = {"steps": 40}  # an arm of a table: by then success has nearly levelled off


def _table(title: str, arms: dict[str, dict[str, Any]], claims: list[train.Claim]) -> train.Table:
    metrics = ["trained.success.2", "trained.success.1", "trained.kl", "trained.turns"]
    return train.Table(arms=arms, metrics=metrics, claims=claims, title=title)


TABLES = {
    "main": _table(
        "Search-R1 on held-out geography questions",
        arms={
            "warm_start": {"steps": 0},
            "grpo": SHORT,
            "ppo": SHORT | {"algorithm": "ppo", "prompts": 128, "group_size": 1},
            "grpo_no_mask": SHORT | {"mask_observations": False},
            "grpo_no_search": SHORT | {"search": False},
        },
        claims=[
            train.better("grpo", "warm_start"),
            train.better("grpo", "grpo_no_search"),
            train.better("grpo", "grpo_no_mask"),
            train.better("grpo", "grpo_no_mask", metric="trained.kl", lower=True),
        ],
    ),
    "turns": _table(
        "Search-R1 with one, two and three searches",
        arms={
            "one_search": SHORT | {"max_searches": 1},
            "two_searches": SHORT | {"max_searches": 2},
            "three_searches": SHORT | {"max_searches": 3},
        },
        claims=[train.better("two_searches", "one_search"), train.better("three_searches", "one_search")],
    ),
}
