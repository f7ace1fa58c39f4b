"""Facial-R1: name what is seen before the label, and be paid for both (arXiv 2511.10254).

The paper (Facial-R1: Aligning Reasoning and Recognition for Facial Emotion Analysis, 2025) starts a vision-language
model on a few instructions, trains it by GRPO with verifiable factors as the reward, and lets it label new images to
learn from. It claims that a reward for the action units that the reasoning names ties the label to the reasoning:

    R = R_AU + R_acc + R_format
    R_AU = 2 F1 - 1 of the set of units named against the gold set; 0 if the gold set is empty, -1 if none is named
    R_acc, R_format in {0, 1}

The released code rescales F1 to [-1, 1]; the paper's README has plain F1. The world is ours
(`jaxrl_llm.data.worlds.faces`): noisy activations of units instead of images, an emotion that is a rule over the units,
and instructions with the right emotion whose units err. How labels are filtered, and how often, the paper leaves open:
here one round, in which the policy that the stage began with labels each new face eight times, and what is learnt are
responses of the right form, with the emotion that most of the eight have and that follows from the units named; at
GRPO's learning rate, as the first stage's, seven times as high, undid GRPO in a trial.

    python -m experiments.sweep facial_r1 --table=main --vmap-seeds
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree
from ml_collections import ConfigDict

from experiments.policy_optimization._stages import (
    Pipeline,
    Rows,
    as_rows,
    grpo_stage,
    imitation_stage,
    make_imitation_step,
    run_pipeline,
    stage_programs,
)
from experiments.policy_optimization._training import (
    World,
    check_choice,
    draw_tasks,
    make_optimizer,
    make_policy,
    play,
    responses,
)
from jaxrl_llm import ops, train
from jaxrl_llm.data.worlds import faces
from jaxrl_llm.envs import SingleTurnEnv
from jaxrl_llm.models import Model
from jaxrl_llm.types import Metrics, Rollout, TrainState

KIND = "pipeline"
NEEDS_SCALE = ("action-unit F1 of 73.1 on DISFA and 70.2 on RAF-AU, emotion accuracy of 69.8 on FER2013, from images",)
STAGES = ("sft", "grpo", "synthesis")


def unit_rewards(named: Bool[Array, "... A"], gold: Bool[Array, "... A"], *, beta: float = 1.0) -> Float[Array, "..."]:
    """`2 F_beta - 1` of the units named; 0 where there are none to name."""
    return jnp.where(jnp.any(gold, axis=-1), 2 * ops.set_fscore(named, gold, beta=beta) - 1, 0.0)


def confident_labels(emotions: Array, fine: Bool[Array, "P G"], *, share: float) -> Bool[Array, "P G"]:
    """Which of a face's G labels are learnt from: fine ones with an emotion that at least that share of them has."""
    alike = (emotions[:, :, None] == emotions[:, None, :]) & fine[:, None, :]
    return fine & (jnp.mean(alike, axis=-1) >= share)


def face_world(config: ConfigDict) -> tuple[World, dict[str, PyTree]]:
    """The world, whose reward is R, and what each stage draws from."""

    def reward(task: dict[str, Array], tokens: Array, length: Array) -> Array:
        units, found = faces.face_scores(task, tokens, length)
        return config.unit_weight * unit_rewards(units, task["units"]) + found["accuracy"] + found["format"]

    def tasks(seed: int, number: int) -> dict[str, np.ndarray]:
        return faces.make_faces(np.random.default_rng(seed), number, noise=config.world.noise)

    def show(rng: np.random.Generator, number: int) -> dict[str, np.ndarray]:
        shown = faces.make_faces(rng, number, noise=config.world.noise)
        return faces.demonstrate_faces(rng, shown, wrong=config.world.wrong)

    train_tasks, test_tasks = (
        jax.tree.map(jnp.asarray, tasks(seed, number))
        for seed, number in ((1, config.world.train_problems), (2, config.world.test_problems))
    )
    new = {name: array for name, array in tasks(3, config.world.new_faces).items() if name.startswith("prompt")}
    data = {"sft": as_rows(config, show(np.random.default_rng(4), config.world.shown)), "grpo": train_tasks}
    world = World(SingleTurnEnv(reward), train_tasks, test_tasks, faces.STOP_SEQUENCES, faces.VOCAB_SIZE, show)
    return world, data | {"synthesis": jax.tree.map(jnp.asarray, new)}


