"""The guard against updates that are not finite, wherever they come from: a critic, one micro-batch of many, a
supervised step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import ops, train
from jaxrl_llm.data.packing import pack_sequences
from tests.sampling.worlds import MODEL


class Rows(NamedTuple):
    mask: jax.Array
    x: jax.Array
    returns: jax.Array


def assert_same(one, other):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(left, right)


def test_one_bad_return_skips_its_mini_batch_alone_and_names_the_critic():
    """Policy and critic with optimizers of their own; row 6 of 8 has a NaN return: the third of four micro-batches."""
    make = lambda rate: train.make_optimizer(train.optimizer_config(rate))  # noqa: E731
    parts = {"policy": make(0.1), "critic": make(0.2)}
    optimizer = optax.partition(parts, lambda params: {name: name for name in params})
    params = {"policy": {"w": jnp.float32(0.3)}, "critic": {"head": jnp.float32(0.1)}}

    def loss_fn(params, rows, denominator):
        ratio = jnp.exp(params["policy"]["w"] * rows.x)
        values = params["critic"]["head"] * rows.x
        loss = ops.reduce_loss(ratio, rows.mask, denominator=denominator)
        error, _ = ops.value_loss(values, values, rows.returns, rows.mask, denominator=denominator)
        return loss + error, {}

    x = jax.random.normal(jax.random.key(0), (8, 5))
    batch = Rows(jnp.ones((8, 5), bool), x, x.at[6].set(jnp.nan))
    step = jax.jit(train.make_policy_step(loss_fn, optimizer, mini_batches=2, micro_batches=2))
    state = train.init_state(params, optimizer, 0)
    after, metrics = step(state, batch)
    # `jax.tree.leaves` has the critic first
    assert (metrics["skipped"], metrics["skipped_in_row"], metrics["bad_leaf"]) == (1, 1, 0)
    once = train.make_policy_step(loss_fn, optimizer, micro_batches=2)
    half, _ = jax.jit(once)(state, jax.tree.map(lambda leaf: leaf[:4], batch))
    assert_same((after.params, after.opt_state), (half.params, half.opt_state))
    assert half.skipped == 0 and not np.array_equal(half.params["critic"]["head"], params["critic"]["head"])


@pytest.mark.slow
def test_a_bad_supervised_update_is_skipped():
    params = MODEL.init(jax.random.key(0))
    params["embedding"] = params["embedding"].at[3, 0].set(jnp.inf)
    optimizer = train.make_optimizer(train.optimizer_config(0.1))
    rows = np.arange(16, dtype=np.int32).reshape(2, 8)
    packed = pack_sequences(rows, np.ones((2, 8), bool), np.full(2, 8), num_rows=2, row_length=8)
    state = train.init_state(params, optimizer, 0)
    after, metrics = jax.jit(train.make_sft_step(MODEL, optimizer))(state, packed)
    assert metrics["skipped"] == 1 and metrics["bad_leaf"] >= 0
    assert_same((after.params, after.opt_state), (state.params, state.opt_state))
