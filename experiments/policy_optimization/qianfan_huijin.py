"""QianfanHuijin: five stages, from knowledge over reasoning and tools to the style of a trade (arXiv 2512.24314).

The paper (QianfanHuijin, 2025) trains a model for finance in stages that grow more specific, each from the weights of
the one before with a fresh optimizer, and claims that each stage of reinforcement learning raises the capability it is
made for:

    pretraining    next tokens of the trade's texts and of general ones, 1 : 1
    sft            next tokens of demonstrations
    reasoning      GRPO, r = right
    agentic        GRPO, r = right - 0.05 for each call of the tool; half of the questions need the tool
    general        GRPO, r = right (0.5 + 0.5 style), so that style never beats being right

Its abstract says which stages there are and nothing of what is in them: losses, rewards and mixtures are choices of
ours. The world is a ledger (`jaxrl_llm.data.worlds.ledger`): 24 companies whose figures stand in texts, 8 whose figures
only a tool tells; the general text is copying, learnt before the first stage. Each row of the result has five
capabilities: knowledge (facts), reasoning (sums of known figures), agentic (sums that need the tool), style (how many
sums are polite) and general (copying); `gain` is what a capability's own stage added, 0 where it was left out.

    python -m experiments.sweep qianfan_huijin --table=stages --vmap-seeds
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from experiments.policy_optimization._stages import (
    Pipeline,
    as_rows,
    grpo_stage,
    imitation_stage,
    run_pipeline,
    stage_programs,
)
from experiments.policy_optimization._training import World, check_choice, make_policy, play
from jaxrl_llm import train
from jaxrl_llm.data.worlds import ledger
from jaxrl_llm.types import Metrics, TrainState

KIND = "pipeline"
NEEDS_SCALE = ("the best of its size on several finance benchmarks",)

# Which capability each stage is there for.
STAGES = {
    "pretraining": "knowledge",
    "sft": "reasoning",
    "reasoning": "reasoning",
    "agentic": "agentic",
    "general": "style",
}


def ledger_world(config: ConfigDict) -> tuple[World, dict[str, PyTree], tuple[str, ...]]:
    """The world, whose test has a part for each of some capabilities; what each stage draws from; the parts' names."""
    rng, sizes = np.random.default_rng(1), config.world
    figures = ledger.make_figures(sizes.num_known + sizes.num_unknown)
    known, unknown = np.split(np.arange(len(figures)), [sizes.num_known])
    pairs, test_pairs = ledger.split_pairs(rng, known, known, sizes.train_problems)
    lookups, test_lookups = ledger.split_pairs(rng, known, unknown, sizes.train_lookups)

    def shown(rng: np.random.Generator, *tasks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return ledger.demonstrate(rng, ledger.join_tasks(*tasks), figures, num_known=sizes.num_known)

    sums = ledger.make_sums(figures, pairs)
    need_tool = ledger.make_sums(figures, rng.choice(lookups, len(pairs)), tool=True)  # as many
    facts = ledger.make_facts(figures, np.resize(known, sizes.test_problems))
    texts = [facts, ledger.make_copies(rng, sizes.test_problems)] if config.general_text else [facts]
    demonstrated = (
        ledger.make_sums(figures, pairs[: sizes.shown]),
        ledger.make_sums(figures, lookups[: sizes.shown // 2], tool=True),
        ledger.make_copies(rng, sizes.shown),
    )
    data = {
        "pretraining": as_rows(config, shown(rng, *texts)),
        "sft": as_rows(config, shown(rng, *demonstrated)),
        "reasoning": sums,
        "agentic": ledger.join_tasks(sums, need_tool),
        "general": sums,
    }
    tests = {
        "knowledge": facts,
        "reasoning": ledger.make_sums(figures, np.resize(test_pairs, (sizes.test_problems, 2))),
        "agentic": ledger.make_sums(figures, np.resize(test_lookups, (sizes.test_problems, 2)), tool=True),
        "general": ledger.make_copies(rng, sizes.test_problems),
    }
    world = World(
        ledger.LedgerEnv(figures),
        train_tasks=jax.tree.map(jnp.asarray, sums),
        test_tasks=jax.tree.map(jnp.asarray, ledger.join_tasks(*tests.values())),
        stop_sequences=ledger.STOP_SEQUENCES,
        vocab_size=ledger.vocab_size(len(figures)),
        demonstrate=lambda rng, number: shown(rng, ledger.make_copies(rng, number)),
    )
    return world, jax.tree.map(jnp.asarray, data), tuple(tests)


def make_pipeline(config: ConfigDict) -> Pipeline:
    """The stages in the config's order."""
    for name in config.stages:
        check_choice("stages", name, STAGES)
    world, data, parts = ledger_world(config)
    model = make_policy(config, world)
    paid = {"agentic": {"call_cost": config.call_cost}, "general": {"style_share": config.style_share}}

    def evaluate(state: TrainState) -> Metrics:
        sampled = play(config, model, state.params["policy"], world, world.test_tasks, jax.random.key(1), 1)
        right = sampled.rewards.reshape(len(parts), -1)
        polite = ledger.is_polite(sampled.tokens, sampled.lengths).reshape(right.shape)
        found = dict(zip(parts, jnp.mean(right, axis=1), strict=True))
        return found | {"style": jnp.mean(polite[parts.index("reasoning")], dtype=jnp.float32)}

    def stage(name: str) -> train.Stage:
        if name in ("pretraining", "sft"):
            return imitation_stage(config, model, name, data[name])
        stage_world = world._replace(env=world.env._replace(**paid.get(name, {})))
        return grpo_stage(config, model, name, stage_world, data[name])

    return Pipeline(world, model, [stage(name) for name in config.stages], evaluate)


def programs(config: ConfigDict) -> dict[str, train.Program]:
    """The agentic stage, for `experiments.plan`."""
    return stage_programs(config, make_pipeline(config), "agentic")


def run(config: ConfigDict, log: train.RunLog) -> None:
    """The stages one after another, then what each of them gained."""
    table = run_pipeline(config, log, make_pipeline(config))
    rows = list(table)
    gains = {name: np.zeros(np.shape(table["start"]["knowledge"])) for name in STAGES}
    for before, name in itertools.pairwise(rows):
        gains[name] = np.subtract(table[name][STAGES[name]], table[before][STAGES[name]])
    log.summary({"gain": gains})


ALL = tuple(STAGES)
TABLES = {
    "stages": train.Table(
        arms={
            "all": {},
            "no_pretraining": {"stages": ALL[1:]},
            "no_reasoning": {"stages": (*ALL[:2], *ALL[3:])},
            "no_agentic": {"stages": (*ALL[:3], *ALL[4:])},
            "no_general": {"stages": ALL[:4]},
        },
        metrics=[
            *(f"final.{name}" for name in ("knowledge", "reasoning", "agentic", "style", "general")),
            *(f"gain.{name}" for name in STAGES),
        ],
        claims=[
            train.better("all", "no_pretraining", metric="gain.pretraining"),
            train.better("all", "no_reasoning", metric="gain.reasoning"),
            train.better("all", "no_agentic", metric="gain.agentic"),
            train.better("all", "no_general", metric="gain.general"),
            train.better("all", "no_agentic", metric="final.agentic"),
            train.better("all", "no_general", metric="final.style"),
            train.better("all", "no_reasoning", metric="final.reasoning"),
            train.better("all", "no_pretraining", metric="final.reasoning"),
        ],
    ),
}
