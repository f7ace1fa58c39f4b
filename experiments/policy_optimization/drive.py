"""DRIVE: first all problems with few rollouts, then again and again the hardest with many (arXiv 2511.06307).

The paper (Data Curation Best Practices for Reinforcement Learning with Verifiable Reward in Competitive Code
Generation, 2025) claims that a 32B model reaches the best of its size by curation alone. With plain GRPO problems of
middling accuracy improve fastest and the hardest stall, as a group teaches only where it has both outcomes:

    chance of a mixed group    1 - p^G - (1 - p)^G        p = 0.02: 0.149 for G = 8, 0.726 for G = 64

    fine-tuning    on demonstrations, the hard ones seen twice ("arena": kept if a model of another part fails on them)
    stage 1        GRPO on all problems, 8 rollouts each: entropy rises
    stage 2        in phases; at the start of each the N_k problems with the lowest pass rate of those active so far go
                   on, by their last rollouts, ties by index; many rollouts each

A reward is 1 where every test passes, else 0 [our reading]. Both stages take as many rollouts a step [our choice]. A
problem that was not drawn since keeps its last rate, at first that of 8 rollouts before training [our choice]. Without
phases stage 1 is the whole run. The world is ours: stack programs from examples, the hard ones mostly shown wrong. So
small a policy learns problems and no programming: the arena keeps all, stage 2 forgets stage 1's easy problems if any.

    python -m experiments.sweep drive --table=main --vmap-seeds
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree
from ml_collections import ConfigDict

from experiments.policy_optimization._training import (
    Parts,
    World,
    check_choice,
    choose_problems,
    describe_rollout,
    make_clip_step,
    make_optimizer,
    make_policy,
    play,
    train_policy,
    warm_start,
)
from jaxrl_llm import ops, train
from jaxrl_llm.data.worlds import stack_programs
from jaxrl_llm.envs import SingleTurnEnv
from jaxrl_llm.models import Model
from jaxrl_llm.types import Batch, Metrics, Params, Rollout, TrainState

KIND = "pipeline"
NEEDS_SCALE = ("LiveCode 08-11 pass@1 0.602 -> 0.625 -> 0.699 by the two stages, 0.506 on all hard problems at once",)
HARD = stack_programs.LEVELS.index("hard")


@dataclasses.dataclass(frozen=True)
class PhaseSchedule:
    """How many problems are kept in each phase, and how many steps it has.

    Raises:
      ValueError: not as many of both, a number below 1, or problems that come back.
    """

    keep: tuple[int, ...]
    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.keep) != len(self.steps) or min((*self.keep, *self.steps), default=1) < 1:
            raise ValueError(f"each phase needs keep and steps of at least 1, got {self.keep} and {self.steps}")
        if list(self.keep) != sorted(self.keep, reverse=True):
            raise ValueError(f"a phase keeps at most what the one before it kept, got keep={self.keep}")

    def starts(self, first: int) -> list[tuple[int, int]]:
        """(step, keep) of each phase, if the first begins at step `first`."""
        return [(first + sum(self.steps[:phase]), keep) for phase, keep in enumerate(self.keep)]


def hard_focus(pass_rate: Float[Array, "N"], active: Bool[Array, "N"], *, keep: int) -> Bool[Array, "N"]:
    """The `keep` active problems with the lowest pass rate, of equal ones the first.

    Raises:
      ValueError: `keep` below 1, or outside jit above the number of active problems or with a rate that is not known.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    if not isinstance(pass_rate, jax.core.Tracer) and not isinstance(active, jax.core.Tracer):
        unknown = np.flatnonzero(np.isnan(pass_rate) & np.asarray(active))
        if unknown.size:
            raise ValueError(f"the pass rate of problem {unknown[0]} is NaN: roll it out before it is chosen or not")
        if keep > np.sum(active):
            raise ValueError(f"keep={keep} is more than the {np.sum(active)} active problems")
    ids, weight = ops.top_k_select(-pass_rate, active, k=keep)
    return jnp.zeros(active.shape, bool).at[ids].set(weight > 0)


