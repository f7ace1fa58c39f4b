"""SSRL: the policy is its own search engine, and what it made up is left out of the loss (arXiv 2508.10874).

The paper (Self-Search Reinforcement Learning, 2025) claims that a policy trained to write thoughts, searches, the
INFORMATION that they would find, and an answer, all in one response, beats training with a simulated or real search
engine and answering directly, and that a real engine can take over at test time without training.

    reward = 0.9 exact match + 0.1 format         format: `rewards.self_search_format_reward`
    loss   = GRPO (k3 KL 0.001) over the tokens outside of information blocks, tags included

Real search at test time: for all queries, or (entropy-guided) for the first and for each whose entropy
`e = mean over the query's tokens of -p log2 p`, p the chosen token's probability, is above that of the query before.

The world is ours: questions of two hops about facts, of which the warm start has a part by heart; its demonstrations
search carelessly, or answer directly, as the last token of the question asks. Questions of the test are not among those
trained on. Self-search writes on where a search ends, real search puts the fact's value there.

    python -m experiments.sweep ssrl --table=main --vmap-seeds
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
from ml_collections import ConfigDict

from experiments.policy_optimization._training import (
    Parts,
    World,
    check_choice,
    describe_rollout,
    draw_tasks,
    init_policy,
    make_clip_step,
    make_optimizer,
    make_policy,
    play,
    responses,
    score,
    train_policy,
)
from jaxrl_llm import ops, train
from jaxrl_llm.data.text import span_mask
from jaxrl_llm.data.worlds import facts
from jaxrl_llm.rewards import self_search_format_reward_ids
from jaxrl_llm.types import Batch, Metrics, Params, Rollout, TrainState

NEEDS_SCALE = (
    "exact match over six question sets 35.2 with Llama-3.2-3B, against 34.0 of ZeroSearch and 32.6 of Search-R1; 43.1 "
    "with 8B",
)
SEARCHES = ("self", "real", "entropy")


def self_search_rewards(
    exact_match: Float[Array, "B"], tokens: Int[Array, "B L"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B"], Metrics]:
    """0.9 for the right answer and 0.1 for the format of the response; and the mean of both."""
    written = self_search_format_reward_ids(*jax.vmap(facts.read_blocks)(tokens, lengths))
    return ops.combine_rewards({"exact_match": exact_match, "format": written}, {"exact_match": 0.9, "format": 0.1})


def query_entropy(logprobs: Float[Array, "B T"], query_mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
    """Mean of -p log2 p over the query's tokens, p the chosen token's probability: the chosen tokens' part of the
    entropy alone, as the released code has it."""
    return ops.masked_mean(-jnp.exp(logprobs) * logprobs / jnp.log(2.0), query_mask, axis=1)


def use_real_search(entropies: Float[Array, "K"], turn_mask: Bool[Array, "K"]) -> Bool[Array, "K"]:
    """The first query, and each whose entropy is above that of the one before."""
    before = jax.lax.cummax(jnp.where(turn_mask, jnp.arange(entropies.shape[0]), -1))
    before = jnp.pad(before, (1, 0), constant_values=-1)[:-1]
    return turn_mask & (entropies > jnp.where(before < 0, -jnp.inf, entropies[before]))


def unsure_queries(sampled: Rollout) -> Bool[Array, "B K"]:
    """The turns of a rollout whose query should go to the real engine."""
    tags = jnp.isin(sampled.tokens, jnp.array(facts.SEARCH))
    queries = span_mask(sampled.tokens, *facts.SEARCH) & ~tags & sampled.mask
    of_turn = [queries & (sampled.turn_ids == turn) for turn in range(sampled.turn_mask.shape[1])]
    entropies = jnp.stack([query_entropy(sampled.logprobs, query) for query in of_turn], axis=1)
    return jax.vmap(use_real_search)(entropies, jnp.stack([jnp.any(query, axis=1) for query in of_turn], axis=1))


def fact_world(config: ConfigDict) -> World:
    """Questions about facts; whether searches are real is decided where they are played."""
    table = facts.make_facts(config.world.num_entities, config.world.num_relations)
    sizes = {"train": config.world.train_problems, "test": config.world.test_problems}
    train_questions, test_questions = facts.make_fact_questions(table, **sizes, direct=config.direct)
    return World(
        facts.FactsEnv(jnp.asarray(table)),
        train_tasks=jax.tree.map(jnp.asarray, train_questions),
        test_tasks=jax.tree.map(jnp.asarray, test_questions),
        stop_sequences=[[facts.SEARCH[1]], [facts.EOS]],
        vocab_size=facts.first_entity(config.world.num_relations) + config.world.num_entities,
        demonstrate=lambda rng, number: facts.demonstrate_searches(
            rng, table, train_questions, number, **config.world.shown
        ),
    )


def with_search(config: ConfigDict, tasks: PyTree, real: bool | Bool[Array, "P K"]) -> PyTree:
    """Tasks that say for which turns a search is real."""
    return tasks | {"real": jnp.broadcast_to(real, (len(tasks["answer"]), config.max_turns))}


def build(config: ConfigDict) -> Parts:
    """One turn of the algorithm: sample responses, mask what the policy told itself, update."""
    check_choice("search", config.search, SEARCHES[:2])
    check_choice("test_search", config.test_search, SEARCHES)
    world = fact_world(config)
    model, optimizer = make_policy(config, world), make_optimizer(config)
    train_step = make_clip_step(config, model, optimizer)

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        tasks, key = draw_tasks(config, world.train_tasks, state)
        tasks = with_search(config, tasks, config.search == "real")
        sampled = play(config, model, state.params["policy"], world, tasks, key, config.group_size)
        rewards, terms = self_search_rewards(sampled.rewards, *responses(sampled))
        mask = sampled.mask & sampled.scorable[:, None]
        if config.mask_information:
            mask &= ~span_mask(sampled.tokens, *facts.INFORMATION)
        advantages = ops.grpo_advantages(rewards, sampled.group_ids, mask, valid=sampled.scorable)
        ref_logprobs = score(model, state.ref_params, sampled)[0] if config.kl_coefficient else None
        state, metrics = train_step(state, Batch(sampled, mask, sampled.logprobs, advantages, ref_logprobs))
        return state, metrics | describe_rollout(sampled) | terms

    def play_test(policy: Params) -> Rollout:
        """With real searches for no query, for all, or by entropy. Entropy decides turn by turn: the same key gives
        the same tokens up to a turn in which a search became real, so that a round settles one turn more."""

        def attempt(real: bool | Bool[Array, "P K"]) -> Rollout:
            tasks = with_search(config, world.test_tasks, real)
            return play(config, model, policy, world, tasks, jax.random.key(1), 1)

        if config.test_search != "entropy":
            return attempt(config.test_search == "real")
        first = jnp.zeros((config.world.test_problems, config.max_turns), bool).at[:, 0].set(True)
        real, _ = jax.lax.scan(
            lambda real, _: (unsure_queries(attempt(real)), None), first, length=config.max_turns - 1
        )
        return attempt(real)

    def describe(sampled: Rollout, tasks: PyTree) -> Metrics:
        told, right = facts.known_facts(world.env.facts, sampled.tokens, sampled.mask)
        looked_up = (sampled.tokens == facts.INFORMATION[0]) & ~sampled.mask
        return describe_rollout(sampled) | {
            "format": self_search_rewards(sampled.rewards, *responses(sampled))[1]["format"],
            "known": jnp.sum(right) / jnp.maximum(jnp.sum(told), 1),
            "real_searches": jnp.mean(jnp.sum(looked_up, axis=1, dtype=jnp.float32)),
        }

    return Parts(world, model, init_policy(config, optimizer), iteration, describe, play_test)


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Warm start, then sample, score and update until the steps are done, then the report."""
    train_policy(config, log, build(config))


TABLES = {
    "main": train.Table(
        arms={
            "ssrl": {},
            "ssrl_real_test": {"test_search": "real"},
            "ssrl_entropy_test": {"test_search": "entropy"},
            "no_mask": {"mask_information": False},
            "direct": {"direct": True},
            "search_r1": {"search": "real", "test_search": "real"},
        },
        metrics=[
            "trained.success",
            "mean.success",
            "warm_start.success",
            "trained.format",
            "trained.known",
            "trained.real_searches",
        ],
        claims=[
            train.better("ssrl", "direct"),
            train.better("ssrl_real_test", "ssrl"),
            train.better("ssrl_entropy_test", "ssrl"),
            train.better("ssrl", "no_mask"),
            train.better("ssrl_entropy_test", "ssrl_real_test", metric="trained.real_searches", lower=True),
        ],
    ),
}
