"""What the family's pages share: a small policy on a world of problems, its warm start, the run and its report.

A page writes what its paper adds: which tasks are drawn, rewards, advantages, the loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree
from ml_collections import ConfigDict

from jaxrl_llm import ops, train
from jaxrl_llm.data.packing import pack_sequences
from jaxrl_llm.data.worlds import arithmetic
from jaxrl_llm.envs import SingleTurnEnv
from jaxrl_llm.models import DecoderConfig, Model, make_decoder, make_scalar_head
from jaxrl_llm.sampling import rollout, rollout_hidden, score_rollout
from jaxrl_llm.types import Batch, Decoding, Metrics, Params, Rollout, TrainState


class World(NamedTuple):
    """Problems to train and to test on. Tasks are pytrees whose arrays have the problems as their first axis."""

    env: Any
    train_tasks: PyTree
    test_tasks: PyTree
    stop_sequences: list[list[int]]
    vocab_size: int
    demonstrate: Callable[[np.random.Generator, int], dict[str, np.ndarray]]  # tokens, mask, lengths
    prepare: Callable[[Model, Params], Params] = lambda model, params: (
        params
    )  # of freshly drawn weights, before all else


def arithmetic_world(config: ConfigDict, reward: Callable[..., Array] = arithmetic.sum_reward) -> World:
    """Sums of `config.world.terms` terms modulo `config.world.modulus`; demonstrations as `config.world.shown` says."""
    shown, sums = dict(config.world.shown), {"terms": tuple(config.world.terms), "modulus": config.world.modulus}

    def tasks(seed: int, number: int) -> PyTree:
        return arithmetic.as_tasks(arithmetic.make_sums(np.random.default_rng(seed), number, **sums))

    def demonstrate(rng: np.random.Generator, number: int) -> dict[str, np.ndarray]:
        return arithmetic.demonstrate_sums(
            rng, arithmetic.make_sums(rng, number, **sums), modulus=config.world.modulus, **shown
        )

    return World(
        SingleTurnEnv(reward),
        train_tasks=tasks(1, config.world.train_problems),
        test_tasks=tasks(2, config.world.test_problems),
        stop_sequences=[[arithmetic.EOS]],
        vocab_size=arithmetic.FIRST_NUMBER + config.world.modulus,
        demonstrate=demonstrate,
    )


def make_policy(config: ConfigDict, world: World) -> Model:
    """A decoder of the config's sizes, with the world's vocabulary unless `config.vocab_size` says otherwise."""
    return make_decoder(DecoderConfig(config.vocab_size or world.vocab_size, **config.model))


def warm_start(config: ConfigDict, model: Model, world: World) -> Params:
    """The policy to start from: trained on the world's demonstrations, the same for all seeds and arms.

    It takes seconds and is a pure function of the config, so a run that is taken up again makes it again. Without steps
    it is a policy that knows nothing.
    """
    warm = config.warm_start
    if not warm.steps:
        return world.prepare(model, model.init(jax.random.key(warm.seed)))
    optimizer = train.make_optimizer(warm.optimizer, total_updates=warm.steps)
    rng = np.random.default_rng(warm.seed)
    batches = []
    for _ in range(warm.steps):
        shown = world.demonstrate(rng, 4 * warm.rows)
        batches.append(pack_sequences(**shown, num_rows=warm.rows, row_length=warm.row_length))

    @jax.jit
    def fit(batches: dict[str, Array]) -> Params:
        state = train.init_state(world.prepare(model, model.init(jax.random.key(warm.seed))), optimizer, warm.seed)
        step = train.make_sft_step(model, optimizer)
        return jax.lax.scan(lambda state, batch: (step(state, batch)[0], None), state, batches)[0].params

    return fit(jax.tree.map(lambda *leaves: np.stack(leaves), *batches))


def make_optimizer(config: ConfigDict, *, critic: bool = False) -> optax.GradientTransformation:
    """The policy's optimizer and, with a critic, another with its own rate for that."""
    total = config.steps * config.mini_batches
    policy = train.make_optimizer(config.optimizer, total_updates=total)
    if not critic:
        return policy
    parts = {"policy": policy, "critic": train.make_optimizer(config.critic_optimizer, total_updates=total)}
    return optax.partition(parts, lambda params: {name: name for name in params})


