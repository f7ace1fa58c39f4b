"""Where parameters and batches lie, what a mesh refuses, and, in processes of eight devices, that results are equal."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jaxrl_llm import train
from jaxrl_llm.models import (
    DecoderConfig,
    EncoderConfig,
    LoraConfig,
    Seq2SeqConfig,
    apply_lora,
    init_lora,
    make_decoder,
    make_encoder,
    make_scalar_head,
    make_seq2seq,
)
from jaxrl_llm.sampling import Session, rollout
from tests.sampling.worlds import EchoEnv

MESH = AbstractMesh((2, 2, 2, 2, 2), ("data", "fsdp", "expert", "sequence", "tensor"))
SIZES = {"num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "ffn_width": 96, "attention_bias": True}
DENSE = make_decoder(DecoderConfig(128, 64, **SIZES, tie_embeddings=False, norm_placement="both", qk_norm="full"))
EXPERTS = make_decoder(DecoderConfig(128, 64, **SIZES, num_experts=4, expert_width=32))


def specs(tree, mesh=MESH):
    shapes = jax.eval_shape(lambda: tree()) if callable(tree) else tree
    shardings = jax.tree_util.tree_leaves_with_path(train.state_shardings(shapes, mesh))
    return {jax.tree_util.keystr(path, simple=True, separator="."): sharding.spec for path, sharding in shardings}


def test_parameters_of_a_decoder():
    def init():
        return DENSE.init(jax.random.key(0))

    found = specs(init)
    matrices = {
        "embedding": P("tensor", "fsdp"),
        "head": P("tensor", "fsdp"),
        "layers.0.attention.query.kernel": P("fsdp", "tensor"),
        "layers.0.attention.key.bias": P("tensor"),
        "layers.0.attention.out.kernel": P("tensor", "fsdp"),
        "layers.0.gate.kernel": P("fsdp", "tensor"),
        "layers.0.down.kernel": P("tensor", "fsdp"),
        "norm.scale": P(),
    }
    assert {name: found[name] for name in matrices} == matrices
    # no matrix of any family is forgotten: all are divided among all of fsdp and tensor
    shapes = jax.tree_util.tree_leaves_with_path(jax.eval_shape(init))
    for path, leaf in shapes:
        spec = found[jax.tree_util.keystr(path, simple=True, separator=".")]
        assert leaf.ndim < 2 or set(spec) == {"fsdp", "tensor"}, path


def test_layers_of_a_stack_are_divided_as_alone():
    """Parameters and the optimizer's state: each device has its part of every layer."""
    optimizer = optax.adamw(1e-3)

    def found(scan_layers):
        model = make_decoder(dataclasses.replace(EXPERTS.config, num_layers=2, scan_layers=scan_layers))
        return specs(lambda: train.init_state(model.init(jax.random.key(0)), optimizer, 0))

    alone, stacked = found(False), found(True)
    assert "params.layers.0.experts.gate" in stacked and "params.layers.1.experts.gate" not in stacked
    for name, spec in stacked.items():
        assert spec == (P(None, *alone[name]) if ".layers." in name and alone[name] else alone[name]), name


def test_experts_adapters_and_heads():
    found = specs(lambda: EXPERTS.init(jax.random.key(0)))
    assert found["layers.0.experts.gate"] == P("expert", "fsdp", "tensor")
    assert found["layers.0.experts.down"] == P("expert", "tensor", "fsdp")
    assert found["layers.0.experts.router.kernel"] == P()
    lora = specs(lambda: apply_lora(DENSE, LoraConfig(targets=("query", "down"))).init(jax.random.key(0)))
    assert lora["base.layers.0.attention.query.kernel"] == P("fsdp", "tensor")
    assert lora["lora.layers.0.attention.query.lora_a"] == P("fsdp")
    assert lora["lora.layers.0.attention.query.lora_b"] == P(None, "tensor")
    assert lora["lora.layers.0.down.lora_a"] == P("tensor")
    experts = LoraConfig(targets=("gate",))
    stack = specs(lambda: init_lora(jax.random.key(0), EXPERTS.init(jax.random.key(0)), experts))
    assert stack["layers.0.experts.gate.lora_a"] == P("expert", "fsdp")
    assert stack["layers.0.experts.gate.lora_b"] == P("expert", None, "tensor")
    value = specs(lambda: {"critic": {"head": make_scalar_head(64, layers=2)[0](jax.random.key(0))}})
    assert value["critic.head.out.kernel"] == P() and value["critic.head.hidden.0.kernel"] == P("fsdp")


