"""Agents of many turns: small worlds first, rewards of turns, PPO, GRPO or RLOO, some imitation (arXiv 2510.01132).

The paper (A Practitioner's Guide to Multi-turn Agentic Reinforcement Learning, 2025) claims that what is learned in
simple environments carries over to harder ones, that rewards of turns speed training up, how much depending on the
algorithm, and that for a fixed budget some imitation before is best. With d_k the rise of the score in turn k:

    dense       d_k / n on the turn's last token; n = turns with d_k > 0 if the episode is won, else the highest score
    single      1 on the last token of an episode that is won
    PPO         GAE over tokens (gamma 1) without observations, a critic, whitened
    GRPO, RLOO  the sum of the episode's rewards against its group's
    KL          beta (logprobs - ref_logprobs) off each token's reward, against the policy before training

A win in which no turn gained would get 0: `win_bonus` puts 1 on its last turn [our choice]. The world is ours: houses
of w rooms with o objects and quests of q steps. The table `imitation` divides a budget of 7,680 episodes, of which a
demonstration costs ten [our choice].

    python -m experiments.sweep meow_tea_taro --table=rewards --vmap-seeds
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
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
    score,
    start_params,
    train_policy,
)
from jaxrl_llm import ops, train
from jaxrl_llm.envs import RoomsEnv, rooms
from jaxrl_llm.types import Batch, Metrics, Params, Rollout, TrainState

NEEDS_SCALE = (
    "TextWorld w2-o3-q4 97% and w4-o6-q8 94% (1.5B, PPO); ALFWorld 74% (7B, imitation and PPO); SWE-Gym 22% (8B, GRPO)",
)


def split_win_rewards(
    turn_rewards: Float[Array, "B K"],
    turn_mask: Bool[Array, "B K"],
    won: Bool[Array, "B"],
    max_score: Float[Array, "B"],
    *,
    win_bonus: bool = False,
) -> Float[Array, "B K"]:
    """Gains of turns, divided by how many there were if the episode is won and by the highest score if not.

    With `win_bonus`, a win in which no turn gained has 1 on its last turn.

    Raises:
      ValueError: outside jit, an episode that is won without a turn.
    """
    if not isinstance(won, jax.core.Tracer) and np.any(np.asarray(won) & ~np.any(np.asarray(turn_mask), axis=1)):
        raise ValueError("an episode is won in which turn_mask has no turn; give the turns that took place")
    gains = jnp.sum(turn_mask & (turn_rewards > 0), axis=1)
    divisor = jnp.maximum(jnp.where(won, gains, max_score), 1)
    rewards = jnp.where(turn_mask, turn_rewards / divisor[:, None], 0.0)
    bonus = jnp.where(won & (gains == 0) & win_bonus, 1.0, 0.0)
    return ops.add_outcome(rewards, bonus, turn_mask)


def budget_split(total: int, *, demo_cost: int, ratio: float) -> tuple[int, int]:
    """How many demonstrations, and how many episodes of training, a budget in episodes pays for."""
    if not 0 <= ratio <= 1 or demo_cost < 1:
        raise ValueError(f"ratio={ratio} must lie in [0, 1] and demo_cost={demo_cost} be at least 1")
    demos = int(total * ratio) // demo_cost
    return demos, total - demos * demo_cost


def rooms_world(config: ConfigDict) -> World:
    """Houses of the config's sizes, others to test on, and `config.demos` demonstrations to start from."""
    sizes, test = dict(config.world.sizes), dict(config.world.test)
    env = RoomsEnv(max(sizes["objects"], test["objects"]), max(sizes["quest"], test["quest"]))

    @functools.cache
    def shown() -> dict[str, np.ndarray]:
        limits = {"max_turns": config.max_turns, "max_length": config.max_length, "wrong": config.world.wrong}
        show = jax.jit(functools.partial(rooms.demonstrate_rooms, env, **limits))
        return jax.device_get(show(rooms.room_tasks(config.demos, **sizes), jax.random.key(3)))

    def demonstrate(rng: np.random.Generator, number: int) -> dict[str, np.ndarray]:
        rows = rng.integers(config.demos, size=number)
        return {name: array[rows] for name, array in shown().items()}

    return World(
        env,
        train_tasks=rooms.room_tasks(config.world.train_problems, **sizes),
        test_tasks=rooms.room_tasks(config.world.test_problems, **test),
        stop_sequences=rooms.STOP_SEQUENCES,
        vocab_size=rooms.VOCAB_SIZE,
        demonstrate=demonstrate,
    )


