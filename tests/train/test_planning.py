"""What a plan counts, against counts by hand; what it refuses; and, where libtpu is, one program compiled for TPUs."""

import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh

from experiments import ROOT
from experiments import plan as command
from jaxrl_llm import train
from jaxrl_llm.models import make_decoder
from jaxrl_llm.train import planning, tpu_compiler
from jaxrl_llm.train.program_costs import Machine, Schedule, Work, count_work, read_schedule

GIB = 2**30
UNIT = Machine(1.0, 1.0)
TABLE = ROOT / "results" / "plan" / "table.json"
# Parameters by hand: of a layer's attention and feed-forward network or experts, of its norms and biases, of the
# embedding and, where it is another, the head. What the authors publish: 1.54, 7.62, 32.8 and 30.5 billion.
BY_HAND = {
    "qwen2.5-1.5b": 28 * (1536 * (2 * 1536 + 2 * 256) + 3 * 1536 * 8960 + 2 * 1536 + 1536 + 2 * 256)
    + 1536 * (151936 + 1),
    "qwen2.5-7b": 28 * (3584 * (2 * 3584 + 2 * 512) + 3 * 3584 * 18944 + 2 * 3584 + 3584 + 2 * 512)
    + 3584 * (2 * 152064 + 1),
    "qwen2.5-32b": 64 * (5120 * (2 * 5120 + 2 * 1024) + 3 * 5120 * 27648 + 2 * 5120 + 5120 + 2 * 1024)
    + 5120 * (2 * 152064 + 1),
    "qwen3-30b-a3b": 48 * (2048 * (2 * 4096 + 2 * 512) + 128 * 3 * 2048 * 768 + 2048 * 128 + 2 * 2048 + 2 * 128)
    + 2048 * (2 * 151936 + 1),
}
EXPERTS_BY_HAND, ROUTERS_BY_HAND = 48 * 128 * 3 * 2048 * 768, 48 * 2048 * 128


@pytest.mark.parametrize("name", BY_HAND)
def test_the_models_have_as_many_parameters_as_counted_by_hand(name):
    config = command.model_config(name)
    shapes = jax.eval_shape(make_decoder(config).init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == BY_HAND[name]
    # two FLOPs for each that works on a token: all but norms, biases (below 0.1%) and, where the head is another
    # matrix, the embedding; of 128 experts 8
    active = BY_HAND[name] - (config.vocab_size * config.width if not config.tie_embeddings else 0)
    active -= EXPERTS_BY_HAND * 120 // 128 if config.num_experts else 0
    assert planning.decoder_flops(config, 1, 0) == pytest.approx(2 * active, rel=1e-3)
    head_dim = config.head_dim
    seen = planning.decoder_flops(config, 1, 1000) - planning.decoder_flops(config, 1, 0)
    assert seen == 4 * 1000 * config.num_layers * config.num_heads * head_dim


@pytest.mark.skipif(not TABLE.exists(), reason="results/plan/table.json is made by python -m experiments.plan --table")
def test_the_table_has_the_memory_counted_by_hand():
    """Weights in bfloat16 and two moments in float32, divided among `fsdp`, experts also among `expert`; routers are
    whole on every chip (`train.sharding.PARAMETERS`): 13% of what one of v5p-1024's chips has."""
    entries = json.loads(TABLE.read_text())
    for entry in entries:
        model, mesh, memory = entry["model"], entry["mesh"], entry["memory_per_chip"]
        experts, whole = (EXPERTS_BY_HAND, ROUTERS_BY_HAND) if "a3b" in model else (0, 0)
        fsdp = mesh.get("fsdp", 1)
        a_chip = (BY_HAND[model] - experts - whole) / fsdp + experts / fsdp / mesh.get("expert", 1) + whole
        assert memory["weights"] + memory["optimizer"] == pytest.approx((2 + 8) * a_chip, rel=0.02), entry
        assert memory["weights"] == pytest.approx(2 * a_chip, rel=0.02)
        assert math.prod(mesh.values()) == entry["chips"]
        compiles = all(program["compiles"] for program in entry["programs"].values())
        assert entry["fits"] == (compiles and memory["total"] <= memory["available"]), entry


def test_work_knows_how_often_a_loop_runs():
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 8, 16), (3, 16, 16)))

    def layers(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    work = count_work(layers, {"x": x, "w": w}, UNIT)
    assert work.flops == 3 * 2 * 16 * 16 * 16
    arguments, product = 4 * (2 * 256 + 3 * 256), 4 * (256 + 256 + 256)
    assert work.bytes == 3 * product + arguments and work.seconds == work.flops + arguments
    # a matrix that four devices gather is read by each
    gathered = count_work(layers, {"x": x, "w": w}, UNIT._replace(copies=4.0))
    assert gathered.bytes - work.bytes == 3 * 3 * 4 * 256

    def loss(w, x):
        return jnp.sum(jax.checkpoint(layers)(x, w))

    again = count_work(lambda x, w: jax.grad(loss)(w, x), {"x": x, "w": w}, UNIT)
    assert again.flops >= 3 * work.flops  # once more, and two products for the gradient of each


def test_work_of_kernels_branches_and_parts():
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)

    def kernel(x):
        return pl.pallas_call(
            lambda a, b: None,
            out_shape=x,
            cost_estimate=pl.CostEstimate(flops=70, bytes_accessed=7, transcendentals=0),
        )(x)

    def chosen(x):
        return jax.lax.platform_dependent(x, default=lambda x: x @ jnp.ones((128, 128)), tpu=kernel)

    outside = 2 * 8 * 128 * 4
    assert count_work(chosen, {"x": x}, UNIT) == Work(70, 7 + outside, 70 + outside)
    assert count_work(chosen, {"x": x}, UNIT._replace(platform="cpu")).flops == 2 * 8 * 128 * 128

    def in_place(x):
        return pl.pallas_call(lambda a, b: None, out_shape=x, input_output_aliases={0: 0})(x)

    assert count_work(in_place, {"x": x}, UNIT).bytes == outside
    mesh = AbstractMesh((4,), ("data",))
    spec = jax.P("data")

    def parts(x):
        return jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)

    assert count_work(parts, {"x": x}, UNIT).flops == 4 * 2 * 2 * 2 * 128