def test_a_state_lies_as_its_parameters():
    """Moments of the optimizer and the reference like the parameters, with an axis of seeds in front or not."""
    optimizer = train.make_optimizer({"learning_rate": 1e-3, "max_grad_norm": 1.0})

    def init(seed):
        params = {"policy": DENSE.init(jax.random.key(0))}
        return train.init_state(params, optimizer, seed, ref_params=params["policy"])

    found = specs(lambda: init(0))
    query = "layers.0.attention.query.kernel"
    ends = [name for name in found if name.endswith(query)]
    assert len(ends) == 4 and {found[name] for name in ends} == {P("fsdp", "tensor")}
    assert {found[name] for name in ("step", "seed", "skipped")} == {P()}
    seeds = specs(lambda: jax.vmap(init)(jnp.arange(3)))
    assert {seeds[name] for name in ends} == {P(None, "fsdp", "tensor")}


def test_a_batch():
    batch = {"tokens": jnp.zeros((16, 6), int), "rewards": jnp.zeros(16), "num_packed": jnp.zeros((), int)}
    found = {name: sharding.spec for name, sharding in train.batch_shardings(batch, MESH).items()}
    rows = ("data", "fsdp", "expert")
    assert found == {"tokens": P(rows, "sequence"), "rewards": P(rows), "num_packed": P()}


def test_meshes_that_do_not_fit():
    assert dict(train.make_mesh({"data": 1}).shape) == {"data": 1}
    many = [jax.devices()[0]] * 8
    assert dict(train.make_mesh({"tensor": 2, "data": 4}, many).shape) == {"data": 4, "tensor": 2}
    with pytest.raises(ValueError, match="unknown mesh axes \\['model'\\]; there are data, fsdp, tensor"):
        train.make_mesh({"model": 8})
    with pytest.raises(ValueError, match="sizes of at least 1, got {'data': 0}"):
        train.make_mesh({"data": 0})
    with pytest.raises(
        ValueError, match="fsdp=4 wants 4 devices, but there are 8; with the other axes data=2 would fit"
    ):
        train.make_mesh({"fsdp": 4}, many)
    with pytest.raises(ValueError, match="tensor=3 wants 3 devices, but there are 8; .* no data= would fit"):
        train.make_mesh({"tensor": 3}, many)