def start_params(config: ConfigDict, reference: Params, *, critic: bool = False) -> Params:
    """`{"policy"}` and, with a critic, `{"critic"}`: a trunk of its own, as the policy starts, and a head of zeros."""
    if not critic:
        return {"policy": reference}
    head = make_scalar_head(config.model.width)[0](jax.random.key(0))
    return {"policy": reference, "critic": {"decoder": reference, "head": head}}


def critic_values(config: ConfigDict, model: Model, params: Params, sampled: Rollout) -> Float[Array, "B T"]:
    """The critic's value of the state before each token."""
    apply_head = make_scalar_head(config.model.width)[1]
    return apply_head(params["critic"]["head"], rollout_hidden(model, params["critic"]["decoder"], sampled))


def ppo_batch(
    config: ConfigDict, model: Model, params: Params, sampled: Rollout, token_rewards: Float[Array, "B T"]
) -> Batch:
    """Whitened advantages by GAE, and what the critic is trained on, from rewards of tokens."""
    mask = sampled.mask & sampled.scorable[:, None]
    values = critic_values(config, model, params, sampled)
    advantages = ops.gae_advantages(token_rewards, values, mask, gamma=1.0, lam=config.lam)
    whitened, returns = ops.masked_whiten(advantages, mask), advantages + values
    return Batch(sampled, mask, sampled.logprobs, whitened, returns=returns, old_values=values)


def draw_tasks(
    config: ConfigDict, tasks: PyTree, state: TrainState, *, count: int | None = None
) -> tuple[PyTree, jax.Array]:
    """`config.prompts` (or `count`) different problems for this step, and the step's key for what else is random."""
    chosen, key = choose_problems(config, tasks, state, count=count)
    return jax.tree.map(lambda leaf: leaf[chosen], tasks), key


def choose_problems(
    config: ConfigDict,
    tasks: PyTree,
    state: TrainState,
    probs: Float[Array, "N"] | None = None,
    *,
    count: int | None = None,
) -> tuple[Int[Array, "P"], jax.Array]:
    """Which problems the step takes, evenly or with the given probabilities, none twice; and the step's key."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), state.seed), state.step)
    task_key, key = jax.random.split(key)
    number = jax.tree.leaves(tasks)[0].shape[0]
    return jax.random.choice(task_key, number, (count or config.prompts,), replace=False, p=probs), key


def play(
    config: ConfigDict,
    model: Model,
    params: Params,
    world: World,
    tasks: PyTree,
    key: jax.Array,
    group_size: int,
    decoding: Decoding | None = None,
) -> Rollout:
    """`group_size` rollouts of each task, under the config's limits."""
    return rollout(
        model,
        params,
        world.env,
        tasks,
        key,
        max_length=config.max_length,
        max_turns=config.max_turns,
        max_turn_tokens=config.max_turn_tokens,
        stop_sequences=world.stop_sequences,
        decoding=decoding or Decoding(**config.decoding),
        group_size=group_size,
        num_slots=config.num_slots,
    )


def score(model: Model, params: Params, sampled: Rollout) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probs and entropies of the rollouts' tokens under other parameters and the same decoding."""
    return score_rollout(model, params, sampled, decoding=sampled.decoding)


def make_step(config: ConfigDict, loss_fn: Callable[..., Any], optimizer: optax.GradientTransformation) -> Callable:
    """`train.make_policy_step` with the config's mean, mini-batches and micro-batches."""
    return train.make_policy_step(
        loss_fn,
        optimizer,
        agg=config.agg,
        max_len=config.max_turn_tokens,
        micro_batches=config.micro_batches,
        mini_batches=config.mini_batches,
    )


