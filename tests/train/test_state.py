"""Schedules, the guard against non-finite updates, and micro-batches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import ops
from jaxrl_llm.train import (
    accumulate_gradients,
    apply_gradients,
    init_state,
    make_optimizer,
    make_policy_step,
    make_schedule,
    mean_metrics,
    optimizer_config,
)


def test_schedules_by_hand():
    constant = make_schedule(0.3, warmup_updates=2)
    np.testing.assert_allclose([constant(i) for i in range(5)], [0.1, 0.2, 0.3, 0.3, 0.3], rtol=1e-6)
    linear = make_schedule(1.0, schedule="linear", warmup_updates=1, total_updates=5, final_fraction=0.2)
    np.testing.assert_allclose([linear(i) for i in range(7)], [0.5, 1, 0.8, 0.6, 0.4, 0.2, 0.2], rtol=1e-6)
    cosine = make_schedule(2.0, schedule="cosine", total_updates=4)
    np.testing.assert_allclose([cosine(i) for i in range(5)], [2, 1 + 2**-0.5, 1, 1 - 2**-0.5, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"schedule": "step"}, "unknown schedule 'step'; choose one of constant, linear, cosine"),
        ({"schedule": "cosine"}, "needs total_updates"),
        ({"schedule": "linear", "warmup_updates": 5, "total_updates": 5}, "above warmup_updates=5, got 5"),
        ({"warmup_updates": -1}, "must not be negative"),
    ],
)
def test_bad_schedules(fields, words):
    with pytest.raises(ValueError, match=words):
        make_schedule(0.1, **fields)


def test_adamw_and_clipping_by_hand():
    # First AdamW step: m / (1 - b1) = g, sqrt(v / (1 - b2)) = |g|, so the update is -rate * (sign(g) + decay * w).
    config = optimizer_config(0.1, weight_decay=0.5, eps=0.0, max_grad_norm=1e-3)
    optimizer = make_optimizer(config)
    state = init_state({"w": jnp.array([2.0, -4.0])}, optimizer, seed=0)
    state, metrics = apply_gradients(state, {"w": jnp.array([3.0, 4.0])}, optimizer, jnp.float32(1))
    np.testing.assert_allclose(state.params["w"], [2 - 0.1 * (1 + 1), -4 - 0.1 * (1 - 2)], rtol=1e-5)
    assert metrics["grad_norm"] == 5.0  # before clipping
    np.testing.assert_allclose(metrics["update_norm"], np.hypot(0.2, 0.1), rtol=1e-5)
    np.testing.assert_allclose(metrics["param_norm"], np.linalg.norm([1.8, -3.9]), rtol=1e-5)
    with pytest.raises(ValueError, match="unknown optimizer fields \\['momentum'\\]"):
        make_optimizer({"learning_rate": 0.1, "momentum": 0.9})
    with pytest.raises(ValueError, match="max_grad_norm must be positive or None, got 0"):
        make_optimizer({"learning_rate": 0.1, "max_grad_norm": 0})


@pytest.mark.parametrize(
    ("loss", "bad_value", "bad_leaf"),
    [(1.0, np.nan, 1), (1.0, np.inf, 1), (np.nan, 0.5, -1), (1.0, 1e30, -1)],  # the last: its square overflows
)
def test_bad_updates_leave_the_state_alone(loss, bad_value, bad_leaf):
    optimizer = make_optimizer(optimizer_config(0.1))
    params = {"a": jnp.ones(3), "b": jnp.full((2,), 2.0), "c": jnp.zeros(1)}
    good = jax.tree.map(jnp.ones_like, params)
    step = jax.jit(lambda state, grads, loss: apply_gradients(state, grads, optimizer, loss))
    state, metrics = step(init_state(params, optimizer, seed=0), good, jnp.float32(1))
    assert (metrics["skipped"], metrics["bad_leaf"]) == (0, -1)

    bad = {**good, "b": jnp.array([1.0, bad_value])}
    for times in (1, 2):
        after, metrics = step(state, bad, jnp.float32(loss))
        for old, new in zip(
            jax.tree.leaves((state.params, state.opt_state)),
            jax.tree.leaves((after.params, after.opt_state)),
            strict=True,
        ):
            np.testing.assert_array_equal(old, new)
        assert (after.skipped, after.skipped_in_row, metrics["bad_leaf"]) == (times, times, bad_leaf)
        assert metrics["update_norm"] == 0
        state = after
    state, metrics = step(state, good, jnp.float32(1))
    assert (state.skipped, state.skipped_in_row) == (2, 0)
    assert metrics["update_norm"] > 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("num_micro", [1, 2, 4, 8])
def test_micro_batches_equal_the_batch(num_micro):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3,)), jnp.float32)}
    mask = rng.random((8, 5)) < np.linspace(0, 0.9, 8)[:, None]  # unequal slices, one of them empty
    batch = {"x": jnp.asarray(rng.normal(size=(8, 5, 3)), jnp.float32), "mask": jnp.asarray(mask)}

    def loss_fn(params, micro):
        numerator = jnp.sum(jnp.where(micro["mask"], jnp.tanh(micro["x"] @ params["w"]), 0.0))
        return numerator, {"largest": jnp.max(micro["x"])}

    count = mask.sum()
    want = jax.value_and_grad(lambda params: loss_fn(params, batch)[0] / count)(params)
    loss, grads, metrics = jax.jit(lambda *args: accumulate_gradients(loss_fn, *args, num_micro, count))(params, batch)
    # Float32 sums of 40 terms of size 1 in another order.
    np.testing.assert_allclose(loss, want[0], rtol=1e-5)
    np.testing.assert_allclose(grads["w"], want[1]["w"], rtol=1e-5, atol=1e-6)
    slices = np.asarray(batch["x"]).reshape(num_micro, -1)
    np.testing.assert_allclose(metrics["largest"], slices.max(axis=1).mean(), rtol=1e-6)


def test_accumulation_keeps_types_and_refuses_unequal_slices():
    def loss_fn(params, micro):
        return jnp.sum(params * micro.astype(params.dtype)), {}

    params, batch = jnp.ones(2, jnp.bfloat16), jnp.ones((6, 2))
    loss, grads, _ = accumulate_gradients(loss_fn, params, batch, 3)
    assert (loss.dtype, grads.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(grads.astype(jnp.float32), [6, 6])
    with pytest.raises(ValueError, match="a batch of 6 does not divide into num_micro=4"):
        accumulate_gradients(loss_fn, params, batch, 4)
    with pytest.raises(ValueError, match="share their first axis, got lengths \\[2, 3\\]"):
        accumulate_gradients(loss_fn, params, (jnp.ones(2), jnp.ones(3)), 1)


def test_mean_metrics_of_several_updates():
    metrics = mean_metrics(
        {
            "loss": jnp.array([1.0, 3.0]),
            "skipped": jnp.array([4, 5]),
            "bad_leaf": jnp.array([-1, 2]),
        }
    )
    assert {name: float(value) for name, value in metrics.items()} == {"loss": 2.0, "skipped": 5.0, "bad_leaf": 2.0}


class Rows(NamedTuple):
    mask: jax.Array
    x: jax.Array


@pytest.mark.parametrize(("mini_batches", "micro_batches"), [(1, 2), (2, 2)])
def test_a_policy_step_is_updates_by_hand(mini_batches, micro_batches):
    """Unequal masks: a micro-batch weighs as many tokens as it has, and a mini-batch is an update of its own."""
    mask = jnp.arange(6) < jnp.array([6, 1, 2, 5, 0, 3, 4, 1])[:, None]
    batch, optimizer = Rows(mask, jax.random.normal(jax.random.key(0), mask.shape)), optax.sgd(0.1)

    def loss_fn(params, rows, denominator):
        ratio = jnp.exp(params["w"] * rows.x)
        loss = ops.reduce_loss(jnp.square(ratio - 2), rows.mask, denominator=denominator)
        return loss, {"ratio_max": jnp.max(ratio), "ratio_min": jnp.min(ratio)}

    state = init_state({"w": jnp.float32(0.3)}, optimizer, 0)
    step = make_policy_step(loss_fn, optimizer, mini_batches=mini_batches, micro_batches=micro_batches)
    after, metrics = jax.jit(step)(state, batch)
    w, losses = state.params["w"], []
    for rows in np.split(np.arange(8), mini_batches):
        part = jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch)
        loss, grad = jax.value_and_grad(lambda w, part=part: loss_fn({"w": w}, part, part.mask.sum())[0])(w)
        w, losses = w - 0.1 * grad, [*losses, loss]
    # Float32 sums of 22 terms in another order.
    np.testing.assert_allclose(after.params["w"], w, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    assert metrics["first_ratio_error"] > 0
    with pytest.raises(ValueError, match="a batch of 8 rows does not divide into mini_batches=3"):
        make_policy_step(loss_fn, optimizer, mini_batches=3)(state, batch)