def mesh_of(**sizes):
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def test_a_mesh_that_does_not_divide_is_told_which_axis_and_what_fits():
    with pytest.raises(
        ValueError, match="batch of size 6 does not divide among data=2 x fsdp=2 .* axes that fits is 3"
    ):
        train.batch_shardings({"tokens": jnp.zeros((6, 8))}, mesh_of(data=2, fsdp=2))
    with pytest.raises(ValueError, match="length of size 9 does not divide among sequence=2 .* that fits is 1"):
        train.batch_shardings({"tokens": jnp.zeros((6, 9))}, mesh_of(sequence=2))

    def shard(model, **sizes):
        train.state_shardings(jax.eval_shape(model.init, jax.random.key(0)), mesh_of(**sizes))

    with pytest.raises(ValueError, match=r"embedding \[128, 64\]: vocabulary of size 128 .* tensor=3 .* fits is 2"):
        shard(DENSE, tensor=3)
    with pytest.raises(ValueError, match=r"experts.down .*: experts of size 4 .* expert=3 .* fits is 2"):
        shard(EXPERTS, expert=3)
    with pytest.raises(ValueError, match=r"down.kernel .*: ffn of size 98 .* tensor=4"):
        shard(make_decoder(DecoderConfig(128, 64, num_layers=1, ffn_width=98)), tensor=4)
    with pytest.raises(ValueError, match=r"width of size 64 .* fsdp=5 .* fits is 4"):
        shard(DENSE, fsdp=5)
    # heads stand in no parameter's shape: they are found before anything is compiled
    with jax.sharding.use_abstract_mesh(mesh_of(tensor=4)), pytest.raises(ValueError, match="heads of size 2 .* is 2"):
        jax.eval_shape(DENSE.apply, jax.eval_shape(DENSE.init, jax.random.key(0)), jnp.zeros((4, 8), int))

    with jax.sharding.use_abstract_mesh(mesh_of(tensor=3)), pytest.raises(ValueError, match="heads of size 4 .* is 2"):
        encoder = make_encoder(EncoderConfig(128, 64, num_heads=4))
        jax.eval_shape(encoder.apply, jax.eval_shape(encoder.init, jax.random.key(0)), jnp.zeros((4, 8), int))
    with jax.sharding.use_abstract_mesh(mesh_of(tensor=8)), pytest.raises(ValueError, match="heads of size 4 .* is 4"):
        t5 = make_seq2seq(Seq2SeqConfig(128, 64, num_heads=4))
        jax.eval_shape(t5.encode, jax.eval_shape(t5.init, jax.random.key(0)), jnp.zeros((4, 8), int))
    with jax.sharding.use_abstract_mesh(mesh_of(tensor=4)), pytest.raises(ValueError, match="heads of size 2 .* is 2"):
        Session(DENSE, jax.random.key(0), max_length=8, num_slots=2)

    def play(num_slots):
        options = {"max_length": 16, "max_turns": 1, "max_turn_tokens": 4, "num_slots": num_slots, "group_size": 2}
        tasks = {"prompt_tokens": jnp.zeros((6, 4), int), "prompt_length": jnp.full(6, 4)}
        rollout(DENSE, DENSE.init(jax.random.key(0)), EchoEnv(), tasks, jax.random.key(1), **options)

    with jax.sharding.use_abstract_mesh(mesh_of(data=4)):
        with pytest.raises(ValueError, match="slots of size 6 does not divide among data=4 .* axis that fits is 3"):
            jax.eval_shape(lambda: play(6))
    with jax.sharding.use_abstract_mesh(mesh_of(data=2, fsdp=4)):  # more slots than rows are as many as rows
        with pytest.raises(ValueError, match="slots of size 12 .* data=2 x fsdp=4 .* axes that fits is 6"):
            jax.eval_shape(lambda: play(64))

    def loss_fn(params, batch):
        return jnp.sum(params * batch), {}

    def gradients(batch):
        return train.accumulate_gradients(loss_fn, jnp.float32(1), batch, 2)

    with jax.sharding.use_abstract_mesh(mesh_of(data=4)), pytest.raises(ValueError, match="batch of size 2 .* data=4"):
        jax.eval_shape(gradients, jnp.ones((4, 3)))


def test_remat_keeps_less_and_changes_no_number():
    config = DecoderConfig(128, 64, **SIZES)
    params = jax.jit(make_decoder(config).init)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (8, 64), 0, 128)

    def run(remat):
        """The gradient, and how many numbers wait for the backward pass."""
        model = make_decoder(dataclasses.replace(config, remat=remat))

        def loss(params):
            return jnp.sum(model.apply(params, tokens)[0] ** 2)

        waiting = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
        return jax.jit(jax.grad(loss))(params), sum(leaf.size for leaf in jax.tree.leaves(waiting))

    (plain, all_of_it), (dots, some), (full, least) = run("none"), run("dots"), run("full")
    assert least < some < all_of_it
    for again in (dots, full):  # float32, fused otherwise: about 1e-7 for a sum
        assert optax.tree.norm(optax.tree.sub(plain, again)) <= 1e-5 * optax.tree.norm(plain)
    with pytest.raises(ValueError, match="remat='some' must be one of"):
        DecoderConfig(128, remat="some")


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_devices(which):
    """In a process of its own, as a process chooses its number of devices before it starts."""
    cases = [str(Path(__file__).with_name(name)) for name in ("on_eight_devices.py", "parts_on_eight_devices.py")]
    # threads of XLA: those in an exchange wait for the others, which with a loop in the program are more than devices
    environment = {**os.environ, "NPROC": "32", "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
