"""The world of long windows, for the pages on long contexts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from experiments.policy_optimization._training import World, describe_rollout
from jaxrl_llm import ops
from jaxrl_llm.data.worlds import keychains
from jaxrl_llm.envs import SingleTurnEnv
from jaxrl_llm.models import Model, induction_head
from jaxrl_llm.types import Metrics, Params, Rollout


def long_world(config: ConfigDict) -> World:
    """Questions in windows of `config.world.train` and of `config.world.test` (windows and shares of kinds each);
    demonstrations in those of `config.world.shown`, by someone who gives up after a step with the chance `stop`. The
    warm start is of weights that can look things up."""

    def tasks(seed: int, number: int, options: Any) -> PyTree:
        found = keychains.make_long_questions(np.random.default_rng(seed), number, **_plain(options))
        return jax.tree.map(jnp.asarray, found)

    def demonstrate(rng: np.random.Generator, number: int) -> dict[str, np.ndarray]:
        shown = keychains.make_long_questions(rng, number, **_plain(config.world.shown), asked=8)
        return keychains.demonstrate_trails(rng, shown, stop=config.world.stop)

    def prepare(model: Model, params: Params) -> Params:
        return induction_head(params, model.config, key=jax.random.key(config.warm_start.seed))

    return World(
        SingleTurnEnv(keychains.trail_reward),
        train_tasks=tasks(1, config.world.train_problems, config.world.train),
        test_tasks=tasks(2, config.world.test_problems, config.world.test),
        stop_sequences=[[keychains.EOS]],
        vocab_size=keychains.VOCAB_SIZE,
        demonstrate=demonstrate,
        prepare=prepare,
    )


def _plain(options: Any) -> dict[str, Any]:
    return {"windows": tuple(options.windows), "mix": dict(options.mix)}


def describe_by(sampled: Rollout, tasks: PyTree) -> Metrics:
    """Success in all, by kind of question and by length of the window, for what there is."""
    there = np.unique(np.asarray(tasks["kind"]))
    kinds = {keychains.KINDS[place]: tasks["kind"] == place for place in there}
    windows = {str(size): tasks["window"] == size for size in np.unique(np.asarray(tasks["window"]))}
    found = {f"success_{name}": ops.masked_mean(sampled.rewards, rows) for name, rows in (kinds | windows).items()}
    both = {
        f"success_{kind}_{size}": ops.masked_mean(sampled.rewards, rows & others)
        for kind, rows in kinds.items()
        for size, others in windows.items()
    }
    return describe_rollout(sampled) | found | both
