"""What test_sharding.py runs in a process that has eight devices: steps, gradients, rollouts and their programs."""

import dataclasses
import functools
import math
import re
from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from jaxrl_llm import ops, train
from jaxrl_llm.models import DecoderConfig, LoraConfig, apply_lora, make_decoder
from jaxrl_llm.ops.masked import Aggregation
from jaxrl_llm.sampling import rollout, score_rollout
from jaxrl_llm.types import Decoding
from tests.sampling.worlds import EchoEnv

SIZES = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "ffn_width": 96}
DENSE = DecoderConfig(128, 64, 2, **SIZES, qk_norm="head", attention_bias=True, tie_embeddings=False)
EXPERTS = DecoderConfig(128, 64, 2, **SIZES, num_experts=4, expert_width=32, dense_layers=(0,), remat="dots")
# twice an unlike pair of layers; no router is within rounding of another choice for what is sampled below
SCANNED = dataclasses.replace(EXPERTS, num_layers=4, dense_layers=(1, 3), remat="full", scan_layers=True)
MODELS = {
    "dense": make_decoder(DENSE),
    "scanned": make_decoder(SCANNED),
    "experts": make_decoder(EXPERTS),
    "lora": apply_lora(make_decoder(DENSE), LoraConfig(rank=2, targets=("query", "down"))),
}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 2, "fsdp": 4},
    "tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "wide": {"fsdp": 2, "tensor": 4},
    "sequence": {"data": 2, "sequence": 4},
    "expert": {"data": 2, "expert": 4},
    "all": {"fsdp": 2, "tensor": 2, "expert": 2},
}
FAST = [("dense", mesh) for mesh in ("data", "fsdp", "tensor", "wide", "sequence")] + [("experts", "expert")]
SLOW = [("experts", mesh) for mesh in ("all", "sequence", "wide", "data", "fsdp", "tensor")]
SLOW += [("lora", mesh) for mesh in ("data", "fsdp", "tensor", "sequence")]
SLOW += [("scanned", mesh) for mesh in ("fsdp", "tensor", "sequence", "all")]
CASES = FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
BATCH, LENGTH = 16, 36
# float32, whose sums come out in another order on every mesh: about 1e-7 of numbers of size 1
TOLERANCE = 1e-5
COLLECTIVE = re.compile(
    r"^\s*(?:ROOT )?\S+ = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|[a-z]+-permute)\(", re.M
)

# The update of plain gradient descent at rate 1 is the gradient; Adam's would divide rounding by rounding.
optimizer = optax.sgd(1.0, momentum=0.5)


def make_batch(batch=BATCH, length=LENGTH):
    """Packed rows of three segments."""
    rng, shape = np.random.default_rng(0), (batch, length)
    segment_ids = np.sort(rng.integers(0, 3, shape), axis=1)
    positions = np.stack([np.concatenate([np.arange(n) for n in np.bincount(row)]) for row in segment_ids])
    return {
        "tokens": rng.integers(0, 128, shape).astype(np.int32),
        "positions": positions.astype(np.int32),
        "segment_ids": segment_ids.astype(np.int32),
        "mask": (positions > 0) & (rng.random(shape) < 0.7),
    }


@functools.cache
def on_one_device(name):
    """The first state, and the state and metrics behind a step."""
    model = MODELS[name]
    params = jax.jit(model.init)(jax.random.key(0))
    if name == "lora":  # a fresh adapter changes nothing
        params["lora"] = jax.tree.map(lambda x: x + 0.05, params["lora"])
    state = train.init_state(params, optimizer, 0)
    return state, jax.jit(train.make_sft_step(model, optimizer))(state, make_batch())


def assert_close(got, expected):
    paths = jax.tree_util.tree_leaves_with_path(got)
    for (path, leaf), wanted in zip(paths, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, wanted, atol=TOLERANCE, err_msg=jax.tree_util.keystr(path))


def collectives(text):
    """Kind and shapes of every exchange between devices that is written down in a compiled program."""
    found = []
    for result, kind in COLLECTIVE.findall(text.replace("-start(", "(")):
        found += [
            (kind, tuple(map(int, dims.split(","))) if dims else ()) for dims in re.findall(r"\[([\d,]*)\]", result)
        ]
    return found


