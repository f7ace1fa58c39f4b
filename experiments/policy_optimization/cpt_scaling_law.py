"""A scaling law in the mean and the spread of perplexity, and the data that it recommends (arXiv 2512.21515).

The paper (Perplexity-Aware Data Scaling Law for Continual Pre-training, 2025) claims near-optimal subsets of a domain's
data. The base model's perplexity of a chunk tells how much is new in it: very low is known, very high is noise. For
training on D tokens of chunks whose perplexities have mean mu and standard deviation sigma the held-out loss is

    L = E + D_c / (mu^a(sigma) sigma^b(mu) D^alpha),   a(sigma) = a0 + a1 sigma,   b(mu) = b0 + b1 mu

which is fitted to small runs on differing windows of perplexity (the classical law has a = b = 0). The best mu and
sigma then choose: chunks of the smallest |perplexity - mu| / sigma, until the budget is full ("distance to optimum").

Choices of ours, as the paper's are not known: the fit (log(L - E) is linear in the rest, so least squares for each E of
a grid, and the E of the least error in L), the optimum (over windows between quantiles of the pool, as the law goes
wrong outside of what can be had), the distance's rule, `match_spread`, the world (`jaxrl_llm.data.worlds.chains`), and
the model of the arm `paper`.

    python -m experiments.sweep cpt_scaling_law --table=main --vmap-seeds
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from experiments.policy_optimization._scaling_law import (
    Law,
    best_landscape,
    distance_to_optimum_select,
    fit_scaling_law,
    predict_loss,
    window_chunks,
)
from experiments.policy_optimization._supervised import Parts, fine_tune, report
from experiments.policy_optimization._training import World, check_choice, make_optimizer, make_policy, warm_start
from jaxrl_llm import ops, train
from jaxrl_llm.data.worlds import chains
from jaxrl_llm.models import Model
from jaxrl_llm.types import Metrics, Params, TrainState

NEEDS_SCALE = ("MedQA 73.61, MMLU-Med 82.11, GPQA-Med 63.16 and others after continual pre-training on medicine",)
SELECTIONS = ("dos", "dos_spread", "random", "lowest", "middle", "highest")


def as_rows(tokens: Int[Array, "B T"]) -> dict[str, Array]:
    """Whole chunks as packed rows."""
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return {"tokens": tokens, "mask": places > 0, "positions": places, "segment_ids": jnp.zeros_like(tokens)}


def chunk_logprobs(model: Model, params: Params, tokens: Int[Array, "N T"]) -> Float[Array, "N"]:
    """Mean log-prob of each chunk's tokens; the perplexity is `exp` of its negative."""

    def some(tokens: Int[Array, "M T"]) -> Float[Array, "M"]:
        _, logprobs, _, mask = train.score_packed(model, params, as_rows(tokens))
        return ops.sequence_logprob(logprobs, mask, length_power=1)

    parts = tokens.reshape(-1, min(len(tokens), 256), tokens.shape[1])
    return jax.lax.map(some, parts).reshape(-1)


def build(config: ConfigDict) -> Parts:
    """Continual pre-training on the chunks that `state.memory` lists."""
    pool = jnp.asarray(chains.make_pool(np.random.default_rng(1), config.world.train_problems)["tokens"])
    rng, number = np.random.default_rng(2), config.world.test_problems
    held_out = chains.make_chunks(rng, rng.uniform(0.2, 0.8, number), np.zeros(number))
    world = World(
        None,
        pool,
        jnp.asarray(held_out),
        stop_sequences=[],
        vocab_size=chains.TOKENS,
        demonstrate=chains.demonstrate_known,
    )
    model, optimizer = make_policy(config, world), make_optimizer(config)
    train_step = train.make_sft_step(model, optimizer)

    def init(reference: Params, seed: Array) -> TrainState:
        return train.init_state(
            reference, optimizer, seed, memory=jnp.arange(config.steps * config.prompts) % len(pool)
        )

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        chunks = jax.lax.dynamic_slice_in_dim(state.memory, state.step * config.prompts, config.prompts)
        return train_step(state, as_rows(pool[chunks]))

    def evaluate(state: TrainState) -> dict[str, Array]:
        return {"loss": -chunk_logprobs(model, state.params, world.test_tasks)}

    return Parts(world, model, init, iteration, evaluate)


def small_runs(config: ConfigDict, parts: Parts, reference: Params) -> Callable[[Int[Array, "W N"]], np.ndarray]:
    """`losses(chunks) -> [W, M]`: held-out losses of a small run for each row of chunks, after each number of steps in
    `config.marks`."""

    def update(_: Array, state: TrainState) -> TrainState:
        return dataclasses.replace(parts.iteration(state)[0], step=state.step + 1)

    def go_on(state: TrainState, steps: Array) -> tuple[TrainState, Array]:
        state = jax.lax.fori_loop(0, steps, update, state)
        return state, jnp.mean(parts.evaluate(state)["loss"])

    start = jax.vmap(lambda chunks: dataclasses.replace(parts.init(reference, jnp.int32(0)), memory=chunks))
    advance = jax.jit(jax.vmap(go_on, in_axes=(0, None)))

    def losses(chunks: Int[Array, "W N"]) -> np.ndarray:
        state, found = start(chunks), []
        for steps in np.diff((0, *config.marks)):
            state, loss = advance(state, steps)
            found.append(loss)
        return np.stack(found, axis=1).astype(np.float64)

    return losses


