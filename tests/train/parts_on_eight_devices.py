"""What else test_sharding.py runs on eight devices: kernels of rows, encoders, adapters, critics, packing, sessions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_kernels import discounted_scan, fused_policy_loss
from jaxrl_llm import ops, train
from jaxrl_llm.models import (
    EncoderConfig,
    LoraConfig,
    Seq2SeqConfig,
    apply_lora,
    init_lora,
    make_encoder,
    make_scalar_head,
    make_seq2seq,
    merge_lora,
)
from jaxrl_llm.sampling import lanes
from tests.sampling.test_host import Echo, play
from tests.sampling.worlds import MODEL
from tests.train.on_eight_devices import BATCH, LENGTH, MESHES, MODELS, TOLERANCE, assert_close, make_batch

EACH_AXIS = [{"data": 8}, {"fsdp": 8}, {"tensor": 4, "data": 2}, {"sequence": 4, "data": 2}, {"expert": 4, "data": 2}]


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


def on_mesh(sizes, function, state, *arrays):
    """What a function gives on a mesh, with its first argument laid out as a state, the others as batches."""
    mesh = train.make_mesh(sizes)
    with jax.set_mesh(mesh):
        arrays = train.shard_state(state, mesh), *(train.shard_batch(array, mesh) for array in arrays)
        jitted = jax.jit(function)
        with jax.transfer_guard("disallow"):
            return jitted(*arrays)


def logprobs_of(apply, head, params, batch):
    """Log-probs of a packed batch; of the tokens that the mask leaves out, 0."""
    hidden, _ = apply(params, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
    return ops.token_logprobs(jnp.roll(hidden, 1, axis=1), head(params), batch["tokens"], mask=batch["mask"])[0]


# ---------------------------------------------------------------------------------------------------- kernels of rows


def scan_and_loss(implementation, batch):
    """The two kernels that go along rows: values, metrics and gradients."""

    def loss(logprobs, values):
        scanned = discounted_scan(
            *(values, 0.9),
            mask=batch["mask"],
            segment_ids=batch["segment_ids"],
            implementation=implementation,
        )
        options = {"ref_logprobs": batch["old"] * 1.1, "kl_coefficient": 0.1, "agg": "seq"}
        lost, metrics = fused_policy_loss(
            logprobs, batch["old"], scanned, batch["mask"], implementation=implementation, **options
        )
        return lost + jnp.sum(scanned**2) / scanned.size, metrics

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(batch["logprobs"], batch["values"])


@pytest.mark.parametrize(
    ("implementation", "sizes"),
    [
        (None, {"data": 2, "sequence": 2, "tensor": 2}),
        *(slow(None, sizes) for sizes in EACH_AXIS),
        *(slow("interpret_tpu", sizes) for sizes in EACH_AXIS),
    ],
)
def test_kernels_of_rows(implementation, sizes):
    """Under plain `jit`, with inputs that are divided along the axis of places too."""
    rng = np.random.default_rng(2)
    drawn = {name: rng.normal(size=(BATCH, LENGTH)).astype(np.float32) for name in ("logprobs", "old", "values")}
    batch = make_batch() | {name: 0.3 * array for name, array in drawn.items()}
    expected = jax.jit(functools.partial(scan_and_loss, None))(batch)
    got = on_mesh(sizes, lambda _, batch: scan_and_loss(implementation, batch), {}, batch)
    assert_close(got, expected)


def test_a_tpu_is_handed_kernels_that_are_divided():
    """A program for TPUs can be lowered anywhere, and a kernel that nobody divides is refused in that."""
    encoder = make_encoder(ENCODERS["bert"])
    params = jax.eval_shape(encoder.init, jax.random.key(0))
    batch = make_batch() | {name: np.zeros((BATCH, LENGTH), np.float32) for name in ("logprobs", "old", "values")}
    with jax.set_mesh(train.make_mesh({"data": 2, "sequence": 2, "tensor": 2})):
        batch = train.shard_batch(batch)
        for number, function in (
            (3, lambda params, batch: scan_and_loss(None, batch)),  # a scan, its gradient, the loss with its gradient
            (1, functools.partial(encoder_loss, encoder)),  # all layers are one function
        ):
            lowered = jax.jit(function).trace(params, batch).lower(lowering_platforms=("tpu",))
            assert lowered.as_text().count("tpu_custom_call") == number


# ------------------------------------------------------------------------------------------------------------- models

ENCODERS = {
    "bert": EncoderConfig(128, 64, 2, 4, 96, num_positions=LENGTH),
    "modernbert": EncoderConfig(
        *(128, 64, 2, 4, 96),
        pre_norm=True,
        gated=True,
        rope_thetas=(1e4, 1e5),
        layer_windows=(8, None),
        num_token_types=0,
    ),
}
T5 = make_seq2seq(Seq2SeqConfig(128, 64, 16, 4, 96, 1, 1, gated=True, tie_embeddings=False))


def encoder_loss(model, params, batch):
    hidden = model.apply(params, batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"])
    return jnp.sum(jnp.where(batch["mask"][..., None], hidden, 0) ** 2 * jnp.arange(64) / 64) / batch["mask"].size


def t5_loss(params, batch):
    tokens, real = batch["tokens"], batch["segment_ids"] < 2
    hidden, _ = T5.decode(params, tokens, T5.encode(params, tokens, mask=real), mask=real)
    return -jnp.mean(ops.token_logprobs(hidden, T5.head(params), tokens, mask=batch["mask"])[0])


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        slow("bert", MESHES["tensor"]),
        *(slow("modernbert", sizes) for sizes in (MESHES["tensor"], MESHES["sequence"], {"fsdp": 8})),
        *(slow("t5", sizes) for sizes in (MESHES["tensor"], MESHES["wide"], MESHES["sequence"], {"fsdp": 8})),
    ],
)
def test_encoders_and_t5(name, sizes):
    model = T5 if name == "t5" else make_encoder(ENCODERS[name])
    loss = t5_loss if name == "t5" else functools.partial(encoder_loss, model)
    params = jax.jit(model.init)(jax.random.key(0))
    expected = jax.jit(jax.value_and_grad(loss))(params, make_batch())
    assert_close(on_mesh(sizes, jax.value_and_grad(loss), params, make_batch()), expected)


ADAPTED = [(form, sizes, {}) for form in ("beside", "merged") for sizes in MESHES.values()]
ADAPTED.append(("beside", {"sequence": 8}, {"batch": 2, "length": 2048}))


@pytest.mark.parametrize(("form", "sizes", "shape"), [slow(*case) for case in ADAPTED])
def test_an_adapter_alone_is_trained(form, sizes, shape):
    """The gradient by the adapter, the base outside of it: beside the matrices, and merged into them."""
    model, packed = MODELS["dense"], make_batch(**shape)
    config = LoraConfig(rank=2, targets=("query", "down"))
    base = jax.jit(model.init)(jax.random.key(0))
    adapter = jax.tree.map(lambda x: x + 0.05, init_lora(jax.random.key(1), base, config))

    def loss(adapter, base, batch):
        if form == "beside":
            tuned = apply_lora(model, config)
            return -jnp.mean(logprobs_of(tuned.apply, tuned.head, {"base": base, "lora": adapter}, batch))
        return -jnp.mean(logprobs_of(model.apply, model.head, merge_lora(base, adapter, config), batch))

    def gradient(both, batch):
        return jax.value_and_grad(loss)(both["lora"], both["base"], batch)

    both = {"base": base, "lora": adapter}
    expected = jax.jit(gradient)(both, packed)
    assert min(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected)) > 10 * TOLERANCE
    assert_close(on_mesh(sizes, gradient, both, packed), expected)


@pytest.mark.parametrize("sizes", [slow(sizes) for sizes in (*MESHES.values(), {"sequence": 4, "tensor": 2})])
def test_a_policy_and_its_critic(sizes):
    """A PPO update with an optimizer for each: advantages by values, both losses, both gradients, in micro-batches."""
    model, (init_head, apply_head) = MODELS["dense"], make_scalar_head(64, layers=2)
    # not Adam, which divides rounding by rounding
    optimizer = optax.partition({"policy": optax.sgd(1.0), "critic": optax.sgd(2.0)}, lambda p: {x: x for x in p})
    policy = jax.jit(model.init)(jax.random.key(0))
    params = {"policy": policy, "critic": {"decoder": policy, "head": init_head(jax.random.key(1))}}
    rng = np.random.default_rng(4)
    batch = make_batch() | {"rewards": rng.normal(size=BATCH).astype(np.float32)}

    def values_of(params, batch):
        hidden, _ = model.apply(params["critic"]["decoder"], batch["tokens"], segment_ids=batch["segment_ids"])
        return apply_head(params["critic"]["head"], jnp.roll(hidden, 1, axis=1))

    def step(state, batch):
        old = values_of(state.params, batch)
        rewards = ops.kl_shaped_rewards(
            batch["rewards"], jnp.zeros_like(old), jnp.zeros_like(old), batch["mask"], beta=0.0
        )
        advantages = ops.gae_advantages(rewards, old, batch["mask"], gamma=1.0, lam=0.9)
        batch = batch | {"advantages": ops.masked_whiten(advantages, batch["mask"]), "returns": advantages + old}
        denominator = ops.loss_denominator(batch["mask"], agg="token")

        def loss_fn(params, rows):
            logprobs = logprobs_of(model.apply, model.head, params["policy"], rows)
            loss, _ = ops.ppo_clip_loss(
                *(logprobs, jax.lax.stop_gradient(logprobs), rows["advantages"], rows["mask"]),
                denominator=denominator,
            )
            error, _ = ops.value_loss(
                values_of(params, rows), None, rows["returns"], rows["mask"], denominator=denominator
            )
            return loss + error, {}

        loss, grads, _ = train.accumulate_gradients(loss_fn, state.params, batch, 2)
        return *train.apply_gradients(state, grads, optimizer, loss), loss

    state = train.init_state(params, optimizer, 0)
    after, norms, loss = jax.jit(step)(state, batch)
    new, own, lost = on_mesh(sizes, step, state, batch)
    assert_close((new.params, lost), (after.params, loss))
    np.testing.assert_allclose(own["grad_norm"], norms["grad_norm"], rtol=TOLERANCE)


# ------------------------------------------------------------------------------------------------------------ packing


def test_nothing_of_a_segment_is_seen_in_the_next_across_devices():
    """Other tokens in the first segment of each row, which ends on any of the four devices: not a bit of the log-probs
    of the other segments changes. (Within a segment, they do.)"""
    model, places = MODELS["dense"], np.arange(LENGTH)
    ends = 2 * np.arange(BATCH)[:, None] + 2  # of the first segment, in any part of a row; the next has three tokens
    first = places < ends
    batch = make_batch() | {"segment_ids": np.where(first, 0, np.where(places < ends + 3, 1, 2)).astype(np.int32)}
    other = batch | {"tokens": np.where(first, (batch["tokens"] + 1) % 128, batch["tokens"])}
    params = jax.jit(model.init)(jax.random.key(0))
    score = functools.partial(logprobs_of, model.apply, model.head)
    mesh = train.make_mesh(MESHES["sequence"])
    with jax.set_mesh(mesh):
        jitted, params = jax.jit(score), train.shard_state(params, mesh)
        before, after = (np.asarray(jitted(params, train.shard_batch(rows, mesh))) for rows in (batch, other))
    own = places > ends  # the token at a segment's beginning is not predicted from inside of it
    np.testing.assert_array_equal(before[own], after[own])
    assert np.any(before[first] != after[first])


# ----------------------------------------------------------------------------------------------------------- sessions


@pytest.mark.parametrize("sizes", [{"data": 4, "tensor": 2}, slow({"fsdp": 8}), slow({"sequence": 4, "tensor": 2})])
def test_rollouts_against_a_host(sizes):
    """Over a cache in pages, from one program for each shape: pages come out of a call as they went in."""
    params = jax.jit(MODEL.init)(jax.random.key(0))
    expected, _ = play(params, Echo(), group_size=2)
    mesh = train.make_mesh(sizes)
    with jax.set_mesh(mesh):
        for function in (lanes.advance_lanes, lanes.compute_lanes):
            function.clear_cache()
        found, _ = play(train.shard_state(params, mesh), Echo(), group_size=2)
        assert lanes.advance_lanes._cache_size() == 1
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=TOLERANCE)