def make_clip_step(
    config: ConfigDict,
    model: Model,
    optimizer: optax.GradientTransformation,
    acting: Callable[[Params], tuple[Model, Params]] | None = None,
) -> Callable[..., Any]:
    """`step(state, batch) -> (state, metrics)`: PPO's clipped loss with the config's clips and mean; the k3
    estimate of the KL where `config.kl_coefficient` is not 0; the critic's loss where the batch has returns (token
    mean, as then the policy's must be). `acting(policy)` is what the rollouts were drawn from, where that is not the
    model itself."""

    def loss_fn(params: Params, batch: Batch, denominator: Array) -> tuple[Array, Metrics]:
        mean: dict[str, Any] = {"agg": config.agg, "max_len": config.max_turn_tokens, "denominator": denominator}
        decoding = Decoding(**config.decoding)
        sampler = acting(params["policy"]) if acting else (model, params["policy"])
        logprobs, entropy = score_rollout(*sampler, batch.rollout, mask=batch.mask, decoding=decoding)
        loss, metrics = ops.ppo_clip_loss(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            weights=batch.weights,
            **mean,
        )
        if config.kl_coefficient:
            assert batch.ref_logprobs is not None  # whoever makes the batch puts it there
            kl = ops.kl_estimate(logprobs, batch.ref_logprobs, kind="k3", mask=batch.mask)
            loss += config.kl_coefficient * ops.reduce_loss(kl, batch.mask, **mean)
            metrics["kl"] = ops.masked_mean(kl, batch.mask)
        if batch.returns is not None:
            values, clip = critic_values(config, model, params, batch.rollout), config.value_clip
            error, value_metrics = ops.value_loss(
                values, batch.old_values, batch.returns, batch.mask, clip=clip, denominator=denominator
            )
            loss, metrics = loss + error, metrics | value_metrics
        return loss, metrics | {"entropy": ops.masked_mean(entropy, batch.mask)}

    return make_step(config, loss_fn, optimizer)


def init_policy(
    config: ConfigDict, optimizer: optax.GradientTransformation, *, critic: bool = False
) -> Callable[[Params, Array], TrainState]:
    """`init(reference, seed) -> state`, with a critic if asked for, and with the reference if there is a KL."""

    def init(reference: Params, seed: Array) -> TrainState:
        ref_params = reference if config.kl_coefficient else None
        return train.init_state(start_params(config, reference, critic=critic), optimizer, seed, ref_params=ref_params)

    return init


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError, with the choices there are, for a setting that has none of them."""
    if value not in choices:
        raise ValueError(f"config.{name}={value!r} must be one of {', '.join(choices)}")


def responses(sampled: Rollout) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """The tokens behind each prompt, from position 0 on, and how many there are."""
    places = jnp.arange(sampled.tokens.shape[1]) + sampled.prompt_lengths[:, None]
    tokens = jnp.take_along_axis(sampled.tokens, jnp.minimum(places, sampled.tokens.shape[1] - 1), axis=1)
    return tokens, sampled.lengths - sampled.prompt_lengths


def describe_rollout(sampled: Rollout) -> Metrics:
    """Success (mean reward), tokens per response, and how many did not end by themselves."""
    return {
        "success": ops.masked_mean(sampled.rewards, sampled.scorable),
        "response_tokens": jnp.mean(jnp.sum(sampled.mask, axis=1, dtype=jnp.float32)),
        "truncated": jnp.mean(sampled.truncated, dtype=jnp.float32),
    }


def describe_lengths(sampled: Rollout, tasks: PyTree) -> Metrics:
    """`describe_rollout`, and how long right and wrong responses are."""
    lengths = jnp.sum(sampled.mask, axis=1, dtype=jnp.float32)
    right = sampled.rewards > 0
    by_outcome = {"right": ops.masked_mean(lengths, right), "wrong": ops.masked_mean(lengths, ~right)}
    return describe_rollout(sampled) | {f"tokens_{name}": value for name, value in by_outcome.items()}


class Parts(NamedTuple):
    """What a page hands to `train_policy`; shapes of all of it can be had without running anything."""

    world: World
    model: Model
    init: Callable[[Params, jax.Array], TrainState]  # reference, seed; `params["policy"]` is the policy
    iteration: Callable[[TrainState], tuple[TrainState, Metrics]]
    describe: Callable[[Rollout, PyTree], Metrics] = lambda sampled, tasks: describe_rollout(sampled)  # held out
    play_test: Callable[[Params], Rollout] | None = None  # None: one plain episode of each of the world's test tasks


def programs(config: ConfigDict, parts: Parts) -> dict[str, train.Program]:
    """What `experiments.plan` compiles for a page: an iteration, and a step of its sampler. In the iteration
    the sampler's loop, whose length no compiler knows, counts once."""
    made = step_programs(config, parts.model, parts.iteration, parts.init)
    iteration = made["train"]._replace(function=parts.iteration, arguments={"state": made["train"].arguments["state"]})
    return made | {"train": iteration}


