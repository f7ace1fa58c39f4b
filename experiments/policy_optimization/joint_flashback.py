"""Joint flashback adaptation: new tasks learnt, while answers to old prompts stay as they were (arXiv 2505.15467).

The paper (Joint Flashback Adaptation for Forgetting-Resistant Instruction Tuning, 2025) claims better new tasks and
less forgetting with a few PROMPTS of old tasks ("flashbacks") and no old answers. f is the frozen model, g the trained
one:

    L_sft = -mean log g(y | x)                    on the new tasks
    L_div = mean [KL(f || g) + KL(g || f)]        on flashbacks, continued by f once
    L_lat = mean over pairs of lam L_sft(new) + (1 - lam) L_div(flashback)      on latent tasks in between
    g1 = grad(L_sft + L_lat), g2 = grad L_div;  where <g1, g2> < 0: g1 -= <g1, g2> / |g2|^2 g2;  update with g1 + g2

What is known of the latent tasks: nearest neighbors and low-rank increments. All else is ours: e(x) is f's last hidden
state at the end of a prompt. Eight latent tasks have a key and an increment of rank 4 of the last layer's second
feed-forward matrix, weighted by the softmax of -|e - key|^2 / tau over the two nearest keys. A pair has the increment
of lam e(new) + (1 - lam) e(flashback), lam ~ Beta(1/2, 1/2), in both of its sequences; any other x that of e(x).
Weights of all terms are 1; the projection goes one way. The world is ours: `jaxrl_llm.data.worlds.string_tasks`.

    python -m experiments.sweep joint_flashback --table=main --vmap-seeds
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from experiments.policy_optimization._supervised import Parts, fine_tune, report
from experiments.policy_optimization._training import World, check_choice, make_optimizer, make_policy
from jaxrl_llm import ops, train
from jaxrl_llm.data.worlds import string_tasks
from jaxrl_llm.data.worlds.string_tasks import LENGTH, PROMPT
from jaxrl_llm.models import LoraConfig, Model, apply_lora
from jaxrl_llm.models.decoder import output_logits
from jaxrl_llm.types import Metrics, Params, TrainState

NEEDS_SCALE = ("over 1000 instruction tasks, arithmetic and general reasoning, with Vicuna-13B and Llama-3.1-8B",)


def latent_task_weights(
    e: Float[Array, "B D"], keys: Float[Array, "Z D"], *, k: int, tau: float | Float[Array, ""]
) -> Float[Array, "B Z"]:
    """Softmax of `-|e - key|^2 / tau` over the `k` nearest keys, of equally near ones the first; 0 for the others.

    Raises:
      ValueError: `k` is not between 1 and the number of keys.
    """
    if not 1 <= k <= len(keys):
        raise ValueError(f"k={k} must lie between 1 and {len(keys)}, the number of latent tasks")
    distances = jnp.sum((e[:, None] - keys) ** 2, axis=-1)
    _, nearest = jax.lax.top_k(-distances, k)
    near = jnp.any(nearest[..., None] == jnp.arange(len(keys)), axis=1)
    return ops.masked_softmax(-distances / tau, near)


def apply_increment(
    w: Float[Array, "B Z"], a: Float[Array, "Z r I"], b: Float[Array, "Z O r"]
) -> tuple[Float[Array, "I R"], Float[Array, "B R O"]]:
    """The increments `sum_z w_z b_z a_z` of a matrix that maps I to O, as LoRA's two factors with R = Z r; the
    transpose of their product is the increment [B, O, I], which is never formed."""
    down = jnp.reshape(a, (-1, a.shape[2])).T
    up = w[:, :, None, None] * jnp.swapaxes(b, 1, 2)
    return down, up.reshape(len(w), -1, b.shape[1])


def sample_continuation(
    model: Model, params: Params, tokens: Int[Array, "N T"], key: Array
) -> tuple[Int[Array, "N T"], Float[Array, "N L V"]]:
    """The prompts with answers drawn from the model, and its logits at the answers."""

    def write(place: int, tokens: Int[Array, "N T"]) -> Int[Array, "N T"]:
        logits = model.logits(params, tokens)[:, place - 1]
        return tokens.at[:, place].set(jax.random.categorical(jax.random.fold_in(key, place), logits))

    tokens = jax.lax.fori_loop(PROMPT, PROMPT + LENGTH, write, tokens)
    return tokens, model.logits(params, tokens)[:, PROMPT - 1 : -1]


def make_world(config: ConfigDict) -> tuple[World, Array]:
    """New tasks to train on, old and new ones to test, old ones for f; and flashbacks with their right answers, which
    the replay of answers alone may see."""
    rng, per_task = np.random.default_rng(1), config.world.test_problems

    def strings(shifts: tuple[int, ...], number: int) -> Array:
        return jnp.asarray(string_tasks.make_strings(rng, shifts, number)["tokens"])

    old, new = tuple(config.world.old_shifts), tuple(config.world.new_shifts)
    world = World(
        env=None,
        train_tasks=strings(new, config.world.train_problems),
        test_tasks={"old": strings(old, per_task), "new": strings(new, per_task)},
        stop_sequences=[],
        vocab_size=string_tasks.vocab_size(),
        demonstrate=lambda rng, number: string_tasks.make_strings(
            rng, old, -(-number // (len(old) * len(string_tasks.OPERATIONS))), shuffle=True
        ),
    )
    return world, strings(old, config.world.flashbacks or 1)


def build(config: ConfigDict) -> Parts:
    """One update: gradients of what is new and of what is old, and what to do where they are at odds."""
    check_choice("keep", config.keep, ("nothing", "one_way", "symmetric", "answers"))
    check_choice("project", config.project, ("none", "one_way", "symmetric"))
    keep = config.keep
    if keep != "nothing" and not config.world.flashbacks:
        warnings.warn("no flashbacks: what is left is supervised fine-tuning", stacklevel=2)
        keep = "nothing"
    world, flashbacks = make_world(config)
    model, optimizer = make_policy(config, world), make_optimizer(config)
    number, rank, last = config.latent_tasks, config.latent_rank, config.model.num_layers - 1
    layer = "0" if config.model.scan_layers else str(last)
    lora = LoraConfig(number * rank, float(number * rank), targets=(f"layers.{layer}.down",))
    adapted = apply_lora(model, lora)

    def ends(reference: Params, tokens: Int[Array, "N T"]) -> Float[Array, "N D"]:
        """e(x), which no gradient reaches."""
        return jax.lax.stop_gradient(model.apply(reference, tokens[:, :PROMPT])[0][:, -1])

    def answer_logits(params: Params, w: Float[Array, "B Z"], tokens: Int[Array, "B T"]) -> Float[Array, "B L V"]:
        down, up = apply_increment(w, params["a"], params["b"])

        def one(up: Array, row: Array) -> Array:
            factors = {"lora_a": down, "lora_b": up}
            if config.model.scan_layers:  # a stack of layers, of which the last has increments
                factors = {name: jnp.zeros((last + 1, *x.shape)).at[-1].set(x) for name, x in factors.items()}
            joined = {"base": params["policy"], "lora": {"layers": {layer: {"down": factors}}}}
            hidden, _ = adapted.apply(joined, row[None])
            return output_logits(adapted, joined, hidden[0, PROMPT - 1 : -1])

        return jax.vmap(one)(up, tokens)

    def increments(params: Params, e: Float[Array, "B D"], tau: Array) -> Float[Array, "B Z"]:
        w = latent_task_weights(e, params["keys"], k=config.nearest, tau=tau)
        return w if config.increments else jnp.zeros_like(w)

    def init(reference: Params, seed: Array) -> TrainState:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(6), seed), 5)
        new, old = ends(reference, world.train_tasks), ends(reference, flashbacks)
        share = jax.random.uniform(keys[0], (number, 1))
        mixed = share * jax.random.choice(keys[1], new, (number,)) + (1 - share) * jax.random.choice(
            keys[2], old, (number,)
        )
        continued, logits = sample_continuation(model, reference, flashbacks, keys[3])
        tau = jnp.median(jnp.sum((new[:, None] - mixed) ** 2, axis=-1))
        memory = {"tau": tau, "new_ends": new, "old_ends": old, "flashbacks": continued, "logits": logits}
        width, inner = config.model.width, config.model.ffn_width
        params = {"policy": reference, "keys": mixed, "b": jnp.zeros((number, width, rank))}
        params["a"] = jax.random.normal(keys[4], (number, rank, inner)) / inner**0.5
        return train.init_state(params, optimizer, seed, ref_params=reference, memory=memory)

    def nll(logits: Float[Array, "B L V"], tokens: Int[Array, "B T"]) -> Float[Array, "B"]:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, PROMPT:]), axis=1)

    def drift(logits: Float[Array, "B L V"], before: Float[Array, "B L V"]) -> Float[Array, "B"]:
        measure = ops.categorical_kl if keep == "one_way" else ops.symmetric_kl
        return jnp.mean(measure(before, logits), axis=1)

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        key, memory = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), state.seed), state.step), state.memory
        keys = jax.random.split(key, 3)
        fresh = jax.random.randint(keys[0], (config.prompts,), 0, len(world.train_tasks))
        back = jax.random.randint(keys[1], (config.prompts,), 0, len(flashbacks))
        new, old, before = world.train_tasks[fresh], memory["flashbacks"][back], memory["logits"][back]
        new_ends, old_ends = memory["new_ends"][fresh], memory["old_ends"][back]
        lam = jax.random.beta(keys[2], 0.5, 0.5, (config.prompts, 1))

        def learn(params: Params) -> Array:
            if not config.latent or keep == "nothing":
                return jnp.mean(nll(answer_logits(params, increments(params, new_ends, memory["tau"]), new), new))
            middle = lam * new_ends + (1 - lam) * old_ends
            w = increments(params, jnp.concatenate([new_ends, middle, middle]), memory["tau"])
            logits = answer_logits(params, w, jnp.concatenate([new, new, old]))
            alone, pair_new, pair_old = jnp.split(logits, 3)
            pairs = lam[:, 0] * nll(pair_new, new) + (1 - lam[:, 0]) * drift(pair_old, before)
            return jnp.mean(nll(alone, new) + pairs)

        def remember(params: Params) -> Array:
            right = flashbacks[back]
            logits = answer_logits(
                params, increments(params, old_ends, memory["tau"]), right if keep == "answers" else old
            )
            return jnp.mean(nll(logits, right) if keep == "answers" else drift(logits, before))

        loss, grads = jax.value_and_grad(learn)(state.params)
        metrics = {"new_loss": loss}
        if keep != "nothing":
            kept, kept_grads = jax.value_and_grad(remember)(state.params)
            free = grads if config.project == "none" else ops.project_conflicting_grads(grads, kept_grads)
            if config.project == "symmetric":
                kept_grads = ops.project_conflicting_grads(kept_grads, grads)
            loss, grads = loss + kept, jax.tree.map(jnp.add, free, kept_grads)
            metrics["old_loss"] = kept
        state, norms = train.apply_gradients(state, grads, optimizer, loss)
        return state, {"loss": loss, **metrics, **norms}

    def evaluate(state: TrainState) -> dict[str, Array]:
        def right(logits: Float[Array, "N L V"]) -> Float[Array, "N"]:
            # where each symbol is the likeliest behind the right ones, greedy decoding writes them all
            return 1.0 * jnp.all(jnp.argmax(logits, axis=-1) == tokens[:, PROMPT:], axis=1)

        tokens, olds = jnp.concatenate([*world.test_tasks.values()]), len(world.test_tasks["old"])
        w = increments(state.params, ends(state.ref_params, tokens), state.memory["tau"])
        now = right(answer_logits(state.params, w, tokens))
        before = right(model.logits(state.ref_params, tokens)[:, PROMPT - 1 : -1])[:olds]
        by_task = (jnp.mean(x.reshape(-1, config.world.test_problems), axis=1) for x in (before, now[:olds]))
        return {"old": now[:olds], "new": now[olds:], "before": before, "forgetting": train.forgetting(*by_task)}

    return Parts(world, model, init, iteration, evaluate)


def run(config: ConfigDict, log: train.RunLog) -> None:
    """f on the old tasks, then g on the new ones, then both on both."""
    parts = build(config)
    report(config, log, parts, fine_tune(config, log, parts))


TABLES = {
    "main": train.Table(
        arms={
            "sft": {"keep": "nothing", "increments": False},
            "one_way": {"keep": "one_way", "project": "none", "latent": False, "increments": False},
            "symmetric": {"project": "none", "latent": False, "increments": False},
            "projected": {"latent": False, "increments": False},
            "joint": {},
            "no_latent": {"latent": False},
            "replay": {"keep": "answers", "project": "none", "latent": False, "increments": False},
        },
        metrics=["trained.old", "trained.new", "trained.forgetting", "trained.before"],
        claims=[
            train.better("one_way", "sft"),
            train.better("symmetric", "one_way"),
            train.better("joint", "projected", by=-0.01),
            train.better("joint", "projected", by=-0.01, metric="trained.new"),
            train.better("joint", "no_latent"),
            train.better("symmetric", "replay"),
        ],
    ),
}