PROGRAM = """HloModule jit_step

%fused (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %inner = f32[8,8]{1,0} add(%p, %p), backend_config={"estimated_cycles":"999"}
}

%body (t: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %part = bf16[2,8]{1,0} parameter(0)
  %whole = bf16[8,8]{1,0:T(8,128)} all-gather(%part), channel_id=1, dimensions={0}
  %again = bf16[8,8]{1,0:T(8,128)} all-gather(%part), channel_id=1, dimensions={0}
  %f = f32[8,8]{1,0} fusion(%whole), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
  ROOT %k = f32[8,8]{1,0} custom-call(%f), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"50","bytes_accessed":"7"}}
}

%condition (t: (s32[], f32[8,8])) -> pred[] {
  %end = s32[]{:T(128)} constant(28)
  ROOT %lt = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0), backend_config={"estimated_cycles":"1"}
  %sum = f32[8,8]{1,0} all-reduce(%x), channel_id=2, to_apply=%add
  %turned = f32[8,8]{0,1} copy(%sum), backend_config={"estimated_cycles":"5"}
  ROOT %w = (s32[], f32[8,8]{1,0}) while(%t), condition=%condition, body=%body
}
"""  # noqa: E501


def test_a_schedule_knows_how_often_a_loop_runs():
    found = read_schedule(PROGRAM)
    assert found == Schedule(1 + 5 + 28 * 10, 2 * 256, 28 * 50, 28 * 7, 2 * 256 + 28 * 128)
    assert read_schedule("") == Schedule()


def test_meshes_are_chosen_by_memory():
    config, v5e, v5p = command.model_config("qwen2.5-7b"), planning.CHIPS["v5e"], planning.CHIPS["v5p"]
    assert planning.choose_mesh(config, v5p, 64, length=32768, rows=1024) == {"fsdp": 64}
    assert planning.choose_mesh(config, v5p, 1024, length=4096, rows=1024) == {"data": 16, "fsdp": 64}
    assert planning.choose_mesh(config, v5e, 64, length=32768, rows=1024)["sequence"] == 2
    experts = command.model_config("qwen3-30b-a3b")
    assert planning.choose_mesh(experts, v5p, 64, length=4096, rows=1024) == {"fsdp": 8, "expert": 8}
    with pytest.raises(ValueError, match="a micro-batch of 3 rows does not divide among 64 chips"):
        planning.choose_mesh(config, v5e, 64, length=15, rows=3)


ASSIGNMENT = """BufferAssignment:
allocation 0: size 4, color 8, page 0, thread-local:
 value: <4 constant.1 @0> (size=4,offset=0): s32[]
allocation 1: size 466747392, page 0, thread-local:
allocation 2: size 1000, page 0, parameter 43, shape |f32[10,25]| at ShapeIndex {}, maybe-live-out:
 value: <5 p.1 @0> (size=1000,offset=0): f32[10,25]{1,0}
allocation 3: size 512, page 0, constant:
allocation 4: size 5120, color 6, page 0, preallocated-temp:
allocation 5: size 4000, page 0, preallocated-temp:
 value: <6 a @0> (size=3000,offset=0): f32[750]
 value: <7 b @0> (size=4000,offset=0): f32[1000]
"""


