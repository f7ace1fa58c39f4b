"""The agent of Search-R1 against a search engine on the host that hangs and fails, with updates that are NaN now and
then. `benchmarks.soak` runs it for a long time, and kills it."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs.agentic_search import search_r1 as search_r1_config
from experiments.agentic_search import search_r1
from experiments.agentic_search._geography import make_agent, make_evaluation, make_world, warm_start
from jaxrl_llm import distributed, train
from jaxrl_llm.data.worlds.geography import Question, make_questions
from jaxrl_llm.data.worlds.tokenizer import geography_tokenizer
from jaxrl_llm.envs.geography import make_geography_host_env
from jaxrl_llm.sampling import CallLimits, host_rollout
from jaxrl_llm.types import Decoding, Metrics, Params, Rollout, TrainState


def get_config(arm: str = "small") -> ConfigDict:
    """Search-R1 with few and short episodes a step."""
    config = search_r1_config.get_config("small")
    changes: dict[str, Any] = {
        "steps": 2000,
        "prompts": 2,
        "group_size": 4,
        "mini_batches": 1,
        "micro_batches": 1,
        "num_slots": 8,
    }
    changes |= {"optimizer.learning_rate": 1e-4, "train_questions": 1000, "max_searches": 2}
    changes |= {"evaluate_every": 10_000, "checkpoint_every": 50}
    for key, value in changes.items():
        train.override(config, key, value)
    # shares of calls that hang or raise, how long a call may take, and every how many steps an update is NaN; 0: never
    config.faults = ConfigDict({"time_outs": 0.0, "exceptions": 0.0, "timeout": 2.0, "nan_every": 0})
    return train.choose_arm(config, arm, {"small": {}, "tiny": {"steps": 4, "test_questions": 8}})


class FaultyEnv:
    """The geography world, slow and failing by chance."""

    def __init__(self, config: ConfigDict) -> None:
        self.env = make_geography_host_env(max_searches=config.max_searches, num_passages=config.num_passages)
        self.faults = config.faults

    def reset(self, task: Question) -> tuple[Any, str]:
        return self.env.reset(task)

    def step(self, state: Any, turn_text: str) -> tuple[Any, str, float, bool]:
        draw = random.random()
        if draw < self.faults.time_outs:
            threading.Event().wait(2 * self.faults.timeout)
        elif draw < self.faults.time_outs + self.faults.exceptions:
            raise ConnectionError("the index is away")
        return self.env.step(state, turn_text)


def make_sample(config: ConfigDict) -> distributed.Sampler:
    """Rollouts by their number, with how many attempts and lasting failures each episode had."""
    agent, env, tokenizer = make_agent(config), FaultyEnv(config), geography_tokenizer()
    questions = [q for hops in config.hops for q in make_questions("train", hops, config.train_questions)]
    special = tokenizer.special_ids

    def sample(
        newest: Callable[[], tuple[Params, int]], seed: int, number: int
    ) -> tuple[Rollout, np.ndarray, np.ndarray]:
        tasks = random.Random(f"{seed} {number}").sample(questions, config.prompts)
        rollout, episodes = host_rollout(
            agent.policy,
            newest,
            env,
            tasks,
            jax.random.fold_in(jax.random.key(seed), number),
            tokenizer=tokenizer,
            max_length=config.max_length,
            max_turns=config.max_searches + 1,
            max_turn_tokens=config.max_turn_tokens,
            stop_sequences=[[special["</search>"]], [special["</answer>"]]],
            decoding=Decoding(**config.decoding),
            group_size=config.group_size,
            num_slots=config.num_slots,
            in_flight=config.prompts * config.group_size,
            max_observation=64,
            call_limits=CallLimits(timeout=config.faults.timeout, retries=1, backoff=0.0),
        )
        hops = np.repeat([task.hops for task in tasks], config.group_size)
        return rollout, hops, np.array([[episode.calls, len(episode.errors)] for episode in episodes])

    return sample


def spoil(config: ConfigDict, update: Callable[..., Any]) -> Callable[..., Any]:
    """The update with a reference policy of NaN, and so a loss and gradients of NaN, every `nan_every` steps."""

    def spoilt(state: TrainState, samples: tuple[Rollout, jax.Array, jax.Array]) -> tuple[TrainState, Metrics]:
        rollout, hops, calls = samples
        reference = given = state.ref_params
        if every := config.faults.nan_every:
            bad = state.step % every == every // 2
            given = jax.tree.map(lambda leaf: jnp.where(bad, jnp.nan, leaf), reference)
        state, metrics = update(dataclasses.replace(state, ref_params=given), (rollout, hops))
        attempts, failed = jnp.sum(calls, axis=0)
        return dataclasses.replace(state, ref_params=reference), {
            **metrics,
            "call_attempts": attempts,
            "calls_failed": failed,
        }

    return spoilt


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Trains, and plays the held-out questions on the device, where nothing fails."""
    world, agent = make_world(config), make_agent(config)
    reference = warm_start(config, agent.policy, log)
    optimizer, evaluate = search_r1.make_optimizers(config), make_evaluation(config, agent)

    def init(reference: Params, seed: jax.Array) -> TrainState:
        return train.init_state({"policy": reference}, optimizer, seed, ref_params=reference)

    def held_out(world: Any, state: TrainState) -> Metrics:
        return evaluate(world.env, world.test_tasks, state.params["policy"], state.ref_params)[0]

    distributed.loop(
        jax.tree_util.Partial(init, reference),
        spoil(config, search_r1.make_update(config, agent, optimizer)),
        make_sample,
        policy=lambda params: params["policy"],
        steps=config.steps,
        log=log,
        evaluate=jax.tree_util.Partial(held_out, world),
        evaluate_every=config.evaluate_every,
    )
    last = log.last("train")
    assert isinstance(last, dict)  # one seed
    log.summary({name: last[f"eval/{name}"] for name in ("success", *(f"success/{n}" for n in config.hops))})
