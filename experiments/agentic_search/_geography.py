"""What the search pages share: the geography world, a small agent that plays in it, its warm start, its optimizers,
and the report of a run.

A page writes what its paper adds: how a batch is made of rollouts, and the loss.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments.policy_optimization._training import make_optimizer
from jaxrl_llm import distributed, ops, train
from jaxrl_llm.data.packing import pack_sequences
from jaxrl_llm.data.questions import read_questions
from jaxrl_llm.data.worlds.demonstrations import demonstrations
from jaxrl_llm.data.worlds.geography import make_questions
from jaxrl_llm.data.worlds.tokenizer import geography_tokenizer
from jaxrl_llm.envs.geography import GeographyEnv, GeographyTask, encode_tasks, make_geography_env
from jaxrl_llm.models import (
    DecoderConfig,
    Model,
    load_params,
    make_decoder,
    make_scalar_head,
    previous_token_head,
    save_params,
)
from jaxrl_llm.sampling import rollout, rollout_hidden, score_rollout, write_transcripts
from jaxrl_llm.types import Decoding, Metrics, Params, Rollout, TrainState

WEIGHTS = Path(__file__).with_name("search_r1_warm_start.safetensors")


class World(NamedTuple):
    """The environment, with search and without, and the questions."""

    env: GeographyEnv
    blind_env: GeographyEnv
    train_tasks: GeographyTask
    test_tasks: GeographyTask


class Agent(NamedTuple):
    """The functions of the policy and, for PPO, of a critic with its own trunk."""

    policy: Model
    init_head: Any
    apply_head: Any

    def values(self, params: Params, sampled: Rollout, config: ConfigDict) -> jax.Array:
        """Value of the state before each token, [B, T]."""
        hidden = rollout_hidden(self.policy, params["critic"]["decoder"], sampled, **shared_prompt(config))
        return self.apply_head(params["critic"]["head"], hidden)


def make_world(config: ConfigDict) -> World:
    """The environments and the questions: the world's own, or those of `config.train_file` and `config.test_file`."""
    return _world_of(train.to_json(config))


@functools.lru_cache(maxsize=1)  # wanted by what samples and by what evaluates
def _world_of(config_text: str) -> World:
    config, tokenizer = train.from_json(config_text), geography_tokenizer()

    def tasks(split: Literal["train", "test"]) -> GeographyTask:
        file, number = config[f"{split}_file"], config[f"{split}_questions"]
        questions = (
            read_questions(file) if file else [q for hops in config.hops for q in make_questions(split, hops, number)]
        )
        return encode_tasks(questions, tokenizer, min_prompt=config.min_prompt, max_prompt=config.max_prompt)

    make_env = partial(
        make_geography_env, tokenizer, max_searches=config.max_searches, num_passages=config.num_passages
    )
    return World(
        make_env(search_enabled=config.search),
        make_env(search_enabled=False),
        tasks("train"),
        tasks("test"),
    )


def make_agent(config: ConfigDict) -> Agent:
    """A decoder of the config's sizes with the world's vocabulary, and a value head."""
    model = make_decoder(DecoderConfig(geography_tokenizer().vocab_size, **config.model))
    return Agent(model, *make_scalar_head(config.model.width))


def shared_prompt(config: ConfigDict) -> dict[str, Any]:
    """The group's common prefix that is computed once: shorter than any prompt."""
    return {"group_size": config.group_size, "shared_prefix": config.min_prompt - 1}


def play(
    config: ConfigDict,
    model: Model,
    params: Params,
    env: GeographyEnv,
    tasks: GeographyTask,
    key: jax.Array,
    group_size: int,
) -> Rollout:
    """Episodes of the tasks, `group_size` of each, under the config's limits."""
    special = geography_tokenizer().special_ids
    return rollout(
        model,
        params,
        env,
        tasks,
        key,
        max_length=config.max_length,
        max_turns=config.max_searches + 1,
        max_turn_tokens=config.max_turn_tokens,
        stop_sequences=[[special["</search>"]], [special["</answer>"]]],
        decoding=Decoding(**config.decoding),
        group_size=group_size,
        num_slots=config.num_slots,
        window=config.window,
    )


def play_batch(
    config: ConfigDict, agent: Agent, world: World, params: Params, seed: jax.Array, number: jax.Array
) -> tuple[Rollout, jax.Array]:
    """The rollout of a number: episodes of tasks drawn with it, and the hops of each."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), number)
    task_key, rollout_key = jax.random.split(key)
    chosen = jax.random.choice(task_key, world.train_tasks.hops.shape[0], (config.prompts,), replace=False)
    tasks = jax.tree.map(lambda x: x[chosen], world.train_tasks)
    sampled = play(config, agent.policy, params, world.env, tasks, rollout_key, config.group_size)
    return sampled, jnp.repeat(tasks.hops, config.group_size)


def make_sample(config: ConfigDict) -> distributed.Sampler:
    """What a process that samples needs: this one, or those of `config.distributed`."""
    play_world = partial(play_batch, config, make_agent(config))
    return distributed.device_sampler(jax.tree_util.Partial(play_world, make_world(config)), config.seed)


def make_optimizers(config: ConfigDict) -> optax.GradientTransformation:
    """One optimizer for the policy; for PPO another, with its own rate, for the critic."""
    return make_optimizer(config, critic=config.algorithm == "ppo")


def make_init(config: ConfigDict, agent: Agent, optimizer: optax.GradientTransformation) -> Callable[..., TrainState]:
    """`init(reference, seed) -> state`: the policy, and a critic for PPO, start from the reference."""

    def init(reference: Params, seed: jax.Array) -> TrainState:
        params = {"policy": reference}
        if config.algorithm == "ppo":
            params["critic"] = {"decoder": reference, "head": agent.init_head(jax.random.key(0))}
        return train.init_state(params, optimizer, seed, ref_params=reference)

    return init


def step_programs(
    config: ConfigDict, agent: Agent, step: Callable[..., Any], init: Callable[..., TrainState]
) -> dict[str, train.Program]:
    """`train.rollout_programs` with the config's sizes: `step` on a mini-batch."""
    return train.rollout_programs(
        agent.policy,
        step,
        init,
        rows=config.prompts * config.group_size // config.mini_batches,
        length=config.max_length,
        num_slots=config.num_slots,
        max_turns=config.max_searches + 1,
        max_turn_tokens=config.max_turn_tokens,
        decoding=Decoding(**config.decoding),
        reference=True,
        critic=config.algorithm == "ppo",
    )