def test_buffers_are_counted_once():
    """Not those of other memory, of computations inside an instruction, nor values that take turns in a buffer."""
    assert tpu_compiler.allocated_bytes(ASSIGNMENT) == 1000 + 512 + 4000
    with pytest.raises(ValueError, match="in another form than 0.0.52 does: 'allocated: 17'"):
        tpu_compiler.allocated_bytes("allocated: 17")


def test_slots_leave_room_for_their_cache():
    config, mesh = command.model_config("qwen2.5-7b"), {"fsdp": 64}
    v5e, v5p = planning.CHIPS["v5e"], planning.CHIPS["v5p"]
    # keys and values of 28 layers, 4 heads of 128 each, in bfloat16: 1.75 GiB a row of 32k; on v5e 16 rows a chip are
    # 28 GiB of 16, 4 are 7
    assert planning.choose_slots(config, v5p, mesh, length=32768, most=1024) == 1024
    assert planning.choose_slots(config, v5e, mesh, length=32768, most=1024) == 256
    assert planning.choose_slots(config, v5e, mesh, length=2**24, most=1024) == 64


def test_advice_names_what_to_change():
    memory = {"weights": 3 * GIB, "optimizer": 10 * GIB, "reference": 3 * GIB, "activations": 9 * GIB, "cache": 5 * GIB}
    report = {
        "memory_per_chip": memory | {"total": 25 * GIB, "available": 16 * GIB},
        "mesh": {"fsdp": 8},
        "fits": False,
    }
    said = " ".join(planning.advice(report, 21 * GIB))
    for words in ("25.0 GiB of 16.0 GiB", "raise fsdp (now 8)", "micro_batches, remat='full'", "lower num_slots"):
        assert words in said


def test_moments_are_in_float32():
    state = train.init_state({"w": jnp.ones(3, jnp.bfloat16)}, train.make_optimizer({"learning_rate": 1.0}), 0)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {"float32"}
    grads = {"w": jnp.full(3, 0.1, jnp.bfloat16)}
    after, _ = train.apply_gradients(state, grads, train.make_optimizer({"learning_rate": 1.0}), jnp.zeros(()))
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


def test_bad_arguments(capsys, monkeypatch):
    assert command.main([]) == 2 and "give --config=... for a page" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command.main(["--model=qwen2.5-7b"]) == 2
    assert "needs the package libtpu, which is not installed: pip install libtpu==" in capsys.readouterr().err
    assert command.main(["--model=gpt-17"]) == 2
    assert "unknown model 'gpt-17'; there is llama3.1-8b, qwen2.5" in capsys.readouterr().err
    assert command.main(["--config=tests/train/bandit_page.py"]) == 2
    assert "defines neither programs(config)" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown chip 'v9z' in topology 'v9z:2x2'; take one like v5e:2x2"):
        planning.chip_of("v9z:2x2")


@pytest.mark.slow
def test_compiles_for_tpus(capsys, monkeypatch):
    """The real steps of the search agent, to the end and without machine code, and names that libtpu does not know."""
    pytest.importorskip("libtpu", reason=f"compiling for TPUs needs it: {planning.INSTALL}")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # libtpu ends a process with flags of another XLA
    sizes = ["--config.mesh.fsdp=4", "--config.model.head_dim=128", "--config.model.scan_layers=True"]
    assert command.main(["--config=search_r1:tiny", "--topology=v5e:2x2", "--json", *sizes]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] and report["chips"] == 4 and report["flops"] > 0 and 0 < report["mfu"] < 1
    assert {"weights", "optimizer", "reference", "activations", "cache", "batch"} <= set(report["memory_per_chip"])
    assert report["programs"]["train"]["time_from"] == "the compiler's schedule"
    assert command.main(["--config=search_r1:tiny", "--topology=v5p:2x2x1", "--quick", "--json", *sizes]) == 0
    quick = json.loads(capsys.readouterr().out)
    assert quick["fits"] and quick["flops"] == report["flops"] and quick["cpu_seconds"] > 0
    assert quick["programs"]["train"]["time_from"] == "FLOPs and bytes"
    assert quick["programs"]["train"]["least_seconds"]["interconnect"] > 0
    assert command.main(["--config=search_r1:tiny", "--topology=v5e:7x3"]) == 2
    assert "libtpu knows no topology 'v5e:7x3'" in capsys.readouterr().err
