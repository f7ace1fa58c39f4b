"""FunReason: the losses of a thought and of the call it leads to, each a mean of its own (arXiv 2505.20192).

The paper (2025; later versions call it BalanceSFT) claims that supervised fine-tuning on function calls neglects the
call: thoughts are ten times longer, so a mean over tokens gives the call some 8% of the loss. Taken apart,

    L = alpha mean(think) + (1 - alpha) mean(call),   alpha = 0.7, each a mean over a row's own tokens

and then, on a pool of hard queries that the teacher failed: write calls, keep those that all judges pass, fine-tune on
them, take the solved queries out, again.

In the paper alpha is trained. The loss has dL/dalpha = think - call, so plain descent moves alpha towards the part with
the LOWER loss, away from what is hard: `balance="learned"` (sigmoid of a number) is there to show it, "fixed" is the
default. Choices of ours: "length" weighs by inverse length; a part that a row lacks gives its weight to the other; four
candidates for a query and round; the three judges err once in ten times; the world, `jaxrl_llm.data.worlds.calls`.

    python -m experiments.sweep funreason --table=main --vmap-seeds
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from experiments.policy_optimization._supervised import Parts, device_rows, fine_tune, report
from experiments.policy_optimization._training import World, check_choice, draw_tasks, make_optimizer, make_policy, play
from jaxrl_llm import ops, train
from jaxrl_llm.data import span_mask
from jaxrl_llm.data.worlds import calls
from jaxrl_llm.envs import SingleTurnEnv
from jaxrl_llm.types import Decoding, Metrics, Params, TrainState

NEEDS_SCALE = (
    "BFCL overall 76.93 -> 81.94 (fine-tuning) -> 83.66 with Qwen2.5-Coder-7B",
    "multi-turn 38.25 (fine-tuning) -> 47.00 over five rounds",
)
Balance = Literal["token", "fixed", "learned", "length"]


def multiscale_loss(
    logprobs: Float[Array, "B T"],
    think_mask: Bool[Array, "B T"],
    call_mask: Bool[Array, "B T"],
    *,
    alpha: float | Float[Array, ""] = 0.7,
    balance: Balance = "fixed",
    denominator: Float[Array, ""] | float | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """`alpha * think + (1 - alpha) * call` of each row, means over its tokens of a part, then the mean over rows that
    have any ("fixed"; "learned" is the same, with an `alpha` that has a gradient). "length" takes `alpha = (1/n) / (1/n
    + 1/m)` for n tokens of thought and m of call; "token" is plain fine-tuning, the mean over all tokens.

    Args:
      denominator: the number of rows (of tokens for "token") of a whole batch of which this is a part.

    Raises:
      ValueError: an unknown `balance`; `alpha` outside [0, 1]; outside of jit, masks that overlap.
    """
    check_choice("balance", balance, ("token", "fixed", "learned", "length"))
    if isinstance(alpha, float) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must lie in [0, 1]")
    if not isinstance(think_mask, jax.core.Tracer) and bool((think_mask & call_mask).any()):
        raise ValueError("a token cannot be thought and call at once: think_mask and call_mask overlap")
    mask, parts = think_mask | call_mask, {"think": think_mask, "call": call_mask}
    metrics = {name: ops.masked_mean(-logprobs, part) for name, part in parts.items()}
    if balance == "token":
        return ops.sft_loss(logprobs, mask, denominator=denominator)[0], metrics
    think, call = (-ops.sequence_logprob(logprobs, part, length_power=1) for part in parts.values())
    tokens, call_tokens = jnp.sum(mask, axis=1), jnp.sum(call_mask, axis=1)
    weight = call_tokens / jnp.maximum(tokens, 1) if balance == "length" else alpha
    weight = jnp.where(call_tokens == 0, 1, jnp.where(call_tokens == tokens, 0, weight))
    losses, rows = weight * think + (1 - weight) * call, tokens > 0
    total = jnp.sum(rows) if denominator is None else denominator
    loss = ops.masked_sum(losses, rows) / jnp.maximum(total, 1)
    return loss, metrics | {"alpha": ops.masked_mean(weight, rows)}


def two_gate_split(quality: Bool[np.ndarray, "N"], answer: Bool[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """2 (to train on) where both checks pass, 1 (the hard pool) where the answer alone fails, 0 (dropped) elsewhere."""
    return np.where(quality, np.where(answer, 2, 1), 0)


def unanimous(grades: Float[Array, "... J"], *, threshold: float = 0.5) -> Bool[Array, "..."]:
    """Whether every judge's grade reaches the threshold."""
    return jnp.all(grades >= threshold, axis=-1)


