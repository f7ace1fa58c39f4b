"""From a loss and its gradient to the next training state: optimizer, guard against non-finite updates,
micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from jaxrl_llm.ops import Aggregation, loss_denominator
from jaxrl_llm.train.sharding import constrain_rows, constrain_state
from jaxrl_llm.types import Metrics, Params, TrainState

SCHEDULES = ("constant", "linear", "cosine")


def make_schedule(
    learning_rate: float,
    *,
    schedule: str = "constant",
    warmup_updates: int = 0,
    total_updates: int | None = None,
    final_fraction: float = 0.0,
) -> optax.Schedule:
    """Learning rate by number of updates: a linear rise from 0 over `warmup_updates`, then constant, linear or cosine
    decay.

    The first update already moves: update `i` (from 0) of the warm-up has the rate `learning_rate * (i + 1) / (warmup +
    1)`. A decay ends at `learning_rate * final_fraction` after `total_updates`, the warm-up included, and stays there.

    Raises:
      ValueError: unknown schedule, negative numbers, or a decay whose total is missing or not longer than the warm-up.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if learning_rate < 0 or warmup_updates < 0:
        raise ValueError(
            f"learning_rate and warmup_updates must not be negative, got {learning_rate} and {warmup_updates}"
        )
    if schedule == "constant":
        after = optax.constant_schedule(learning_rate)
    else:
        if total_updates is None or total_updates <= warmup_updates:
            raise ValueError(
                f"a {schedule} schedule needs total_updates above warmup_updates={warmup_updates}, got "
                f"{total_updates}; pass total_updates to make_optimizer, or use schedule='constant'"
            )
        decay_updates = total_updates - warmup_updates
        if schedule == "linear":
            after = optax.linear_schedule(learning_rate, learning_rate * final_fraction, decay_updates)
        else:
            after = optax.cosine_decay_schedule(learning_rate, decay_updates, alpha=final_fraction)
    if warmup_updates == 0:
        return after
    rise = optax.linear_schedule(learning_rate / (warmup_updates + 1), learning_rate, warmup_updates)
    return optax.join_schedules([rise, after], [warmup_updates])


def make_optimizer(config: Any, total_updates: int | None = None) -> optax.GradientTransformation:
    """AdamW behind clipping by the global norm (Loshchilov & Hutter 2019), from the fields of `optimizer_config`.

    Args:
      config: a mapping with `learning_rate` and, optionally, `schedule`, `warmup_updates`, `final_fraction`, `b1`,
        `b2`, `eps`, `weight_decay`, `max_grad_norm` (None: no clipping).
      total_updates: number of `apply_gradients` calls of the whole run, which a decay needs.

    Raises:
      ValueError: see `make_schedule`; an unknown field; `max_grad_norm` not positive.
    """
    fields = dict(config)
    rate = make_schedule(
        fields.pop("learning_rate"),
        schedule=fields.pop("schedule", "constant"),
        warmup_updates=fields.pop("warmup_updates", 0),
        total_updates=total_updates,
        final_fraction=fields.pop("final_fraction", 0.0),
    )
    max_grad_norm = fields.pop("max_grad_norm", None)
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}")
    adamw = optax.adamw(
        rate,
        b1=fields.pop("b1", 0.9),
        b2=fields.pop("b2", 0.999),
        eps=fields.pop("eps", 1e-8),
        weight_decay=fields.pop("weight_decay", 0.0),
    )
    if fields:
        raise ValueError(
            f"unknown optimizer fields {sorted(fields)}; see jaxrl_llm.train.optimizer_config for those there are"
        )
    return adamw if max_grad_norm is None else optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw)


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    seed: int | Int[Array, ""],
    ref_params: Params | None = None,
    memory: PyTree | None = None,
) -> TrainState:
    """The state before the first iteration. `ref_params` is the frozen reference policy, where the algorithm has one,
    `memory` whatever else it carries from step to step."""
    state = TrainState(
        params=params,
        opt_state=init_optimizer(optimizer, params),
        step=jnp.zeros((), jnp.int32),  # each count an array of its own: one buffer cannot be donated twice
        seed=jnp.asarray(seed, jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
        ref_params=ref_params,
        memory=memory,
    )
    return constrain_state(state)


def init_optimizer(optimizer: optax.GradientTransformation, params: Params) -> PyTree:
    """The optimizer's state before its first update, with averages in float32 whatever type the parameters are of.

    For `init_state`, and for algorithms that start the optimizer anew on their way.
    """
    return optimizer.init(jax.tree.map(_wide, params))


def _wide(leaf: Array) -> Array:
    """In float32 at least: an average of squares with b2 = 0.999 does not move in bfloat16."""
    exact = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) if exact else leaf


