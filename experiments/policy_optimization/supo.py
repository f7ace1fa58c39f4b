"""SUPO: an episode longer than the context is cut by summaries, and all its pieces share its advantage (2510.06727).

The paper (Scaling LLM Multi-turn RL with End-to-end Summarization-based Context Management, 2025) claims more success
than GRPO at the same or a smaller window, and that more rounds of summaries at test time than in training help more.
When the context is nearly full the policy writes a summary, and goes on from prompt and summary alone. As contexts
follow from what was written, the gradient of an episode is the sum of its pieces':

    A           (R - mean_group R) / (std_group R + 1e-6) over EPISODES, on all pieces of the episode [std: our choice]
    overlong    an episode that ends at a limit without an answer counts in the mean, and is masked after it
    loss        PPO-clip over the tokens of all pieces, also those of summaries; token mean [our choice], or
                `loss_norm="rollout"`: the mean over an episode's tokens, then over episodes

The world is ours: a ledger of 20 updates, of which a window of 32 tokens holds four. `truncate` starts the next context
with the newest updates instead of the summary.

    python -m experiments.sweep supo --table=main --vmap-seeds
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree
from ml_collections import ConfigDict

from experiments.policy_optimization._training import (
    Parts,
    World,
    check_choice,
    draw_tasks,
    init_policy,
    make_clip_step,
    make_optimizer,
    make_policy,
    play,
    train_policy,
)
from jaxrl_llm import ops, train
from jaxrl_llm.data.worlds import updates
from jaxrl_llm.models import Model
from jaxrl_llm.types import Batch, Metrics, Params, Rollout, TrainState

NEEDS_SCALE = ("CodeGym +3.2 points at 4K instead of 32K; BrowseComp-Plus +14.0, and up to 7.0 more with more rounds",)


class Pieces(NamedTuple):
    """Episodes: a row of the rollout for each piece that there could be, those of an episode side by side."""

    rollout: Rollout  # the mask is false in rows after the end of their episode
    rewards: Float[Array, "R"]
    finished: Bool[Array, "R"]  # with an answer
    num_pieces: Int[Array, "R"]  # that took place
    rollout_ids: Int[Array, "B"]
    summaries: Bool[Array, "B T"]  # tokens of summaries


def update_world(config: ConfigDict) -> World:
    """Ledgers, longer ones to test on if the config says so, and demonstrations cut to the window."""
    sizes = config.world

    def ledgers(rng: np.random.Generator, number: int, length: int = sizes.updates) -> dict[str, np.ndarray]:
        return updates.make_ledgers(rng, number, updates=length)

    # a ledger is several sequences, or one long one
    return World(
        updates.UpdatesEnv(config.max_length),
        train_tasks=jax.tree.map(jnp.asarray, ledgers(np.random.default_rng(1), sizes.train_problems)),
        test_tasks=jax.tree.map(
            jnp.asarray, ledgers(np.random.default_rng(2), sizes.test_problems, sizes.test_updates)
        ),
        stop_sequences=updates.STOP_SEQUENCES,
        vocab_size=updates.VOCAB_SIZE,
        demonstrate=lambda rng, number: updates.demonstrate_updates(
            rng, ledgers(rng, -(-number // 4)), window=config.max_length, max_summaries=sizes.updates, wrong=sizes.wrong
        ),
    )


def play_pieces(
    config: ConfigDict, model: Model, policy: Params, world: World, tasks: PyTree, key: jax.Array, max_summaries: int
) -> Pieces:
    """An episode of each task, piece after piece, in at most `max_summaries + 1` contexts."""
    width = config.max_turn_tokens
    fixed = {name: tasks[name] for name in ("updates", "asked", "answer")}
    # room for a summary of the policy's, which may be longer than the first balances
    memory = jnp.pad(tasks["memory"], ((0, 0), (0, width - tasks["memory"].shape[1])))
    start = {"memory": memory} | {name: tasks[name] for name in ("memory_length", "seen", "open")}

    def piece(state: dict[str, Array], key: jax.Array) -> tuple[dict[str, Array], Any]:
        sampled = play(config, model, policy, world, fixed | state, key, 1)
        place = jnp.arange(config.max_length)
        shown = ~sampled.mask & (place >= sampled.prompt_lengths[:, None]) & (place < sampled.lengths[:, None])
        asked = jnp.any(shown & (sampled.tokens == updates.ASK), axis=1)
        ended = state["open"] & ~sampled.truncated
        summarized = ended & jnp.any(shown & (sampled.tokens == updates.SUMMARIZE), axis=1)

        last_turn = sampled.turn_ids == (jnp.sum(sampled.turn_mask, axis=1) - 1)[:, None]
        columns = jnp.argmax(last_turn, axis=1)[:, None] + jnp.arange(width)
        memory = sampled.tokens.at[jnp.arange(len(asked))[:, None], columns].get(mode="fill", fill_value=0)
        is_account = (sampled.tokens >= updates.FIRST_ACCOUNT) & (sampled.tokens < updates.FIRST_BALANCE)
        seen = state["seen"] + jnp.sum(shown & is_account, axis=1)
        length = jnp.sum(last_turn, axis=1)
        if config.memory == "truncate":
            newest = jnp.maximum(seen[:, None] - updates.ACCOUNTS + jnp.arange(updates.ACCOUNTS), 0)
            memory = jnp.take_along_axis(tasks["updates"], newest[:, :, None], axis=1).reshape(len(seen), -1)
            memory = (
                jnp.pad(memory, ((0, 0), (0, width - memory.shape[1]))).at[:, 2 * updates.ACCOUNTS].set(updates.EOS)
            )
            length = jnp.full_like(length, updates.SUMMARY_TOKENS)
        next_state = {"memory": memory, "memory_length": length, "seen": seen, "open": summarized}
        mask = sampled.mask & state["open"][:, None]
        sampled = dataclasses.replace(sampled, mask=mask, rewards=jnp.where(ended, sampled.rewards, 0.0))
        return next_state, (sampled, ended & asked, state["open"], mask & last_turn & summarized[:, None])

    keys = jax.random.split(key, max_summaries + 1)
    _, (stacked, finished, took_place, summaries) = jax.lax.scan(piece, start, keys)
    rewards = jnp.sum(stacked.rewards, axis=0)
    episodes, pieces = rewards.shape[0], max_summaries + 1
    rows = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:]), (stacked, summaries))
    ids, order = jnp.repeat(jnp.arange(episodes), pieces), jnp.tile(jnp.arange(pieces), episodes)
    rollout = dataclasses.replace(rows[0], rollout_ids=ids, row_of_episode=order)
    return Pieces(rollout, rewards, jnp.any(finished, axis=0), jnp.sum(took_place, axis=0), ids, rows[1])


def piece_advantages(
    rewards: Float[Array, "R"],
    group_ids: Int[Array, "R"],
    rollout_ids: Int[Array, "B"],
    mask: Bool[Array, "B T"],
    finished: Bool[Array, "R"],
    *,
    mask_unfinished: bool = True,
    mask_from_baseline: bool = False,
) -> Float[Array, "B T"]:
    """Advantages of episodes on the tokens of all their pieces; 0 for one without an answer (`mask_unfinished`), which
    `mask_from_baseline` leaves out of the group's mean and deviation too."""
    if mask_unfinished:
        mask = mask & finished[rollout_ids][:, None]
    valid = finished if mask_from_baseline else None
    return ops.grpo_advantages(rewards, group_ids, mask, rollout_ids=rollout_ids, valid=valid)