def self_refine_loop(
    state: Any,
    pool: Bool[np.ndarray, "... N"],
    generate: Callable[[Any, int], Any],
    judge: Callable[[Any], Bool[Array, "... N C"]],
    fit: Callable[[Any, Any, np.ndarray, int], Any],
    *,
    max_rounds: int = 10,
) -> tuple[Any, Bool[np.ndarray, "... N"]]:
    """Rounds over N queries until none is left: `generate(state, round)` C candidates of each, `judge(candidates)`
    which pass, `fit(state, candidates, accepted, round)`. Returns the last state and which queries are unsolved."""
    for number in range(max_rounds):
        if not pool.any():
            break
        candidates = generate(state, number)
        accepted = pool[..., None] & np.asarray(judge(candidates))
        state, pool = fit(state, candidates, accepted, number), pool & ~accepted.any(axis=-1)
    return state, pool


def make_world(config: ConfigDict) -> tuple[World, dict[str, Array]]:
    """The calls that the teacher got right to train on, other queries to test on, copies to begin with; and the hard
    pool: queries of which the teacher's call was wrong."""
    rng, number = np.random.default_rng(1), config.world.test_problems
    queries = calls.make_queries(rng, config.world.train_problems)
    fates = two_gate_split(np.ones(len(queries["hard"]), bool), calls.teach(rng, queries))
    shown = {name: rows[fates == 2] for name, rows in calls.demonstrate_calls(rng, queries).items()}
    test, copies = calls.make_queries(rng, number), calls.demonstrate_copies(rng, number)
    world = World(
        SingleTurnEnv(calls.call_reward),
        train_tasks=device_rows(shown, config.max_length),
        test_tasks=jax.tree.map(jnp.asarray, test) | {"copies": device_rows(copies, config.max_length)},
        stop_sequences=[[calls.EOS]],
        vocab_size=calls.vocab_size(),
        demonstrate=calls.demonstrate_copies,
    )
    return world, {name: jnp.asarray(rows[fates == 1]) for name, rows in queries.items()}


def build(config: ConfigDict) -> Parts:
    """Supervised fine-tuning with the balanced loss, from a policy that can copy."""
    world, _ = make_world(config)
    model, optimizer = make_policy(config, world), make_optimizer(config)
    queries = {name: rows for name, rows in world.test_tasks.items() if name != "copies"}

    def init(reference: Params, seed: Array) -> TrainState:
        return train.init_state({"policy": reference, "alpha": jax.scipy.special.logit(config.alpha)}, optimizer, seed)

    def evaluate(state: TrainState) -> dict[str, Array]:
        policy = state.params["policy"]
        called = play(config, model, policy, world, queries, jax.random.key(1), 1, Decoding(greedy=True)).rewards
        _, logprobs, _, mask = train.score_packed(model, policy, world.test_tasks["copies"])
        parts = {"hard_success": queries["hard"], "easy_success": ~queries["hard"]}
        found = {name: ops.masked_mean(called, part) for name, part in parts.items()}
        found |= {"copy_nll": -ops.masked_mean(logprobs, mask), "alpha": jax.nn.sigmoid(state.params["alpha"])}
        return {"success": called, **found}

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        rows, _ = draw_tasks(config, world.train_tasks, state)
        return update(config, model, optimizer, state, rows)

    return Parts(world, model, init, iteration, evaluate)


