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
from jaxrl_llm.train import planning
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
EXPERTS_BY_HAND = 48 * 128 * 3 * 2048 * 768


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
    """Weights in bfloat16 and two moments in float32, divided among `fsdp`, experts also among `expert`."""
    entries = json.loads(TABLE.read_text())
    for entry in entries:
        model, mesh, memory = entry["model"], entry["mesh"], entry["memory_per_chip"]
        experts = EXPERTS_BY_HAND if "a3b" in model else 0
        fsdp = mesh.get("fsdp", 1)
        a_chip = (BY_HAND[model] - experts) / fsdp + experts / fsdp / mesh.get("expert", 1)
        assert memory["weights"] + memory["optimizer"] == pytest.approx((2 + 8) * a_chip, rel=0.02), entry
        assert memory["weights"] == pytest.approx(2 * a_chip, rel=0.02)
        assert math.prod(mesh.values()) == entry["chips"]
        if entry["fits"]:
            assert memory["total"] <= memory["available"] and entry["programs"]["train"]["compiles"]


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
  ROOT %w = (s32[], f32[8,8]{1,0}) while(%t), condition=%condition, body=%body
}
"""  # noqa: E501


def test_a_schedule_knows_how_often_a_loop_runs():
    found = read_schedule(PROGRAM)
    assert found == Schedule(1 + 28 * 10, 0, 28 * 50, 28 * 7, 2 * 256 + 28 * 128)
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


def test_what_the_compiler_refuses():
    all_of_it = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm."
    rest = "RESOURCE_EXHAUSTED: total memory required for HLO temporaries (93.16G) exceeds available HBM (15.75G)"
    assert planning._needed(all_of_it, 4 * GIB) == 16 * GIB
    assert planning._needed(rest, 4 * GIB) == pytest.approx(93.16 * GIB)
    assert planning._needed("INTERNAL: something else", 0) is None


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
def test_compiles_for_tpus(capsys):
    """The real steps of the search agent, and names that libtpu does not know."""
    pytest.importorskip("libtpu", reason=f"compiling for TPUs needs it: {planning.INSTALL}")
    sizes = ["--config.mesh.fsdp=4", "--config.model.head_dim=128", "--config.model.scan_layers=True"]
    assert command.main(["--config=search_r1:tiny", "--topology=v5e:2x2", "--json", *sizes]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] and report["chips"] == 4 and report["flops"] > 0 and 0 < report["mfu"] < 1
    assert {"weights", "optimizer", "reference", "activations", "cache", "batch"} <= set(report["memory_per_chip"])
    assert command.main(["--config=search_r1:tiny", "--topology=v5e:7x3"]) == 2
    assert "libtpu knows no topology 'v5e:7x3'" in capsys.readouterr().err