def check_collectives(mesh, name, found):
    """The exchanges of a step are those that the table in `jaxrl_llm.train.sharding` names, and no others."""
    sizes = MESHES[mesh]
    rows = BATCH // (sizes.get("data", 1) * sizes.get("fsdp", 1) * sizes.get("expert", 1))
    places, model = LENGTH // sizes.get("sequence", 1), MODELS[name].config
    hidden = (rows, places, model.width)
    kinds = {kind for kind, _ in found}
    expected = {"all-reduce"}
    gathered = [shape for kind, shape in found if kind == "all-gather"]
    summed = [shape for kind, shape in found if kind == "all-reduce"]
    if "fsdp" in sizes:
        expected.add("all-gather")
        matrices = [shape for shape in gathered if len(shape) == 2]
        assert len(matrices) >= 7 * model.num_layers, gathered  # once forward, some again backward
    if "sequence" in sizes:
        expected.add("collective-permute")
        # keys and values of each layer, one step less than devices forward, and at least that backward
        parts = (rows, places, model.num_kv_heads // sizes.get("tensor", 1), model.head_dim)
        passed = sum(kind == "collective-permute" and shape == parts for kind, shape in found)
        assert passed >= 4 * model.num_layers * (sizes["sequence"] - 1), found
    if "expert" in sizes:
        expected |= {"all-gather", "reduce-scatter"}
        assert ("reduce-scatter", (rows * places, model.width)) in found
    assert kinds == expected
    if "expert" not in sizes:
        # weights, and no activations: no size of a weight is a number of places, or of places of several rows
        assert not [shape for shape in gathered if {places, LENGTH, rows * places} & set(shape)], gathered
    # two sums of hidden states a layer and one of embeddings, forward; as many products of their gradients backward
    sums = sum(shape == hidden for shape in summed)
    assert sums >= 2 * model.num_layers + 1 if "tensor" in sizes else sums == 0, summed


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_a_step_equals_that_of_one_device(name, mesh):
    state, (expected, metrics) = on_one_device(name)
    step, devices = jax.jit(train.make_sft_step(MODELS[name], optimizer)), train.make_mesh(MESHES[mesh])
    with jax.set_mesh(devices):
        state, batch = train.shard_state(state, devices), train.shard_batch(make_batch(), devices)
        program = step.lower(state, batch).compile()
        with jax.transfer_guard("disallow"):
            new, own = program(state, batch)
            program(new, batch)  # what comes out lies as what went in, else it would be refused
    found = collectives(program.as_text())
    if name == "scanned":  # a layer of a stack is gathered where it is used, and never the stack
        stacks = {leaf.shape for leaf in jax.tree.leaves(state.params["layers"])}
        assert not [shape for kind, shape in found if kind == "all-gather" and shape in stacks], found
    elif name != "lora":
        check_collectives(mesh, name, found)
    assert_close((new.params, new.opt_state, own["loss"]), (expected.params, expected.opt_state, metrics["loss"]))


def test_one_compilation_for_a_shape():
    state, _ = on_one_device("dense")
    step, devices = (
        jax.jit(train.make_sft_step(MODELS["dense"], optimizer), donate_argnums=0),
        train.make_mesh(MESHES["data"]),
    )
    with jax.set_mesh(devices):
        state = train.shard_state(jax.tree.map(jnp.copy, state), devices)  # donated: others use the state as well
        for _ in range(3):
            state, _ = step(state, train.shard_batch(make_batch(), devices))
    assert step._cache_size() == 1


# ------------------------------------------------------------------------------------- micro-batches and aggregations

AGGREGATIONS = get_args(Aggregation)
ROWS, ROOM = 32, 16  # pairs of sequences, of up to ROOM tokens each
MICRO_MODEL = make_decoder(DecoderConfig(128, 64, 1, **SIZES, num_experts=4, expert_width=32))


@functools.cache
def make_pairs(packed):
    """Pairs of sequences, each pair a rollout in two pieces, as two rows or packed into one of twice the length.

    `place[r, i, t]` is where token t of the i-th sequence stands in the r-th row of pairs."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, ROOM + 1, (ROWS, 2))
    tokens = rng.integers(0, 128, (ROWS, 2, ROOM)).astype(np.int32)
    inside = np.arange(ROOM) < lengths[..., None]
    mask = inside & (np.arange(ROOM) > 0) & (rng.random((ROWS, 2, ROOM)) < 0.8)
    mask[3] = False  # a rollout that the loss must not touch
    start = np.stack([np.zeros(ROWS, int), lengths[:, 0] if packed else np.full(ROWS, ROOM)], axis=1)
    place = np.minimum(start[..., None] + np.arange(ROOM), 2 * ROOM - 1)
    laid = {name: np.zeros((ROWS, 2 * ROOM), np.int32) for name in ("tokens", "positions")}
    laid["segment_ids"] = np.full((ROWS, 2 * ROOM), -1, np.int32)
    for row, piece, t in np.argwhere(inside):
        where = row, place[row, piece, t]
        laid["tokens"][where], laid["positions"][where] = tokens[row, piece, t], t
        laid["segment_ids"][where] = piece
    weights = rng.normal(size=mask.shape).astype(np.float32)
    ids = np.repeat(np.arange(ROWS), 2).reshape(ROWS, 2)
    return laid | {"place": place.astype(np.int32), "mask": mask, "weights": weights, "ids": ids.astype(np.int32)}


def micro_gradients(num_micro, packed, sizes):
    """The gradient of every aggregation, from one program."""
    batch = make_pairs(packed)
    params = micro_params()

    def losses(params, pairs, denominators):
        rows = {name: pairs[name] for name in ("tokens", "positions", "segment_ids")}
        if not packed:
            rows = {name: x.reshape(-1, ROOM) for name, x in rows.items()}
        hidden, _ = MICRO_MODEL.apply(
            params, rows["tokens"], positions=rows["positions"], segment_ids=rows["segment_ids"]
        )
        logprobs, _ = ops.token_logprobs(jnp.roll(hidden, 1, axis=1), MICRO_MODEL.head(params), rows["tokens"])
        logprobs = logprobs.reshape(-1, 2 * ROOM)
        own = jnp.take_along_axis(logprobs[:, None], pairs["place"], axis=2).reshape(-1, ROOM)
        mask, ids = pairs["mask"].reshape(-1, ROOM), pairs["ids"].reshape(-1)
        values = own * pairs["weights"].reshape(-1, ROOM)
        each = [
            ops.reduce_loss(values, mask, agg=agg, max_len=ROOM, rollout_ids=ids, denominator=denominators[agg])
            for agg in AGGREGATIONS
        ]
        return jnp.stack(each)

    def gradient(params, batch, chosen):
        mask, ids = batch["mask"].reshape(-1, ROOM), batch["ids"].reshape(-1)
        denominators = {agg: ops.loss_denominator(mask, agg=agg, max_len=ROOM, rollout_ids=ids) for agg in AGGREGATIONS}

        def loss_fn(params, pairs):
            return jnp.vdot(losses(params, pairs, denominators), chosen), {}

        return train.accumulate_gradients(loss_fn, params, batch, num_micro)[:2]

    jitted, choices = jax.jit(gradient), np.eye(len(AGGREGATIONS), dtype=np.float32)
    mesh = train.make_mesh(sizes or {}, jax.devices()[: math.prod((sizes or {}).values())])
    with jax.set_mesh(mesh):
        whole = jax.NamedSharding(mesh, jax.P())
        arrays = train.shard_state(params, mesh), jax.device_put(batch, whole)
        chosen = [jax.device_put(choice, whole) for choice in choices]
        with jax.transfer_guard("disallow"):
            found = [jitted(*arrays, choice) for choice in chosen]
    assert jitted._cache_size() == 1
    return jax.device_get(found)


@functools.cache
def micro_params():
    return jax.jit(MICRO_MODEL.init)(jax.random.key(3))


@functools.cache
def whole_gradients():
    return micro_gradients(1, False, None)


ONE_AXIS = [{axis: size} for size in (2, 4) for axis in ("data", "fsdp", "tensor", "sequence", "expert")]
SWEEP = [(micro, packed, sizes) for sizes in [None, *ONE_AXIS] for micro in (1, 2, 4, 8) for packed in (True, False)]
MICRO_FAST = [(4, True, None), (8, False, {"fsdp": 4}), (2, True, {"sequence": 2})]


@pytest.mark.parametrize(
    ("num_micro", "packed", "sizes"),
    MICRO_FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in SWEEP if case not in MICRO_FAST],
)
def test_micro_batches_packed_or_not_give_one_gradient(num_micro, packed, sizes):
    for agg, got, expected in zip(
        AGGREGATIONS, micro_gradients(num_micro, packed, sizes), whole_gradients(), strict=True
    ):
        assert float(max(map(jnp.max, jax.tree.leaves(expected)))) > 1e-3, agg
        assert_close(got, expected)


# ----------------------------------------------------------------------------------------------------------- sampling


def play(model, params, tasks, key):
    """Multi-turn rollouts, observations made of what was sampled, then scored with a shared prefix."""
    sampled = rollout(
        *(model, params, EchoEnv(2), tasks, key),
        max_length=24,
        max_turns=2,
        max_turn_tokens=6,
        stop_sequences=[[5], [6], [7]],
        group_size=4,
        num_slots=8,
        decoding=Decoding(temperature=0.8),
    )
    return sampled, score_rollout(model, params, sampled, decoding=sampled.decoding, group_size=4, shared_prefix=2)[0]


def check_exchanges_of_a_sampler(mesh, config, found):
    """Slots keep their cache: of keys and values, prompts' alone go to where their slots are."""
    sizes, room = MESHES[mesh], 24
    slots = 8 // (sizes.get("data", 1) * sizes.get("fsdp", 1) * sizes.get("expert", 1))
    caches = [shape[2:] for _, shape in found if len(shape) >= 4]  # places lie behind rows and heads, or layers
    assert all(room not in shape and room - 1 not in shape for shape in caches), caches
    if "tensor" in sizes and not (config.num_experts or config.scan_layers):
        # a decode step sums embeddings once and hidden states twice a layer, and brings logits together
        sums, logits = ("all-reduce", (slots, 1, config.width)), ("all-gather", (slots, config.vocab_size))
        assert (found.count(sums), found.count(logits)) == (2 * config.num_layers + 1, 1), found


@functools.cache
def played_on_one_device(name):
    params = jax.jit(MODELS[name].init)(jax.random.key(0))
    tasks = {
        "prompt_tokens": jax.random.randint(jax.random.key(1), (4, 5), 0, 64),
        "prompt_length": jnp.array([5, 3, 4, 5]),
    }
    arrays = params, tasks, jax.random.key(2)
    return arrays, jax.device_get(jax.jit(functools.partial(play, MODELS[name]))(*arrays))


@pytest.mark.parametrize(
    ("name", "mesh"),
    [CASES[2], CASES[5], *(pytest.param(*c, marks=pytest.mark.slow) for c in FAST[:2] + FAST[3:5] + SLOW)],
)
def test_sampled_tokens_equal_those_of_one_device(name, mesh):
    (params, tasks, key), (expected, scored) = played_on_one_device(name)
    devices = train.make_mesh(MESHES[mesh])
    with jax.set_mesh(devices):
        whole = jax.NamedSharding(devices, jax.P())
        arrays = train.shard_state(params, devices), *jax.device_put((tasks, key), whole)
        program = jax.jit(functools.partial(play, MODELS[name])).lower(*arrays).compile()
        with jax.transfer_guard("disallow"):
            sampled, own = program(*arrays)
    check_exchanges_of_a_sampler(mesh, MODELS[name].config, collectives(program.as_text()))
    np.testing.assert_array_equal(sampled.tokens, expected.tokens)
    assert_close((sampled.logprobs, own), (expected.logprobs, scored))


# -------------------------------------------------------------------------------------------- checkpoints and the loop


def test_a_checkpoint_goes_from_eight_devices_to_four_to_one(tmp_path):
    model, tokens = MODELS["dense"], make_batch()["tokens"]
    logits = jax.jit(lambda state: model.logits(state.params, tokens))
    state = on_one_device("dense")[0]
    expected = np.asarray(logits(state))
    for step, sizes in enumerate([{"fsdp": 4, "tensor": 2}, {"data": 2, "tensor": 2}, {}]):
        mesh = train.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values()), dtype=int))])
        template = train.shard_state(jax.tree.map(jnp.zeros_like, state), mesh)
        checkpoints = train.Checkpoints(tmp_path)
        if step:
            found, state = checkpoints.restore(template)
            assert found == step
            assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, template)
            with jax.set_mesh(mesh):
                np.testing.assert_allclose(logits(state), expected, atol=TOLERANCE)
        else:
            state = train.shard_state(state, mesh)
        checkpoints.save(step + 1, state)
        checkpoints.close()
    np.testing.assert_array_equal(logits(state), expected)  # one device again, and the same program