def step_programs(
    config: ConfigDict, model: Model, step: Callable[..., Any], init: Callable[..., TrainState], **options: Any
) -> dict[str, train.Program]:
    """`train.rollout_programs` with the config's sizes: a train step on all rollouts of an iteration."""
    return train.rollout_programs(
        model,
        step,
        init,
        rows=config.prompts * config.group_size,
        length=config.max_length,
        num_slots=config.num_slots,
        max_turns=config.max_turns,
        max_turn_tokens=config.max_turn_tokens,
        decoding=Decoding(**config.decoding),
        **options,
    )


def train_policy(config: ConfigDict, log: train.RunLog, parts: Parts) -> tuple[TrainState, Params]:
    """Warm start, then iterations until the steps are done. The summary has the held-out metrics of both policies (one
    sampled response a problem), and means over the run: success held out and in training, tokens a response, entropy
    and gradient norm.

    Returns:
      The last state, and the policy that it started from.
    """
    world, model, init, iteration, describe, play_test = parts
    reference = warm_start(config, model, world)

    def evaluate(policy: Params) -> tuple[Metrics, Array]:
        if play_test is None:
            sampled = play(config, model, policy, world, world.test_tasks, jax.random.key(1), 1)
        else:
            sampled = play_test(policy)
        entropy = score(model, policy, sampled)[1]
        metrics = {"entropy": ops.masked_mean(entropy, sampled.mask)} | describe(sampled, world.test_tasks)
        return metrics, sampled.rewards

    state = train.loop(
        jax.tree_util.Partial(init, reference),
        iteration,
        steps=config.steps,
        log=log,
        evaluate=lambda state: evaluate(state.params["policy"])[0],
        evaluate_every=config.evaluate_every,
    )
    trained = state.params["policy"]
    start = jax.tree.map(lambda leaf, like: jnp.broadcast_to(leaf, like.shape), reference, trained)
    summary: dict[str, Any] = {}
    for name, policy in {"warm_start": start, "trained": trained}.items():
        summary[name], rewards = train.fetch(train.over_seeds(evaluate, config.seed)(policy))
        log.outcomes(f"{name}.success", rewards)
    curves = {"success": "eval/success", "train_success": "success", "train_tokens": "response_tokens"}
    curves |= {"entropy": "entropy", "grad_norm": "grad_norm"}
    found = {name: read_curve(config, log, metric) for name, metric in curves.items()}
    summary["mean"] = {name: np.mean(curve, axis=-1) for name, curve in found.items() if curve.size}
    log.summary({**summary, "minutes": round((time.perf_counter() - log.opened) / 60, 2)})
    return state, start


def read_curve(config: ConfigDict, log: train.RunLog, metric: str) -> np.ndarray:
    """A metric of the lines that have it, in the order of steps: `[N]`, or `[seeds, N]` for a tuple of seeds."""
    lines = [line for line in train.read_metrics(log.workdir) if line.get(metric) is not None]
    if not isinstance(config.seed, tuple):
        return np.array([line[metric] for line in lines])
    return np.array([[line[metric] for line in lines if line["seed"] == seed] for seed in config.seed])
