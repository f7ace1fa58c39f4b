"""M-GRPO: a planner and the sub-agent that it calls, each trained on its own groups (arXiv 2511.13288).

The paper (Multi-Agent Deep Research: Training Multi-Agent Systems with M-GRPO, 2025) claims that two models trained
together beat a single agent, and a planner with a frozen sub-agent. Of the K rollouts of a question, rollout k makes
d_k calls:

    planner      R = 1 for a well-formed rollout with the right answer, 0.1 with a wrong one, 0 for a malformed one;
                 A = (R - mean_K) / (std_K + 1e-6), on all its turns
    sub-agent    r = 0 for a malformed call; else 1 if the planner's R is above 0.5 [our choice], 0.1 if not
    alignment    D calls of each rollout: a random D if there are more, random ones twice if there are fewer; none, D
                 empty ones [our choice]
                 A = (r - mean) / (std + 1e-6) over the K D aligned calls of the question
    losses       PPO-clip, 0.2 below and 0.28 above, no KL, token mean over each agent's own batch

The released code groups eight consecutive calls, whatever their question. Its trainers are two servers that exchange
samples by a store (as `jaxrl_llm.distributed.run_trainers` does by a `SampleStore`); here both updates are in one
program. The world is ours: sums of one to three values that only the sub-agent can look up. `single` sees the table.

    python -m experiments.sweep m_grpo --table=main --vmap-seeds
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree
from ml_collections import ConfigDict

from experiments.policy_optimization._training import (
    Parts,
    World,
    check_choice,
    draw_tasks,
    make_clip_step,
    make_optimizer,
    make_policy,
    play,
    read_curve,
    responses,
    warm_start,
)
from jaxrl_llm import ops, train
from jaxrl_llm.data.worlds import lookups
from jaxrl_llm.envs import SingleTurnEnv
from jaxrl_llm.models import Model
from jaxrl_llm.sampling import reset_context
from jaxrl_llm.types import Batch, Metrics, Params, Rollout, TrainState

NEEDS_SCALE = ("GAIA, XBench-DeepSearch and WebWalkerQA with two 30B models; no figures could be read",)


class Played(NamedTuple):
    """Episodes of both agents: R of them."""

    main: Rollout  # the planner's rows: all plans, then all answers
    main_ids: Int[Array, "2*R"]  # which episode
    rewards: Float[Array, "R"]
    right: Bool[Array, "R"]
    sub: Rollout | None  # the sub-agent's rows, MAX_CALLS for each episode; the first `counts` were called
    counts: Int[Array, "R"]
    format_ok: Bool[Array, "R C"]


def align_subtrajectories(
    counts: Int[Array, "K"], key: Key[Array, ""], *, size: int, max_count: int
) -> tuple[Int[Array, "K D"], Bool[Array, "K D"]]:
    """`size` of each rollout's own calls, at random, by their numbers in 0..counts-1: different ones as far as they
    go, then random ones again. A rollout without calls has none that are valid.

    Raises:
      ValueError: `size` below 1; outside jit, a count below 0 or above `max_count`.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if not isinstance(counts, jax.core.Tracer) and np.any((np.asarray(counts) < 0) | (np.asarray(counts) > max_count)):
        raise ValueError(f"counts must lie in 0..max_count={max_count}, got {counts}")
    order_key, again_key = jax.random.split(key)
    place = jnp.arange(max(size, max_count))
    own = place < counts[:, None]
    order = jnp.argsort(jnp.where(own, jax.random.uniform(order_key, own.shape), 2.0), axis=1)
    again = jax.random.randint(again_key, own.shape, 0, jnp.maximum(counts, 1)[:, None])
    index = jnp.where(own, order, again)[:, :size]
    valid = jnp.broadcast_to(counts[:, None] > 0, index.shape)
    return jnp.where(valid, index, 0), valid


def sub_rewards(
    main_rewards: Float[Array, "K"], format_ok: Bool[Array, "K D"], *, correct_value: float = 1.0, partial: float = 0.1
) -> Float[Array, "K D"]:
    """0 for a malformed call, else what its planner's success is worth."""
    outcome = jnp.where(main_rewards > 0.5, correct_value, partial)
    return jnp.where(format_ok, outcome[:, None], 0.0)