def build(config: ConfigDict) -> Parts:
    """One turn of the algorithm: play houses, put rewards on turns, update."""
    check_choice("algorithm", config.algorithm, ("ppo", "grpo", "rloo"))
    check_choice("reward", config.reward, ("dense", "single"))
    world, critic = rooms_world(config), config.algorithm == "ppo"
    scored = world._replace(env=RoomsEnv(world.env.max_objects, world.env.max_quest, dense=True))
    model, optimizer = make_policy(config, world), make_optimizer(config, critic=critic)
    train_step = make_clip_step(config, model, optimizer)

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        tasks, key = draw_tasks(config, world.train_tasks, state)
        sampled = play(config, model, state.params["policy"], scored, tasks, key, config.group_size)
        highest = jnp.repeat(tasks["quest"], config.group_size)
        won = sampled.rewards == highest
        turn_rewards = ops.add_outcome(jnp.zeros_like(sampled.turn_rewards), won.astype(float), sampled.turn_mask)
        if config.reward == "dense":
            turn_rewards = split_win_rewards(
                sampled.turn_rewards, sampled.turn_mask, won, highest, win_bonus=config.win_bonus
            )
        token_rewards = ops.place_turn_rewards(turn_rewards, sampled.turn_ids)
        if config.kl_reward:
            ref_logprobs = score(model, state.ref_params, sampled)[0]
            token_rewards -= config.kl_reward * (sampled.logprobs - ref_logprobs)
        if critic:
            batch = ppo_batch(config, model, state.params, sampled, token_rewards)
        else:
            estimator = {"grpo": ops.grpo_advantages, "rloo": ops.rloo_advantages}[config.algorithm]
            advantages = estimator(jnp.sum(token_rewards, axis=1), sampled.group_ids, sampled.mask)
            batch = Batch(sampled, sampled.mask, sampled.logprobs, advantages)
        state, metrics = train_step(state, batch)
        gained = {"success": jnp.mean(won, dtype=jnp.float32), "score": jnp.mean(sampled.rewards / highest)}
        return state, {**metrics, **describe_rollout(sampled), **gained}

    def init(reference: Params, seed: Array) -> TrainState:
        ref_params = reference if config.kl_reward else None
        return train.init_state(start_params(config, reference, critic=critic), optimizer, seed, ref_params=ref_params)

    def play_test(policy: Params) -> Rollout:
        limits = config.copy_and_resolve_references()
        limits.update(config.test_limits)
        return play(limits, model, policy, world, world.test_tasks, jax.random.key(1), 1)

    return Parts(world, model, init, iteration, play_test=play_test)


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Imitation, then sample, score and update until the steps are done, then the report."""
    train_policy(config, log, build(config))


LARGE = {"rooms": 4, "objects": 6, "quest": 8}
LARGE_LIMITS = {"max_turns": 24, "max_length": 160}
TO_LARGE = {
    **{"demos": 384, "steps": 240},  # until most small houses are won
    **{f"world.test.{name}": size for name, size in LARGE.items()},
    **{f"test_limits.{name}": size for name, size in LARGE_LIMITS.items()},
}


def share(ratio: float) -> dict[str, int]:
    """The arm that imitates for this share of 7,680 episodes, 64 of which are a step."""
    demos, episodes = budget_split(7680, demo_cost=10, ratio=ratio)
    return {"demos": demos, "steps": episodes // 64} | ({} if demos else {"warm_start.steps": 0})


REWARDS = ("dense", "single")
TABLES = {
    "worlds": train.Table(
        arms={"small_to_large": TO_LARGE, "untrained": TO_LARGE | {"steps": 0}},
        title="Trained in houses of 2 rooms, 3 objects and quests of 4, tested in those of 4, 6 and 8",
        metric="trained.success",
        claims=[train.better("small_to_large", "untrained")],
    ),
    "rewards": train.Table(
        arms={
            f"{name}_{reward}": {"algorithm": name, "reward": reward}
            for name in ("ppo", "grpo", "rloo")
            for reward in REWARDS
        },
        metrics=["mean.success", "trained.success", "warm_start.success"],
        claims=[
            train.better("ppo_dense", "ppo_single"),
            train.better("grpo_dense", "grpo_single"),
            train.better("rloo_dense", "rloo_single"),
            train.better("rloo_single", "grpo_single"),
        ],
    ),
    "imitation": train.Table(
        arms={f"imitate_{percent}": share(percent / 100) for percent in (0, 10, 50, 100)},
        metrics=["trained.success", "warm_start.success"],
        claims=[
            train.better("imitate_10", "imitate_0"),
            train.better("imitate_10", "imitate_100"),
            train.better("imitate_10", "imitate_50"),
        ],
    ),
}