def duplicate_hard(hard: Bool[np.ndarray, "N"], *, factor: int = 2) -> Int[np.ndarray, "M"]:
    """Indices of all samples, those of hard ones `factor` times."""
    return np.repeat(np.arange(len(hard)), np.where(hard, factor, 1))


def arena_filter(
    folds: Sequence[Int[np.ndarray, "F"]],
    train_fn: Callable[[Int[np.ndarray, "F"]], Any],
    solve_fn: Callable[[Any, Int[np.ndarray, "F"]], Bool[np.ndarray, "F"]],
) -> Int[np.ndarray, "M"]:
    """Indices of what a model that was trained on the fold before fails on; the first fold meets the model of the last.

    Raises:
      ValueError: fewer than 2 folds.
    """
    if len(folds) < 2:
        raise ValueError(f"a fold is filtered by the model of another: expected at least 2 folds, got {len(folds)}")
    kept = [fold[~solve_fn(train_fn(folds[index - 1]), fold)] for index, fold in enumerate(folds)]
    return np.sort(np.concatenate(kept))


def program_world(config: ConfigDict) -> tuple[World, Callable[[Int[np.ndarray, "M"]], World]]:
    """Three in four problems to train on, all to test on, marked; and `restrict(indices)`, the world whose
    demonstrations are of some training problems."""
    problems = stack_programs.make_program_problems(config.world.modulus)
    number = len(problems["level"])
    training = np.sort(np.random.default_rng(1).permutation(number)[: number * 3 // 4])
    to_train = jax.tree.map(lambda leaf: leaf[training], problems)
    held_out = np.isin(np.arange(number), training, invert=True)

    def restrict(indices: Int[np.ndarray, "M"]) -> World:
        def demonstrate(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
            chosen = rng.choice(indices, size=rows)
            shown = jax.tree.map(lambda leaf: leaf[chosen], to_train)
            return stack_programs.demonstrate_programs(rng, shown, wrong=tuple(config.world.wrong))

        return World(
            SingleTurnEnv(stack_programs.program_reward),
            train_tasks=jax.tree.map(jnp.asarray, to_train),
            test_tasks=jax.tree.map(jnp.asarray, problems | {"held_out": held_out}),
            stop_sequences=[[stack_programs.EOS]],
            vocab_size=stack_programs.FIRST_NUMBER + config.world.modulus,
            demonstrate=demonstrate,
        )

    twice = duplicate_hard(to_train["level"] == HARD, factor=2 if config.sft == "doubled" else 1)
    return restrict(twice), restrict


def filtered_world(config: ConfigDict, model: Model) -> World:
    """The world whose demonstrations have passed the arena."""
    world, restrict = program_world(config)
    number = len(world.train_tasks["level"])

    @jax.jit
    def solve(params: Params) -> Array:
        return play(config, model, params, world, world.train_tasks, jax.random.key(0), 4).rewards.reshape(number, 4)

    def solved(params: Params, indices: Int[np.ndarray, "F"]) -> Bool[np.ndarray, "F"]:
        return np.asarray(solve(params)).mean(axis=1)[indices] > 0.5

    folds = np.array_split(np.random.default_rng(0).permutation(number), config.folds)
    return restrict(arena_filter(folds, lambda fold: warm_start(config, model, restrict(fold)), solved))


def build(config: ConfigDict) -> Parts:
    """One turn of the algorithm: at a phase's start choose the hardest; sample few or many of each, record, update."""
    check_choice("sft", config.sft, ("doubled", "plain", "filtered"))
    phases = PhaseSchedule(tuple(config.phases.keep), tuple(config.phases.steps))
    if config.prompts % config.focus_prompts:
        raise ValueError(f"config.focus_prompts={config.focus_prompts} must divide prompts={config.prompts}")
    world = program_world(config)[0]
    model, optimizer = make_policy(config, world), make_optimizer(config)
    train_step = make_clip_step(config, model, optimizer)
    rows = jnp.arange(config.prompts * config.group_size)

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        active, rate, counts = state.memory
        latest = jnp.where(counts[1] > 0, counts[0] / jnp.maximum(counts[1], 1), rate)
        for start, keep in phases.starts(config.stage_1_steps):
            now = state.step == start
            active = jnp.where(now, hard_focus(latest, active, keep=keep), active)
            rate, counts = jnp.where(now, latest, rate), jnp.where(now, 0, counts)
        problems, key = choose_problems(config, world.train_tasks, state, active / jnp.sum(active))
        focus = (state.step >= config.stage_1_steps) & bool(phases.keep)
        few = len(rows) // config.focus_prompts
        groups = jnp.where(focus, rows // few, rows // config.group_size)
        tasks = jax.tree.map(lambda leaf: leaf[problems[groups]], world.train_tasks)
        sampled = play(config, model, state.params["policy"], world, tasks, key, 1)
        sampled = dataclasses.replace(sampled, group_ids=groups)

        advantages = ops.grpo_advantages(sampled.rewards, groups, sampled.mask)
        mixed = jnp.mean(ops.dynamic_sampling_mask(sampled.rewards, groups), dtype=jnp.float32)
        counts = counts.at[:, problems[groups]].add(jnp.stack([sampled.rewards, jnp.ones(len(rows))]))
        state, metrics = train_step(state, Batch(sampled, sampled.mask, sampled.logprobs, advantages))
        metrics |= describe_rollout(sampled) | {"mixed_groups": mixed, "active": jnp.sum(active)}
        return dataclasses.replace(state, memory=(active, rate, counts)), metrics

    def init(reference: Params, seed: Array) -> TrainState:
        number = len(world.train_tasks["level"])
        tried = play(config, model, reference, world, world.train_tasks, jax.random.key(3), 8)
        rate = jnp.mean(tried.rewards.reshape(number, 8), axis=1)
        memory = (jnp.ones(number, bool), rate, jnp.zeros((2, number)))
        return train.init_state({"policy": reference}, optimizer, seed, memory=memory)

    return Parts(world, model, init, iteration, describe)


def describe(sampled: Rollout, tasks: PyTree) -> Metrics:
    """Success on the hard and the easy problems that are trained on, and on all that are held out."""
    parts = {name: (tasks["level"] == level) & ~tasks["held_out"] for name, level in (("hard", HARD), ("easy", 0))}
    parts["held_out"] = tasks["held_out"]
    return describe_rollout(sampled) | {f"success_{k}": ops.masked_mean(sampled.rewards, v) for k, v in parts.items()}


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Fine-tuning, then both stages, then the report."""
    parts = build(config)
    if config.sft == "filtered":
        parts = parts._replace(world=filtered_world(config, parts.model))
    train_policy(config, log, parts)


STAGE_1: dict[str, Any] = {"phases.keep": (), "phases.steps": ()}
NOTHING = STAGE_1 | {"steps": 0}
TABLES = {
    "main": train.Table(
        arms={
            "both_stages": {},
            "uniform": STAGE_1,
            "stage_1_only": STAGE_1 | {"steps": 30},
            "stage_2_only": {"stage_1_steps": 0, "phases.keep": (60, 40, 20), "phases.steps": (35, 25, 15)},
            "mixed": {"phases.keep": (224,), "phases.steps": (45,)},
            "fine_tuned": NOTHING,
        },
        metrics=["trained.success_hard", "trained.success_easy", "trained.success_held_out", "trained.entropy"],
        claims=[
            train.better("both_stages", "stage_2_only"),
            train.better("stage_2_only", "fine_tuned"),
            train.better("both_stages", "uniform"),
            train.better("both_stages", "mixed"),
            train.better("both_stages", "stage_2_only", metric="trained.success_easy"),
            train.better("stage_1_only", "fine_tuned", metric="trained.entropy"),
        ],
    ),
    "fine_tuning": train.Table(
        arms={name: NOTHING | {"sft": name} for name in ("doubled", "plain", "filtered")},
        metrics=["trained.success", "trained.success_hard", "trained.success_easy"],
        seeds=1,  # nothing is drawn by the seed before training
        claims=[train.better("doubled", "plain"), train.better("doubled", "filtered")],
    ),
}