def lookup_world(config: ConfigDict) -> World:
    """Problems; demonstrations of planner, sub-agent, and an agent alone. Rewards are the page's."""

    def problems(seed: int, number: int) -> PyTree:
        return jax.tree.map(jnp.asarray, lookups.make_lookups(np.random.default_rng(seed), number))

    return World(
        SingleTurnEnv(lambda task, tokens, length: jnp.float32(0)),
        train_tasks=problems(1, config.world.train_problems),
        test_tasks=problems(2, config.world.test_problems),
        stop_sequences=[[lookups.EOS]],
        vocab_size=lookups.VOCAB_SIZE,
        demonstrate=lambda rng, number: lookups.demonstrate_lookups(
            rng, lookups.make_lookups(rng, number), wrong=config.world.wrong
        ),
    )


def as_tasks(tokens: Int[Array, "B L"], lengths: Int[Array, "B"] | None = None) -> dict[str, Array]:
    lengths = jnp.full(len(tokens), tokens.shape[1]) if lengths is None else lengths
    return {"prompt_tokens": tokens, "prompt_length": lengths}


def play_agents(
    config: ConfigDict, model: Model, params: dict[str, Params], world: World, tasks: PyTree, key: Key[Array, ""]
) -> Played:
    """An episode of each task: the planner's calls, the sub-agent's results, the planner's answer; or, `single`, one
    policy's answer."""
    ids, keys = jnp.arange(len(tasks["answer"])), jax.random.split(key, 3)
    question = tasks["prompt_tokens"], tasks["prompt_length"]
    if config.agents == "single":
        prompts = reset_context(tasks["table"], jnp.full(len(ids), lookups.TABLE_TOKENS), *question)
        main = play(config, model, params["main"], world, as_tasks(*prompts), keys[0], 1)
        answer, ok = lookups.read_value(*responses(main), lookups.ANSWER)
        right, no_calls = ok & (answer == tasks["answer"]), jnp.zeros((len(ids), lookups.MAX_CALLS), bool)
        return Played(main, ids, jnp.where(right, 1.0, 0.1 * ok), right, None, jnp.zeros_like(ids), no_calls)
    plan = play(config, model, params["main"], world, as_tasks(*question), keys[0], 1)
    calls, counts, planned = lookups.read_plan(*responses(plan))
    tables = jnp.repeat(tasks["table"], lookups.MAX_CALLS, axis=0)
    sub = play(
        config, model, params["sub"], world, as_tasks(lookups.look_up_prompts(tables, calls.ravel())), keys[1], 1
    )
    values, found = lookups.read_value(*responses(sub), lookups.RESULT)
    given = lookups.given_tokens(calls, jnp.where(found, values, lookups.UNKNOWN).reshape(calls.shape))
    told = reset_context(*question, given, 1 + 2 * counts)
    final = play(config, model, params["main"], world, as_tasks(*told), keys[2], 1)
    answer, answered = lookups.read_value(*responses(final), lookups.ANSWER)
    ok = planned & answered
    right = ok & (answer == tasks["answer"])
    main = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), plan, final)
    rewards = jnp.where(right, 1.0, 0.1 * ok)
    return Played(main, jnp.tile(ids, 2), rewards, right, sub, counts, found.reshape(calls.shape))


def sub_batch(config: ConfigDict, played: Played, groups: Int[Array, "R"], key: Key[Array, ""]) -> Batch:
    """The sub-agent's calls, aligned or all of them, with their advantages."""
    most = lookups.MAX_CALLS
    index = jnp.broadcast_to(jnp.arange(most), played.format_ok.shape)
    valid = index < played.counts[:, None]
    if config.aligned:
        index, valid = align_subtrajectories(played.counts, key, size=config.aligned, max_count=most)
    rewards = sub_rewards(played.rewards, jnp.take_along_axis(played.format_ok, index, axis=1))
    rows = (most * jnp.arange(len(index))[:, None] + index).ravel()
    sampled = jax.tree.map(lambda leaf: leaf[rows], played.sub)
    mask = sampled.mask & valid.ravel()[:, None]
    questions = jnp.repeat(groups, index.shape[1])
    advantages = ops.grpo_advantages(rewards.ravel(), questions, mask, valid=valid.ravel())
    return Batch(sampled, mask, sampled.logprobs, advantages)


