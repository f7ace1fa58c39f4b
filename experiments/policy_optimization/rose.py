"""ROSE: rollouts that branch where the next words differ most in meaning, and credit between branches (2601.05053).

The paper (Reinforced Efficient Reasoning via Semantically Diverse Exploration, 2026) claims better pass@8 than GRPO and
than branching by entropy at 3B to 8B, with shorter right answers. A prompt's rollouts are made one after another: each
begins anew with probability eps, else it keeps what lies before the token of the highest score in the group so far.

    score      H sum_(i != j) p_i p_j (1 - cos_ij)      over the 20 likeliest tokens, cosines of input embeddings
    V(k)       mean reward of the group's rollouts that have a branch behind k tokens; at the end the own reward
    A          V(next branch) - V(last branch), for the tokens between; no deviation
    length     of the right ones the longer lose |A| (1 - ((L_s - k) / (L - k))^lambda) behind the last node k that they
               share with the shortest, of length L_s
    loss       PPO-clip, sum over tokens / constant, + 0.001 k3 KL; groups without spread are left out

The released score has -cos for (1 - cos): where cosines are positive, it is largest at tokens that are nearly certain.
Ours is never negative [our choice]. "entropy" branches at the largest H. The world is ours: steps from 0 to a number,
where each operator has four spellings, so that much of the entropy is no difference in meaning. Branching arms
have more rollouts a group, as a branch does not make its prefix anew: about as many generated tokens as GRPO.

    python -m experiments.sweep rose --table=main --vmap-seeds
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from experiments.policy_optimization._training import (
    Parts,
    World,
    check_choice,
    describe_lengths,
    describe_rollout,
    draw_tasks,
    init_policy,
    make_clip_step,
    make_optimizer,
    make_policy,
    play,
    read_curve,
    responses,
    score,
    train_policy,
)
from jaxrl_llm import ops, train
from jaxrl_llm.data.worlds import expressions
from jaxrl_llm.envs import SingleTurnEnv
from jaxrl_llm.models import Model
from jaxrl_llm.sampling import branching_rollout, rollout_hidden
from jaxrl_llm.types import Batch, Decoding, Metrics, Params, Rollout, TrainState

NEEDS_SCALE = ("mean pass@8 of four mathematics benchmarks 49.64 -> 55.75 against GRPO with Qwen3-8B",)
FORMS = ("dissimilarity", "released", "entropy", "none")


def expression_world(config: ConfigDict) -> World:
    """Ways from 0 to a number."""

    def tasks(seed: int, number: int) -> dict[str, Array]:
        return jax.tree.map(jnp.asarray, expressions.make_expression_tasks(np.random.default_rng(seed), number))

    return World(
        SingleTurnEnv(expressions.expression_reward),
        train_tasks=tasks(1, config.world.train_problems),
        test_tasks=tasks(2, config.world.test_problems),
        stop_sequences=[[expressions.FIRST_END + end] for end in range(expressions.ENDS)],
        vocab_size=expressions.VOCAB_SIZE,
        demonstrate=lambda rng, rows: expressions.demonstrate_expressions(rng, rows, wrong=config.world.wrong),
    )


def branch_scores(config: ConfigDict, model: Model, params: Params, sampled: Rollout) -> Float[Array, "B T"]:
    """The score of every token, a row at a time: `[B, T, V]` never exists."""

    def one_row(hidden: Float[Array, "T D"]) -> Float[Array, "T"]:
        logits = jnp.einsum("td,vd->tv", hidden, model.head(params), preferred_element_type=jnp.float32)
        top, ids = jax.lax.top_k(jax.nn.log_softmax(logits / config.decoding.temperature), config.candidates)
        return ops.semantic_branch_scores(top, params["embedding"][ids], form=config.branching)

    return jax.lax.map(one_row, rollout_hidden(model, params, sampled))


def sample_tree(
    config: ConfigDict, model: Model, policy: Params, world: World, tasks: dict[str, Array], key: jax.Array
) -> Rollout:
    """Rollouts that branch, with `parent` and `fork_position`."""
    return branching_rollout(
        model,
        policy,
        world.env,
        tasks,
        key,
        score=lambda rows: branch_scores(config, model, policy, rows),
        eps=1.0 if config.branching == "none" else config.eps,
        group_size=config.group_size,
        max_length=config.max_length,
        max_turn_tokens=config.max_turn_tokens,
        stop_sequences=world.stop_sequences,
        decoding=Decoding(**config.decoding),
        num_slots=config.num_slots,
    )


def tree_advantages(config: ConfigDict, sampled: Rollout) -> Float[Array, "B T"]:
    """Advantages of segments, in the columns of the tokens."""
    assert sampled.parent is not None and sampled.fork_position is not None  # a tree
    lengths = sampled.lengths - sampled.prompt_lengths
    branch = jnp.maximum(sampled.fork_position - sampled.prompt_lengths, 0)
    nodes = ops.branch_node_mask(sampled.parent, branch, max_len=sampled.tokens.shape[1])
    advantages = ops.tree_segment_advantages(
        sampled.rewards,
        nodes,
        lengths,
        sampled.group_ids,
        length_exponent=config.length_exponent,
        power_outside=config.power_outside,
    )
    places = jnp.arange(sampled.tokens.shape[1]) - sampled.prompt_lengths[:, None]
    return jnp.where(sampled.mask, jnp.take_along_axis(advantages, jnp.maximum(places, 0), axis=1), 0.0)


def describe_tree(config: ConfigDict, sampled: Rollout) -> Metrics:
    """Generated tokens (a shared prefix once) of a group, its answers of different meaning, those per 100 tokens."""
    begin = jnp.maximum(sampled.prompt_lengths, 0 if sampled.fork_position is None else sampled.fork_position)
    ids = expressions.meaning_ids(*responses(sampled)).reshape(config.prompts, config.group_size)
    distinct = jnp.sum(ops.first_occurrence_mask(ids, jnp.ones(ids.shape, bool)), dtype=jnp.float32)
    generated = jnp.sum(sampled.lengths - begin, dtype=jnp.float32)
    found = {"distinct": distinct / config.prompts, "distinct_per_100": 100 * distinct / generated}
    return found | {"generated": generated / config.prompts}


def build(config: ConfigDict) -> Parts:
    """One turn of the algorithm: grow a tree for each prompt, credit its segments, update."""
    check_choice("branching", config.branching, FORMS)
    check_choice("advantages", config.advantages, ("tree", "grpo"))
    world = expression_world(config)
    model, optimizer = make_policy(config, world), make_optimizer(config)
    train_step = make_clip_step(config, model, optimizer)

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        tasks, key = draw_tasks(config, world.train_tasks, state)
        policy = state.params["policy"]
        if config.branching == "none":
            sampled = play(config, model, policy, world, tasks, key, config.group_size)
        else:
            sampled = sample_tree(config, model, policy, world, tasks, key)
        mask = sampled.mask & ops.dynamic_sampling_mask(sampled.rewards, sampled.group_ids)[:, None]
        if config.advantages == "tree":
            advantages = tree_advantages(config, sampled)
        else:
            advantages = ops.grpo_advantages(sampled.rewards, sampled.group_ids, mask)
        ref_logprobs = score(model, state.ref_params, sampled)[0]
        batch = Batch(sampled, mask, sampled.logprobs, advantages, ref_logprobs)
        state, metrics = train_step(state, batch)
        return state, metrics | describe_rollout(sampled) | describe_tree(config, sampled)

    return Parts(world, model, init_policy(config, optimizer), iteration, describe_lengths)


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Trains, and reports how different the answers were over the run, and what they cost."""
    train_policy(config, log, build(config))
    curves = ("distinct", "distinct_per_100", "generated")
    log.summary({name: read_curve(config, log, name).mean(axis=-1) for name in curves})


GRPO: dict[str, Any] = {"branching": "none", "advantages": "grpo", "group_size": 8}
TABLES = {
    "main": train.Table(
        arms={
            "rose": {},
            "grpo": GRPO,
            "entropy": {"branching": "entropy"},
            "rose_length": {"length_exponent": 1.0},
            "rose_one_subtree": {"eps": 0.0},
        },
        metrics=[
            "distinct_per_100",
            "distinct",
            "generated",
            "trained.success",
            "mean.success",
            "trained.tokens_right",
        ],
        claims=[
            train.better("rose", "grpo"),
            train.better("entropy", "grpo"),
            train.better("rose", "entropy"),
            train.better("rose", "rose_one_subtree", metric="distinct"),
            train.better("rose", "grpo", metric="mean.success"),
            train.better("rose_length", "rose", metric="trained.tokens_right", lower=True),
            train.better("rose_length", "rose", by=-0.03, metric="trained.success"),
        ],
    ),
}