def synthesis_stage(config: ConfigDict, model: Model, world: World, new: PyTree) -> train.Stage:
    """Imitates what the policy of the stage's start says of new faces, as far as it is to be trusted."""
    optimizer = make_optimizer(config)
    step = make_imitation_step(config, model, optimizer)
    unpaid = world._replace(env=SingleTurnEnv(lambda task, tokens, length: jnp.float32(0)))  # no label is known

    def iteration(state: TrainState, new: PyTree) -> tuple[TrainState, Metrics]:
        drawn, key = draw_tasks(config, new, state)
        assert state.ref_params is not None
        labelled = play(config, model, state.ref_params["policy"], unpaid, drawn, key, config.group_size)
        units, emotions, formatted = jax.vmap(faces.read_response)(*responses(labelled))
        fine = formatted & (emotions == faces.emotion_of(units))
        grid = (config.prompts, config.group_size)
        kept = confident_labels(emotions.reshape(grid), fine.reshape(grid), share=config.agreement).ravel()
        state, metrics = step(state, Rows(labelled, labelled.mask & kept[:, None]))
        return state, metrics | {"kept": jnp.mean(kept, dtype=jnp.float32)}

    return train.Stage("synthesis", iteration, new, config.steps, optimizer, "start")


def make_pipeline(config: ConfigDict) -> Pipeline:
    """The stages in the config's order."""
    for name in config.stages:
        check_choice("stages", name, STAGES)
    world, data = face_world(config)
    model = make_policy(config, world)

    def evaluate(state: TrainState) -> Metrics:
        sampled: Rollout = play(config, model, state.params["policy"], world, world.test_tasks, jax.random.key(1), 1)
        units, found = jax.vmap(faces.face_scores)(world.test_tasks, *responses(sampled))
        found["unit_f1"] = ops.set_fscore(units, world.test_tasks["units"])
        return {name: jnp.mean(values) for name, values in found.items()} | {"reward": jnp.mean(sampled.rewards)}

    def stage(name: str) -> train.Stage:
        if name == "sft":
            return imitation_stage(config, model, name, data[name])
        if name == "grpo":
            return grpo_stage(config, model, name, world, data[name])
        return synthesis_stage(config, model, world, data[name])

    return Pipeline(world, model, [stage(name) for name in config.stages], evaluate)


def programs(config: ConfigDict) -> dict[str, train.Program]:
    """The stage of GRPO, for `experiments.plan`."""
    return stage_programs(config, make_pipeline(config), "grpo")


def run(config: ConfigDict, log: train.RunLog) -> None:
    """The stages one after another."""
    run_pipeline(config, log, make_pipeline(config))


TABLES = {
    "main": train.Table(
        arms={
            "sft": {"stages": ("sft",)},
            "accuracy_only": {"stages": ("sft", "grpo"), "unit_weight": 0.0},
            "units": {"stages": ("sft", "grpo")},
            "units_and_synthesis": {},
        },
        metrics=[f"final.{name}" for name in ("accuracy", "consistency", "unit_f1", "format")],
        claims=[
            train.better("units", "sft"),
            train.better("units", "accuracy_only"),
            train.better("units", "accuracy_only", metric="final.consistency"),
            train.better("units", "accuracy_only", metric="final.unit_f1"),
            train.better("units_and_synthesis", "units"),
            train.better("units_and_synthesis", "units", metric="final.consistency"),
        ],
    ),
}
