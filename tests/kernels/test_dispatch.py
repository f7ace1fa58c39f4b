"""The rule of choice: names, platforms at lowering, refusals."""

import jax
import jax.numpy as jnp
import pytest

from jaxrl_kernels import dispatch
from jaxrl_kernels.dispatch import choose

X = jnp.arange(3.0)


def add(number):
    return lambda x: x + number


def run(implementation, wrap=jax.jit, **versions):
    versions = {"cpu": add(1), "tpu": add(2), "gpu": add(3), "reference": add(4), **versions}
    return wrap(choose(implementation, **versions))(X)


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize(("name", "number"), [(None, 1), ("xla", 1), ("reference", 4)])
def test_takes_what_runs_here(name, number, wrap):
    assert jnp.array_equal(run(name, wrap), X + number)


@pytest.mark.parametrize(("platform", "name"), [("cpu", "xla"), ("tpu", "pallas_tpu"), ("cuda", "pallas_gpu")])
def test_an_export_carries_the_version_of_its_platform(platform, name):
    """Without a name and by name, lowered on whatever machine this is; another platform's version is not in it."""
    numbers = {"cpu": 11.0, "tpu": 12.0, "cuda": 13.0}
    versions = {"cpu": add(11.0), "tpu": add(12.0), "gpu": add(13.0)}
    for implementation in (None, name):
        exported = jax.export.export(jax.jit(choose(implementation, **versions)), platforms=[platform])(X)
        text = exported.mlir_module()
        assert [key for key, number in numbers.items() if f"dense<{number:e}".split("0000")[0] in text] == [platform]


def test_a_missing_version_falls_back():
    for platform in ("tpu", "cuda"):
        exported = jax.export.export(jax.jit(choose(None, cpu=add(11.0), gpu="no")), platforms=[platform])(X)
        assert "dense<1.1" in exported.mlir_module()


@pytest.mark.parametrize(
    ("capability", "number"), [("9.0", "1.4"), ("8.0", "1.3"), ("10.0", "1.3"), (None, "1.3")], ids=str
)
def test_takes_the_hopper_version_on_hopper(capability, number, monkeypatch):
    """By itself only where this machine's GPU is one; by name also where there is none, for an export."""
    monkeypatch.setattr(dispatch, "compute_capability", lambda: capability)
    versions = {"cpu": add(11.0), "gpu": add(13.0), "hopper": add(14.0)}

    def text(implementation):
        chosen = choose(implementation, **versions)
        return jax.export.export(jax.jit(chosen), platforms=["cuda"])(X).mlir_module()

    assert f"dense<{number}" in text(None)
    if capability in ("9.0", None):
        assert "dense<1.4" in text("mosaic_gpu")
        with pytest.raises(ValueError, match="mosaic_gpu.*runs on cuda only; on cpu take None"):
            jax.jit(choose("mosaic_gpu", **versions))(X)
    else:
        with pytest.raises(ValueError, match=f'"pallas_gpu"; .mosaic_gpu. .*H200, GH200.*has {capability}'):
            text("mosaic_gpu")


def test_a_hopper_version_that_cannot_serve_leaves_the_call_to_the_other(monkeypatch):
    monkeypatch.setattr(dispatch, "compute_capability", lambda: "9.0")
    versions = {"cpu": add(11.0), "gpu": add(13.0), "hopper": "takes bfloat16 and float16"}
    assert "dense<1.3" in jax.export.export(jax.jit(choose(None, **versions)), platforms=["cuda"])(X).mlir_module()
    with pytest.raises(ValueError, match='one of "xla", "pallas_gpu"; .mosaic_gpu. .* takes bfloat16'):
        choose("mosaic_gpu", **versions)


def test_maps_over_a_batch():
    assert jnp.array_equal(run(None, jax.vmap), X + 1)
    with pytest.raises(ValueError, match="on cpu take None"):
        run("pallas_tpu", jax.vmap)


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize(("name", "platform"), [("pallas_tpu", "tpu"), ("pallas_gpu", "cuda")])
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the refusal is of a CPU")
def test_refuses_another_platform(name, platform, wrap):
    with pytest.raises(ValueError, match=f'"?{name}.*runs on {platform} only; on cpu take None or one of "xla", "ref'):
        run(name, wrap)


def test_by_name_between_devices():
    """Under `shard_map`, whose types say what differs between devices: the refusal has the type of the version."""
    place = jax.sharding.PartitionSpec("device")
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("device",))
    chosen = choose("pallas_gpu", cpu=add(11.0), gpu=add(13.0))
    split = jax.shard_map(chosen, mesh=mesh, in_specs=place, out_specs=place)
    assert "dense<1.3" in jax.export.export(jax.jit(split), platforms=["cuda"])(X).mlir_module()


def test_refuses_unknown_names():
    with pytest.raises(ValueError, match='one of "xla", "pallas_tpu", "pallas_gpu", "reference"; got .trition.'):
        run("trition")
    with pytest.raises(ValueError, match='one of "xla", "pallas_tpu", "reference"; .pallas_gpu. cannot .* heads of 64'):
        run("pallas_gpu", gpu="needs heads of 64, got 80")