def measure(
    config: ConfigDict, parts: Parts, losses: Callable[..., np.ndarray], ppl: Float[np.ndarray, "N"], seed: int
) -> tuple[Law, dict[str, float]]:
    """The law from small runs on twelve windows; and R^2, on every third window, of the law without them."""
    windows = [(low, low + 0.25) for low in np.linspace(0, 0.75, 8)] + [
        (low, low + 0.5) for low in np.linspace(0, 0.5, 4)
    ]
    inside, rng = [window_chunks(ppl, np.array(window)) for window in windows], np.random.default_rng((seed, 3))
    drawn = np.stack([rng.choice(chunks, config.marks[-1] * config.prompts) for chunks in inside])
    loss = losses(jnp.asarray(drawn))
    tokens = np.broadcast_to(np.array(config.marks) * config.prompts * parts.world.train_tasks.shape[1], loss.shape)
    mu, sigma = (np.broadcast_to(ppl[drawn].mean(1)[:, None], loss.shape), ppl[drawn].std(1)[:, None] + 0 * loss)
    options = {"e_grid": np.linspace(0, loss.min(), 100, endpoint=False)[1:], "classical": config.law == "classical"}
    apart = np.arange(len(windows)) % 3 == 2
    seen, unseen = ([x[rows].ravel() for x in (mu, sigma, tokens, loss)] for rows in (~apart, apart))
    expected = predict_loss(fit_scaling_law(*seen, **options), *unseen[:3])
    r2 = 1 - np.sum((expected - unseen[3]) ** 2) / np.sum((unseen[3] - unseen[3].mean()) ** 2)
    whole = fit_scaling_law(*(x.ravel() for x in (mu, sigma, tokens, loss)), **options)
    return whole, {"r2": float(r2), **whole._asdict()}


def choose(
    config: ConfigDict, parts: Parts, losses: Callable[..., np.ndarray], ppl: Float[np.ndarray, "N"], seed: int
) -> dict[str, Any]:
    """The chunks to train on, in random order, and what was found on the way to them."""
    rng, number, length = (
        np.random.default_rng((seed, 4)),
        config.steps * config.prompts,
        parts.world.train_tasks.shape[1],
    )
    facts: dict[str, float] = {}
    if config.law != "none":
        law, facts = measure(config, parts, losses, ppl, seed)
    if config.selection in ("dos", "dos_spread"):
        ends = [
            (low, low + width) for width in (0.25, 0.35, 0.5, 0.75, 1.0) for low in np.arange(0, 1.001 - width, 0.05)
        ]
        mu, sigma = best_landscape(law, ppl, number * length, windows=np.array(ends))
        chosen = distance_to_optimum_select(
            *(ppl, np.full(len(ppl), length), mu, sigma),
            budget=number * length,
            match_spread=config.selection == "dos_spread",
            rng=rng,
        )
        facts |= {"best_mu": mu, "best_sigma": sigma}
        order = np.flatnonzero(chosen)
    elif config.selection == "random":
        order = rng.permutation(len(ppl))[:number]
    else:
        start = {"lowest": 0, "middle": (len(ppl) - number) // 2, "highest": len(ppl) - number}[config.selection]
        order = np.argsort(ppl, kind="stable")[start : start + number]
    return {"order": rng.permutation(order).astype(np.int32), "facts": facts}


def run(config: ConfigDict, log: train.RunLog) -> None:
    """The base model, perplexities, small runs and their law, the choice, and continual pre-training on it."""
    check_choice("selection", config.selection, SELECTIONS)
    check_choice("law", config.law, ("none", "classical", "perplexity"))
    if config.selection.startswith("dos") and config.law != "perplexity":
        raise ValueError(f"selection={config.selection!r} needs law='perplexity', got {config.law!r}")
    parts = build(config)
    reference = warm_start(config, parts.model, parts.world)
    score = jax.jit(lambda params, tokens: jnp.exp(-chunk_logprobs(parts.model, params, tokens)))
    ppl = np.asarray(score(reference, parts.world.train_tasks), np.float64)
    losses = small_runs(config, parts, reference)
    found = train.stack_seeds(config.seed, lambda seed: choose(config, parts, losses, ppl, seed))
    log.summary({"law": found["facts"]})
    state = fine_tune(config, log, parts, reference=reference, memory=jnp.asarray(found["order"]))
    report(config, log, parts, state)


TABLES = {
    "main": train.Table(
        arms={
            "dos": {},
            "dos_spread": {"selection": "dos_spread"},
            **{name: {"law": "none", "selection": name} for name in ("random", "lowest", "middle", "highest")},
        },
        metrics=["trained.loss"],
        claims=[
            *(train.better("dos", other, lower=True) for other in ("random", "lowest", "highest")),
            *(train.better(other, "highest", lower=True) for other in ("random", "lowest")),
        ],
    ),
    "law": train.Table(
        arms={name: {"law": name, "selection": "random", "steps": 1} for name in ("perplexity", "classical")},
        title="Scaling laws: R^2 on runs that the fit has not seen",
        metrics=["law.r2"],
        claims=[train.better("perplexity", "classical")],
    ),
}