def run_loop(folder, mesh, seed, steps=2):
    """Two steps on host batches, as a page runs them: `config.mesh` is all that differs."""
    model = MODELS["dense"]

    def run(config, log):
        final = train.loop(
            lambda seed: train.init_state(model.init(jax.random.key(0)), optimizer, seed),
            train.make_sft_step(model, optimizer),
            steps=steps,
            log=log,
            batch=lambda step: train.stack_seeds(
                seed, lambda one: jax.tree.map(lambda x: np.roll(x, step + one, axis=0), make_batch())
            ),
        )
        log.summary({"norm": float(optax.tree.norm(final.params))})

    config = ConfigDict({"seed": seed, "checkpoint_every": 1, "mesh": mesh})
    train.run_page(SimpleNamespace(__doc__="", run=run), config, folder, quiet=True)
    return train.read_arrays(folder / "checkpoints" / "train" / str(steps)), train.read_metrics(folder)


@pytest.mark.parametrize("seed", [0, pytest.param((0, 1), marks=pytest.mark.slow)])
def test_a_page_runs_on_the_mesh_of_its_config(tmp_path, monkeypatch, seed):
    expected, lines = run_loop(tmp_path / "one", {"data": 1, "fsdp": 1}, seed)
    made, over_seeds = [], train.loops.over_seeds
    monkeypatch.setattr(train.loops, "over_seeds", lambda *a, **k: made.append(over_seeds(*a, **k)) or made[-1])
    got, own = run_loop(tmp_path / "eight", {"data": 2, "fsdp": 4}, seed)
    # init and two iterations: a program each
    assert [function.jitted._cache_size() for function in made] == [1, 1]
    assert_close(got, expected)
    np.testing.assert_allclose([line["loss"] for line in own], [line["loss"] for line in lines], rtol=TOLERANCE)
