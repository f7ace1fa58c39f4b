"""QwenLong-L1: phases of growing input length, and hard samples of earlier phases again (arXiv 2505.17667).

The paper (QwenLong-L1: Towards Long-Context Large Reasoning Models with Reinforcement Learning, 2025) finds that
training on long inputs at once is slow and unstable, and claims that a warm-up by SFT, phases of growing input length
and retrospective sampling by difficulty cure it.

    phases      phase k trains on samples of input length L_(k-1) < len <= L_k
    past        a share of each later phase's batch are earlier phases' samples, drawn in proportion to
                diff = 1 / (m + 1 / (2 G)), m the mean reward of the sample's last G rollouts [the cap is our choice,
                the share and the rule of the draw are from memory]
    reward      max(rule, judge): words of the one answer contained in the other, or a small model says "equivalent"
    loss        GRPO without KL and with token mean, clip 0.2, dynamic sampling (the authors' DAPO settings)

The world is ours: facts about facts in windows of 64 tokens, then of 192. Answers are single tokens, so that rule and
judge would agree; `docqa_reward` is for text. Without SFT the warm start has a quarter of the updates. The arm that
trains on long windows alone reads as many tokens in fewer steps.

    python -m experiments.sweep qwenlong_l1 --table=main --vmap-seeds
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from ml_collections import ConfigDict

from experiments.policy_optimization._long import describe_by, long_world
from experiments.policy_optimization._training import (
    Parts,
    describe_rollout,
    make_clip_step,
    make_optimizer,
    make_policy,
    play,
    train_policy,
)
from jaxrl_llm import ops, train
from jaxrl_llm.rewards import substring_match
from jaxrl_llm.rewards.qa import Unit
from jaxrl_llm.types import Batch, Metrics, Params, TrainState

NEEDS_SCALE = (
    "mean of seven long document question sets 65.6 -> 68.7 by SFT -> 70.7 by DAPO (32B); 64.2 -> 68.3 (14B)",
)
PHRASE = "the answer is"


def phase_schedule(lengths: Int[np.ndarray, "N"], limits: tuple[int, ...]) -> Int[np.ndarray, "N"]:
    """The phase of each sample: the first whose limit its input does not exceed.

    Raises:
      ValueError: limits that do not increase, a sample beyond the last, or a phase without samples.
    """
    if not limits or list(limits) != sorted(set(limits)):
        raise ValueError(f"limits must increase from phase to phase, got {limits}")
    lengths = np.asarray(lengths)
    phases = np.searchsorted(limits, lengths)
    if phases.max(initial=0) >= len(limits):
        raise ValueError(f"an input has {lengths.max()} tokens, beyond the last of limits={limits}; raise it")
    empty = sorted(set(range(len(limits))) - set(phases.tolist()))
    if empty:
        raise ValueError(f"no sample belongs to phase {empty[0]} of limits={limits}; leave the phase out")
    return phases.astype(np.int32)


def retrospective_weights(
    mean_reward: Float[Array, "N"], *, group_size: int, in_past: Bool[Array, "N"]
) -> Float[Array, "N"]:
    """Difficulty of past samples, 1 over their mean reward, capped for those that were never solved; 0 for others.

    Raises:
      ValueError: outside `jit`, a past sample's mean reward outside [0, 1].
    """
    if not isinstance(mean_reward, jax.core.Tracer):
        outside = np.asarray(in_past) & ~((np.asarray(mean_reward) >= 0) & (np.asarray(mean_reward) <= 1))
        if outside.any():
            raise ValueError(f"mean_reward must lie in [0, 1], got {np.asarray(mean_reward)[outside]}")
    return jnp.where(in_past, 1 / (jnp.where(in_past, mean_reward, 1.0) + 1 / (2 * group_size)), 0.0)


def sample_phase(
    key: Key[Array, ""],
    phase_of: Int[Array, "N"],
    weights: Float[Array, "N"],
    phase: Int[Array, ""],
    n: int,
    *,
    past_fraction: float,
) -> Int[Array, "n"]:
    """`n` samples: a share of them past ones in proportion to their weights, the others evenly from the phase. None
    comes twice within its part; without weights all are from the phase."""
    now_key, past_key = jax.random.split(key)
    total, num_past = phase_of.shape[0], round(past_fraction * n)
    now = jax.random.choice(now_key, total, (n,), replace=False, p=ops.score_probs(weights * 0, phase_of == phase))
    past = ops.score_probs(weights, weights > 0, transform="proportional")
    drawn = jax.random.choice(past_key, total, (num_past,), replace=False, p=past)
    enough = jnp.sum(weights > 0) >= num_past
    return now.at[n - num_past :].set(jnp.where(enough, drawn, now[n - num_past :]))


def hybrid_reward(rule: Float[Array, "B"], judge: Float[Array, "B"]) -> Float[Array, "B"]:
    """Right if either says so."""
    return jnp.maximum(rule, judge)


def docqa_reward(
    text: str, gold: str, *, judge: Callable[[str, str], float] | None = None, containment: Unit = "word"
) -> float:
    """The hybrid reward of a response to a question on a document.

    The answer is what follows the last "the answer is" behind the last closing think tag, without asterisks and final
    dots; without tag, phrase or answer the reward is 0. `gold` may have the phrase too. "char" is the authors' form of
    containment, in which 4 matches 42. The judge, a small model asked whether two answers are equivalent, is only asked
    where the rule fails.
    """
    _, thought, response = text.rpartition("</think>")
    answer, gold = _behind_phrase(response), _behind_phrase(gold) or gold
    if not thought or not answer:
        return 0.0
    rule = substring_match(answer, [gold], unit=containment, two_way=True)
    return rule if rule or judge is None else max(rule, judge(answer, gold))


def _behind_phrase(text: str) -> str:
    _, phrase, answer = text.replace("*", "").rpartition(PHRASE)
    return re.sub(r"\.+$", "", answer.strip()).strip() if phrase else ""


def build(config: ConfigDict) -> Parts:
    """One turn of the algorithm: draw from the phase and from the past, sample, record the rewards, update."""
    world = long_world(config)
    model, optimizer = make_policy(config, world), make_optimizer(config)
    train_step = make_clip_step(config, model, optimizer)
    phase_of = jnp.asarray(phase_schedule(np.asarray(world.train_tasks["prompt_length"]), tuple(config.limits)))

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), state.seed), state.step)
        draw_key, key = jax.random.split(key)
        phase = jnp.sum(state.step >= jnp.array(config.phase_starts)) - 1
        past = (phase_of < phase) & (state.memory >= 0)
        weights = retrospective_weights(state.memory, group_size=config.group_size, in_past=past)
        chosen = sample_phase(draw_key, phase_of, weights, phase, config.prompts, past_fraction=config.past_fraction)
        tasks = jax.tree.map(lambda leaf: leaf[chosen], world.train_tasks)
        sampled = play(config, model, state.params["policy"], world, tasks, key, config.group_size)
        mask = sampled.mask & sampled.scorable[:, None]
        informative = ops.dynamic_sampling_mask(sampled.rewards, sampled.group_ids, sampled.scorable)
        mask &= informative[:, None]
        advantages = ops.grpo_advantages(sampled.rewards, sampled.group_ids, mask, valid=sampled.scorable)
        memory = state.memory.at[chosen].set(jnp.mean(sampled.rewards.reshape(-1, config.group_size), axis=1))
        state, metrics = train_step(state, Batch(sampled, mask, sampled.logprobs, advantages))
        read = {"prompt_tokens": jnp.mean(sampled.prompt_lengths, dtype=jnp.float32)}
        return dataclasses.replace(state, memory=memory), metrics | describe_rollout(sampled) | read

    def init(reference: Params, seed: Array) -> TrainState:
        rewards = jnp.full(phase_of.shape, -1.0)  # of each sample's last rollouts; not yet known
        return train.init_state({"policy": reference}, optimizer, seed, memory=rewards)

    return Parts(world, model, init, iteration, describe_by)


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Warm start, then the phases, then the report."""
    train_policy(config, log, build(config))


LONG_ONLY = {"phase_starts": (-1, 0), "past_fraction": 0.0, "steps": 40}
NO_SFT = {"warm_start.steps": 50}
TABLES = {
    "main": train.Table(
        arms={
            "retrospective": {},
            "phased": {"past_fraction": 0.0},
            "long_only": LONG_ONLY,
            "no_sft": NO_SFT,
        },
        metrics=[
            "trained.success_192",
            "trained.success_64",
            "mean.entropy",
            "mean.train_success",
            "warm_start.success_192",
        ],
        claims=[
            train.better("phased", "long_only"),
            train.better("retrospective", "phased", metric="mean.entropy"),
            train.better("retrospective", "phased"),
            train.better("retrospective", "no_sft", metric="mean.train_success"),
        ],
    ),
}