def update(
    config: ConfigDict, model: Any, optimizer: Any, state: TrainState, rows: dict[str, Array]
) -> tuple[TrainState, Metrics]:
    """One step of fine-tuning on rows."""
    total = jnp.sum(rows["mask"] if config.balance == "token" else jnp.any(rows["mask"], axis=1))

    def loss_fn(params: Params, rows: dict[str, Array]) -> tuple[Array, Metrics]:
        _, logprobs, _, mask = train.score_packed(model, params["policy"], rows)
        thought = span_mask(rows["tokens"], calls.OPEN, calls.CLOSE)
        alpha = jax.nn.sigmoid(params["alpha"]) if config.balance == "learned" else config.alpha
        return multiscale_loss(
            logprobs, mask & thought, mask & ~thought, alpha=alpha, balance=config.balance, denominator=total
        )

    loss, grads, metrics = train.accumulate_gradients(loss_fn, state.params, rows, config.micro_batches)
    state, norms = train.apply_gradients(state, grads, optimizer, loss)
    return state, {"loss": loss, **metrics, **norms}


def refine(config: ConfigDict, log: train.RunLog, parts: Parts, state: TrainState) -> TrainState:
    """The paper's loop on the hard pool; every round is a stage of the run."""
    world, pool = make_world(config)
    model, optimizer = parts.model, make_optimizer(config)

    def generate(state: TrainState, number: int) -> dict[str, Array]:
        def write(state: TrainState) -> dict[str, Array]:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(4 + number), state.seed))
            sampled = play(config, model, state.params["policy"], world, pool, keys[0], config.candidates)
            errs = jax.random.bernoulli(keys[1], config.judge_error, (*sampled.rewards.shape, 3))
            grades = jnp.abs(sampled.rewards[:, None] - errs)
            rows = {"tokens": sampled.tokens, "mask": sampled.mask, "grades": grades}
            return {name: leaf.reshape(-1, config.candidates, leaf.shape[-1]) for name, leaf in rows.items()}

        return train.over_seeds(write, config.seed)(state)

    def fit(state: TrainState, candidates: dict[str, Array], accepted: np.ndarray, number: int) -> TrainState:
        def init(seed: Array, previous: tuple[Params, dict[str, Array]]) -> TrainState:
            rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), previous[1])
            return train.init_state(previous[0], optimizer, seed, memory=rows)

        def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5 + number), state.seed), state.step)
            weights = jnp.where(state.memory["accepted"], 0.0, -jnp.inf)
            chosen = jax.random.categorical(key, weights, shape=(config.prompts,))
            rows = {name: state.memory[name][chosen] for name in ("tokens", "mask")}
            rows["mask"] &= state.memory["accepted"][chosen, None]  # where there is none: nothing to learn from
            return update(config, model, optimizer, state, rows)

        log.info(f"round {number}: {np.sum(accepted)} of {accepted.size} calls accepted")
        rows = {"tokens": candidates["tokens"], "mask": candidates["mask"], "accepted": jnp.asarray(accepted)}
        return train.loop(
            init, iteration, steps=config.round_steps, log=log, stage=f"round_{number}", previous=(state.params, rows)
        )

    start = np.ones((*np.shape(state.step), len(pool["hard"])), bool)
    state, left = self_refine_loop(
        state, start, generate, lambda candidates: unanimous(candidates["grades"]), fit, max_rounds=config.rounds
    )
    log.summary({"pool_left": np.mean(left, axis=-1)})
    return state


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Fine-tuning, then the loop, then the report."""
    parts = build(config)
    state = fine_tune(config, log, parts)
    report(config, log, parts, refine(config, log, parts, state) if config.rounds else state)


TABLES = {
    "main": train.Table(
        arms={
            "sft": {"balance": "token"},
            "alpha_0.7": {},
            "alpha_0.5": {"alpha": 0.5},
            "alpha_0.1": {"alpha": 0.1},
            "learned": {"balance": "learned"},
        },
        metrics=["trained.success", "trained.hard_success", "trained.copy_nll", "trained.alpha"],
        claims=[
            train.better("alpha_0.7", "sft"),
            train.better("alpha_0.5", "sft"),
            train.better("learned", "alpha_0.7", metric="trained.alpha", lower=True),  # thoughts have the higher loss
            train.better("alpha_0.7", "sft", metric="trained.copy_nll", lower=True),
        ],
    ),
    "loop": train.Table(
        arms={"once": {"steps": 501}, "loop": {"rounds": 3}},
        title="FunReason: 300 steps and three rounds on the hard pool, against as many steps without",
        metrics=["trained.hard_success", "trained.easy_success"],
        claims=[train.better("loop", "once"), train.better("loop", "once", metric="trained.easy_success")],
    ),
}