def apply_gradients(
    state: TrainState,
    grads: Params,
    optimizer: optax.GradientTransformation,
    loss: Float[Array, ""],
) -> tuple[TrainState, Metrics]:
    """One update of the parameters, left out when it is not finite.

    If the loss, a gradient leaf, the global norm of the gradient or that of the update is NaN or infinite, parameters
    and optimizer state stay as they were and the skip is counted. `state.step` counts iterations, which may hold
    several updates, and is left to the loop.

    Returns:
      The new state, and the metrics `grad_norm` (before clipping), `param_norm` (after the update), `update_norm` (0
      when skipped), `skipped` and `skipped_in_row` (both counts), `bad_leaf`: index, in the order of
      `jax.tree.leaves(params)`, of the first gradient leaf that is not finite, -1 when all are. Norms are Euclidean
      over all leaves, in float32.
    """
    grads = constrain_state(grads)  # each device sums what it updates
    finite_leaves = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(grads)])
    bad_leaf = jnp.where(jnp.all(finite_leaves), -1, jnp.argmin(finite_leaves))
    grad_norm = _norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    update_norm = _norm(updates)
    finite = jnp.all(finite_leaves) & jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)

    def keep(new: PyTree, old: PyTree) -> PyTree:
        # A select, not a product: 0 * NaN would be NaN. The branches of a cond would both run under vmap anyway.
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    params = keep(optax.apply_updates(state.params, updates), state.params)
    bad = 1 - finite.astype(jnp.int32)
    new_state = dataclasses.replace(
        state,
        params=params,
        opt_state=keep(opt_state, state.opt_state),
        skipped=state.skipped + bad,
        skipped_in_row=(state.skipped_in_row + bad) * bad,
    )
    return constrain_state(new_state), {
        "grad_norm": grad_norm,
        "param_norm": _norm(params),
        "update_norm": jnp.where(finite, update_norm, 0.0),
        "skipped": new_state.skipped,
        "skipped_in_row": new_state.skipped_in_row,
        "bad_leaf": bad_leaf,
    }


def _norm(tree: PyTree) -> Float[Array, ""]:
    return optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree))


def accumulate_gradients(
    loss_fn: Callable[[Params, PyTree], tuple[Float[Array, ""], Metrics]],
    params: Params,
    batch: PyTree,
    num_micro: int,
    denominator: float | Float[Array, ""] = 1.0,
) -> tuple[Float[Array, ""], Params, Metrics]:
    """Loss and gradient of a batch, computed in `num_micro` slices one after another to bound memory.

    `loss_fn(params, micro_batch)` returns `(numerator, metrics)`: a SUM over its slice whose divisor is known
    beforehand. The result is `sum(numerators) / denominator`, so it equals that of the whole batch whatever the slices
    hold (a mean of the slices' means would not). A loss that already divides by a denominator of the whole batch leaves
    `denominator` at 1.

    Args:
      batch: pytree of arrays that share their first axis; slices are contiguous along it.

    Returns:
      loss (float32), gradient (summed in float32, of the parameters' types), metrics (each averaged over the slices).

    Raises:
      ValueError: the first axis does not divide into `num_micro` equal slices, or a slice not among the devices of
        the mesh.
    """
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1:
        raise ValueError(f"arrays of a batch must share their first axis, got lengths {sorted(sizes)}")
    (size,) = sizes
    if num_micro < 1 or size % num_micro:
        raise ValueError(f"a batch of {size} does not divide into num_micro={num_micro} equal slices")
    loss_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    slices = jax.tree.map(lambda leaf: leaf.reshape(num_micro, size // num_micro, *leaf.shape[1:]), batch)
    slices = constrain_rows(slices, axis=1)  # every device has a part of every slice

    def add(carry: tuple[Array, Params], micro: PyTree) -> tuple[tuple[Array, Params], Metrics]:
        (numerator, metrics), grads = loss_and_grad(params, micro)
        total, summed = carry
        summed = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), summed, grads)
        return (total + numerator.astype(jnp.float32), summed), metrics

    zeros = constrain_state(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params))
    start = (jnp.zeros((), jnp.float32), zeros)
    (total, summed), metrics = jax.lax.scan(add, start, slices)
    grads = jax.tree.map(lambda leaf, param: (leaf / denominator).astype(param.dtype), summed, params)
    return total / denominator, grads, jax.tree.map(lambda metric: jnp.mean(metric, axis=0), metrics)