def build(config: ConfigDict) -> Parts:
    """One turn of the algorithm: play, update the planner on its groups and the sub-agent on its own."""
    check_choice("agents", config.agents, ("both", "frozen_sub", "single"))
    world = lookup_world(config)
    model, optimizer = make_policy(config, world), make_optimizer(config)
    train_step = make_clip_step(config, model, optimizer)

    def update(state: TrainState, agent: str, batch: Batch) -> tuple[TrainState, Metrics]:
        own = dataclasses.replace(state, params={"policy": state.params[agent]}, opt_state=state.opt_state[agent])
        own, metrics = train_step(own, batch)
        params, opt_state = state.params | {agent: own.params["policy"]}, state.opt_state | {agent: own.opt_state}
        return dataclasses.replace(own, params=params, opt_state=opt_state), metrics

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        tasks, key = draw_tasks(config, world.train_tasks, state)
        tasks = jax.tree.map(lambda leaf: jnp.repeat(leaf, config.group_size, axis=0), tasks)
        groups = jnp.arange(len(tasks["answer"])) // config.group_size
        played = play_agents(config, model, state.params, world, tasks, key)
        main = played.main
        advantages = ops.grpo_advantages(played.rewards, groups, main.mask, rollout_ids=played.main_ids)
        start = state
        state, metrics = update(state, "main", Batch(main, main.mask, main.logprobs, advantages))
        if config.agents == "both":
            state, sub_metrics = update(state, "sub", sub_batch(config, played, groups, jax.random.fold_in(key, 1)))
            metrics["sub_grad_norm"] = sub_metrics["grad_norm"]
            skipped = state.skipped > start.skipped  # either update: two agents' counts in a row are one
            state = dataclasses.replace(state, skipped_in_row=(start.skipped_in_row + skipped) * skipped)
        return state, metrics | {"success": jnp.mean(played.right), "calls": jnp.mean(played.counts)}

    def init(reference: Params, seed: Array) -> TrainState:
        """Both agents begin as the same policy."""
        state = train.init_state({"policy": reference}, optimizer, seed)
        opt_state = {"main": state.opt_state, "sub": state.opt_state}
        return dataclasses.replace(state, params={"main": reference, "sub": reference}, opt_state=opt_state)

    return Parts(world, model, init, iteration)


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Trains; reports held-out success, and the spread of the sub-agent's gradient norms over their mean (or 0)."""
    world, model, init, iteration, *_ = build(config)

    def right(state: TrainState) -> Bool[Array, "N"]:
        return play_agents(config, model, state.params, world, world.test_tasks, jax.random.key(1)).right

    state = train.loop(
        jax.tree_util.Partial(init, warm_start(config, model, world)),
        iteration,
        steps=config.steps,
        log=log,
        evaluate=lambda state: {"success": jnp.mean(right(state), dtype=jnp.float32)},
        evaluate_every=config.evaluate_every,
    )
    log.outcomes("trained.success", train.fetch(train.over_seeds(right, config.seed)(state)).astype(float))
    success, calls, norms = (read_curve(config, log, name) for name in ("eval/success", "calls", "sub_grad_norm"))
    spread = norms.std(axis=-1) / np.maximum(norms.mean(axis=-1), 1e-12) if norms.size else np.zeros(success.shape[:-1])
    log.summary(
        {
            "warm_start": {"success": success[..., 0]},
            "trained": {"success": success[..., -1], "calls": calls[..., -1]},
            "mean": {"success": success.mean(axis=-1)},
            "sub_grad_variation": spread,
        }
    )


TABLES = {
    "main": train.Table(
        arms={
            "m_grpo": {},
            **{name: {"agents": name} for name in ("frozen_sub", "single")},
            "unaligned": {"aligned": 0},
        },
        metrics=["trained.success", "mean.success", "sub_grad_variation", "trained.calls", "warm_start.success"],
        claims=[
            train.better("m_grpo", "frozen_sub"),
            train.better("frozen_sub", "single"),
            train.better("m_grpo", "unaligned"),
            train.better("m_grpo", "unaligned", metric="sub_grad_variation", lower=True),
        ],
    ),
}