def rollout_weights(mask: Bool[Array, "B T"], rollout_ids: Int[Array, "B"], num_rollouts: int) -> Float[Array, "B T"]:
    """Weights with which a token mean is `agg="rollout"`, the mean over an episode's tokens and then over episodes."""
    counts = jax.ops.segment_sum(jnp.sum(mask, axis=1, dtype=jnp.float32), rollout_ids, num_segments=num_rollouts)
    scale = jnp.sum(counts) / jnp.maximum(jnp.sum(counts > 0), 1)
    return jnp.where(mask, scale / jnp.maximum(counts, 1)[rollout_ids][:, None], 0.0)


def build(config: ConfigDict) -> Parts:
    """One turn of the algorithm: episodes in pieces, advantages by episode, an update on the pieces."""
    check_choice("memory", config.memory, ("summary", "truncate"))
    check_choice("loss_norm", config.loss_norm, ("token", "rollout"))
    world = update_world(config)
    model, optimizer = make_policy(config, world), make_optimizer(config)
    train_step = make_clip_step(config, model, optimizer)
    episodes = config.prompts * config.group_size

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        tasks, key = draw_tasks(config, world.train_tasks, state)
        tasks = jax.tree.map(lambda leaf: jnp.repeat(leaf, config.group_size, axis=0), tasks)
        played = play_pieces(config, model, state.params["policy"], world, tasks, key, config.max_summaries)
        sampled, ids = played.rollout, played.rollout_ids
        groups = jnp.arange(episodes) // config.group_size
        mask = sampled.mask & (played.finished | (not config.mask_unfinished))[ids][:, None]
        if config.memory == "truncate" or not config.train_summaries:
            mask &= ~played.summaries
        options = {"mask_unfinished": config.mask_unfinished, "mask_from_baseline": config.mask_from_baseline}
        advantages = piece_advantages(played.rewards, groups, ids, mask, played.finished, **options)
        weights = rollout_weights(mask, ids, episodes) if config.loss_norm == "rollout" else None
        batch = Batch(sampled, mask, sampled.logprobs, advantages, weights=weights)
        state, metrics = train_step(state, batch)
        return state, metrics | {
            "success": jnp.mean(played.rewards),
            "unfinished": 1 - jnp.mean(played.finished, dtype=jnp.float32),
            "pieces": jnp.mean(played.num_pieces, dtype=jnp.float32),
            "response_tokens": jnp.sum(sampled.mask) / episodes,
        }

    def play_test(policy: Params) -> Rollout:
        """The last piece of each episode, which has its answer."""
        played = play_pieces(config, model, policy, world, world.test_tasks, jax.random.key(1), config.test_summaries)
        last = jnp.arange(len(played.rewards)) * (config.test_summaries + 1) + played.num_pieces - 1
        return jax.tree.map(lambda leaf: leaf[last], played.rollout)

    def describe(sampled: Rollout, tasks: PyTree) -> Metrics:
        assert sampled.row_of_episode is not None  # play_test has it
        asked = jnp.any((sampled.tokens == updates.ASK) & ~sampled.mask, axis=1)
        return {
            "success": jnp.mean(sampled.rewards),
            "unfinished": 1 - jnp.mean(asked & ~sampled.truncated, dtype=jnp.float32),
            "pieces": 1 + jnp.mean(sampled.row_of_episode, dtype=jnp.float32),
        }

    return Parts(world, model, init_policy(config, optimizer), iteration, describe, play_test)


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Warm start, then sample, score and update until the steps are done, then the report."""
    train_policy(config, log, build(config))


LONG: dict[str, Any] = {"world.test_updates": 40}
TABLES = {
    "main": train.Table(
        arms={
            "supo": {},
            "full_window": {"max_length": 84, "max_turns": 26, "max_summaries": 0, "test_summaries": 0},
            "truncate": {"memory": "truncate"},
            "untrained_summaries": {"train_summaries": False},
            "no_overlong_mask": {"mask_unfinished": False},
        },
        metrics=["trained.success", "mean.success", "trained.unfinished", "trained.pieces", "warm_start.success"],
        claims=[
            train.better("supo", "truncate"),
            train.better("supo", "untrained_summaries"),
            train.better("supo", "full_window", by=-0.1),
            train.better("no_overlong_mask", "supo", metric="trained.unfinished"),
        ],
    ),
    "long": train.Table(
        arms={"same_rounds": LONG, "more_rounds": LONG | {"test_summaries": 11}},
        title="Tested on ledgers of 40 updates",
        metrics=["trained.success", "trained.unfinished", "warm_start.success"],
        claims=[train.better("more_rounds", "same_rounds")],
    ),
}