def make_update(
    loss_fn: Callable[[Params, PyTree, Float[Array, ""]], tuple[Float[Array, ""], Metrics]],
    optimizer: optax.GradientTransformation,
    *,
    agg: Aggregation = "token",
    max_len: int | None = None,
    micro_batches: int = 1,
) -> Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]:
    """`update(state, batch) -> (state, metrics)`: one update on one mini-batch; see `make_policy_step`."""

    def update(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        denominator = loss_denominator(batch.mask, agg=agg, max_len=max_len)
        loss, grads, metrics = accumulate_gradients(
            lambda params, micro: loss_fn(params, micro, denominator), state.params, batch, micro_batches
        )
        state, norms = apply_gradients(state, grads, optimizer, loss)
        return state, {"loss": loss, **metrics, **norms}

    return update


def make_policy_step(
    loss_fn: Callable[[Params, PyTree, Float[Array, ""]], tuple[Float[Array, ""], Metrics]],
    optimizer: optax.GradientTransformation,
    *,
    agg: Aggregation = "token",
    max_len: int | None = None,
    micro_batches: int = 1,
    mini_batches: int = 1,
) -> Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]:
    """`step(state, batch) -> (state, metrics)`: a pass over the batch, with an update for each of its mini-batches.

    `loss_fn(params, batch, denominator) -> (loss, metrics)` gets a micro-batch, and the denominator of its whole
    mini-batch for the mean `agg` over `batch.mask`: every micro-batch then has its right share, whatever it holds.
    Rows are divided in their order, so a group of rollouts stays together where sizes divide. Metrics are means over
    mini-batches (`mean_metrics`), but for `first_ratio_error`, if the loss has `ratio_max` and `ratio_min`: how far
    the ratio is from 1 in the first mini-batch, where sampler and trainer should agree.

    Raises:
      ValueError: the rows do not divide into mini-batches and micro-batches.
    """
    update = make_update(loss_fn, optimizer, agg=agg, max_len=max_len, micro_batches=micro_batches)

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        rows = batch.mask.shape[0]
        if rows % mini_batches:
            raise ValueError(f"a batch of {rows} rows does not divide into mini_batches={mini_batches}")
        parts = jax.tree.map(lambda leaf: leaf.reshape(mini_batches, rows // mini_batches, *leaf.shape[1:]), batch)
        state, stacked = jax.lax.scan(update, state, parts)
        metrics = mean_metrics(stacked)
        if {"ratio_max", "ratio_min"} <= stacked.keys():
            error = jnp.maximum(stacked["ratio_max"][0] - 1, 1 - stacked["ratio_min"][0])
            metrics["first_ratio_error"] = error
        return state, metrics

    return step


def mean_metrics(stacked: Metrics) -> Metrics:
    """Metrics of several updates of one iteration, `[E]` each (as `lax.scan` stacks them), as one number each.

    The mean over updates, except for counts (`skipped`, `skipped_in_row`: the last) and `bad_leaf` (the first that is
    not -1).
    """

    def one(name: str, values: Array) -> Array:
        if name in ("skipped", "skipped_in_row"):
            return values[-1]
        if name == "bad_leaf":
            return values[jnp.argmax(values >= 0)]
        return jnp.mean(values, axis=0)

    return {name: one(name, values) for name, values in stacked.items()}