def describe_rollout(sampled: Rollout, hops: jax.Array, config: ConfigDict) -> Metrics:
    """Success in all and by number of hops, and how the episodes went."""
    by_hops = {f"success/{n}": ops.masked_mean(sampled.rewards, sampled.scorable & (hops == n)) for n in config.hops}
    return {
        "success": ops.masked_mean(sampled.rewards, sampled.scorable),
        **by_hops,
        "turns": jnp.mean(jnp.sum(sampled.turn_mask, axis=1, dtype=jnp.float32)),
        "truncated": jnp.mean(sampled.truncated, dtype=jnp.float32),
    }


def make_evaluation(config: ConfigDict, agent: Agent) -> Callable[..., tuple[Metrics, Rollout]]:
    """Success on the held-out questions, one sampled episode each; the same keys at every call."""

    def evaluate(env: GeographyEnv, tasks: GeographyTask, policy: Params, ref: Params) -> tuple[Metrics, Rollout]:
        sampled = play(config, agent.policy, policy, env, tasks, jax.random.key(1), 1)
        own, reference = (
            score_rollout(agent.policy, params, sampled, decoding=sampled.decoding)[0] for params in (policy, ref)
        )
        kl = ops.kl_estimate(own, reference, kind="k3", mask=sampled.mask)
        return describe_rollout(sampled, tasks.hops, config) | {"kl": ops.masked_mean(kl, sampled.mask)}, sampled

    return evaluate


def warm_start(config: ConfigDict, model: Model, log: train.RunLog) -> Params:
    """The policy to start from: trained here on demonstrations, or the weights that came of doing so.

    Training starts with a head that looks one token back: without it, 2,400 steps gave a policy that knew the tokens
    of a name but copied them in a wrong order (loss 0.73 nats a token; with it, 0.26 after 1,200 steps).
    """
    warm = config.warm_start
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    if not warm.from_scratch:
        return load_params(warm.weights or WEIGHTS, shapes)
    optimizer = train.make_optimizer(warm.optimizer, total_updates=warm.steps)

    def batch(step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((warm.seed, step))
        shown = demonstrations(
            rng,
            warm.rows * 4,
            geography_tokenizer(),
            warm.row_length,
            hops=tuple(config.hops),
            max_searches=warm.max_searches,
            early_answer=warm.early_answer,
            wrong_query=warm.wrong_query,
        )
        return pack_sequences(
            shown["tokens"], shown["mask"], shown["lengths"], num_rows=warm.rows, row_length=warm.row_length
        )

    state = train.loop(
        lambda seed: train.init_state(
            previous_token_head(model.init(jax.random.key(warm.seed)), model.config), optimizer, seed
        ),
        train.make_sft_step(model, optimizer),
        steps=warm.steps,
        log=log,
        stage="warm_start",
        batch=batch,
    )
    file, params = log.workdir / "warm_start.safetensors", train.fetch(state.params)
    if log.writes:
        save_params(params, file, dtype=jnp.bfloat16)
    train.wait_for_all()
    return load_params(file, shapes)  # rounded, as whoever starts from the file has them


def report(
    config: ConfigDict,
    world: World,
    evaluate: Callable[..., tuple[Metrics, Rollout]],
    state: TrainState,
    log: train.RunLog,
) -> None:
    """The held-out success of the warm start, of the trained policy, and of that policy with search switched off."""

    def final(world: World, state: TrainState):
        trained = state.params["policy"]
        play_all = {
            "warm_start": (world.env, state.ref_params),
            "trained": (world.env, trained),
            "no_search": (world.blind_env, trained),
        }
        return {
            name: evaluate(env, world.test_tasks, params, state.ref_params) for name, (env, params) in play_all.items()
        }

    results = train.fetch(train.over_seeds(jax.tree_util.Partial(final, world), config.seed)(state))
    hops = np.asarray(world.test_tasks.hops)
    summary: dict[str, Any] = {}
    for name, (metrics, sampled) in results.items():
        summary[name] = {
            "success": {str(n): metrics[f"success/{n}"] for n in config.hops},
            "kl": metrics["kl"],
            "turns": metrics["turns"],
            "truncated": metrics["truncated"],
        }
        for n in config.hops:
            log.outcomes(f"{name}.success.{n}", sampled.rewards[..., hops == n])
    log.summary(summary | {"minutes": round((time.perf_counter() - log.opened) / 60, 2)})
    if isinstance(config.seed, int) and log.writes:
        write_transcripts(log.workdir / "rollouts.jsonl", results["trained"][1], geography_tokenizer(), hops=hops)
    if config.steps:
        held_out = {f"eval/success/{n}": f"held-out success, hops: {n}" for n in config.hops}
        names = {
            "reward": "training reward",
            **held_out,
            "entropy": "entropy (nats)",
            "kl": "KL to the warm start (nats)",
        }
        title = "A search agent in the geography world"
        figure = train.learning_curves({config.algorithm: [log.workdir]}, list(names), ylabels=names, title=title)
        log.figure("learning_curve", figure)
