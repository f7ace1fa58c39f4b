"""flash_attention: every version against a float64 oracle in NumPy, values and gradients, and what it refuses."""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from jaxrl_kernels import attention_tpu, dispatch
from jaxrl_kernels.attention import flash_attention, make_marks
from jaxrl_kernels.attention_mask import Options, block_bounds, visible, whole_bounds
from jaxrl_kernels.bench.aot import device_of
from jaxrl_kernels.dispatch import export_for

VERSIONS = ["reference", "xla", "interpret", "interpret_gpu"]


def oracle(q, k, v, out_grad, seen, *, sinks=None, softcap=None, scale=None, bias=None):
    """Output and gradients of q, k, v, bias and sinks in float64, written out by hand."""
    q, k, v, out_grad = (np.asarray(x, np.float64) for x in (q, k, v, out_grad))
    batch, length, heads, width = q.shape
    group = heads // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scale = width**-0.5 if scale is None else scale
    logits = scale * np.einsum("bthd,bshd->bhts", q, k)
    slope = 1.0
    if softcap is not None:
        slope = 1 - np.tanh(logits / softcap) ** 2
        logits = softcap * np.tanh(logits / softcap)
    if bias is not None:
        logits = logits + np.asarray(bias, np.float64)
    weights = np.where(seen[:, None], np.exp(logits), 0)
    sink = 0 if sinks is None else np.exp(np.asarray(sinks, np.float64))[:, None, None]
    total = weights.sum(-1, keepdims=True) + sink
    weights = weights / np.where(total > 0, total, 1)
    out = np.einsum("bhts,bshd->bthd", weights, v)
    inner = np.einsum("bthd,bthd->bht", out, out_grad)[..., None]
    logit_grad = weights * (np.einsum("bthd,bshd->bhts", out_grad, v) - inner)
    product_grad = logit_grad * slope * scale
    by_group = (batch, k.shape[1], heads // group, group, width)
    grads = {
        "q": np.einsum("bhts,bshd->bthd", product_grad, k),
        "k": np.einsum("bhts,bthd->bshd", product_grad, q).reshape(by_group).sum(3),
        "v": np.einsum("bhts,bthd->bshd", weights, out_grad).reshape(by_group).sum(3),
    }
    if bias is not None:
        shared = tuple(axis for axis in (0, 1) if bias.shape[axis] == 1)
        grads["bias"] = logit_grad.sum(axis=shared, keepdims=True)
    if sinks is not None:
        grads["sinks"] = -(sink / total * inner).sum((0, 2, 3))
    return out, grads


def mask(q_places, k_places, *, segments=None, causal=True, window=None):
    """[B, T, S] from the definition: same segment, not later, not further away than the window."""
    distance = q_places[:, :, None] - k_places[:, None]
    seen = distance >= 0 if causal else np.ones_like(distance, bool)
    if window is not None:
        seen = seen & (np.abs(distance) < window)
    if segments is not None:
        seen = seen & (segments[0][:, :, None] == segments[1][:, None])
    return seen


def inputs(length, key_length=None, *, batch=2, heads=4, num_kv=2, width=64, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(length, heads), (key_length or length, num_kv), (key_length or length, num_kv), (length, heads)]
    return [jnp.asarray(rng.normal(size=(batch, *shape, width)), dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("implementation", "causal", "window", "softcap", "scale"))
def run(arrays, out_grad, segment_ids=None, positions=None, **options):
    """Output and gradients of a version."""

    def call(arrays):
        kwargs = {name: arrays[name] for name in ("bias", "sinks") if name in arrays}
        return flash_attention(
            arrays["q"], arrays["k"], arrays["v"], segment_ids=segment_ids, positions=positions, **kwargs, **options
        )

    out, pull = jax.vjp(call, arrays)
    return out, pull(out_grad)[0]


def check(
    implementation, q, k, v, out_grad, seen, *, tolerance, segment_ids=None, positions=None, extra=None, **options
):
    extra = extra or {}
    arrays = {"q": q, "k": k, "v": v, **extra}
    out, grads = run(arrays, out_grad, segment_ids, positions, implementation=implementation, **options)
    capped = {name: options[name] for name in ("softcap", "scale") if name in options}
    expected, expected_grads = oracle(q, k, v, out_grad, seen, **extra, **capped)
    assert out.dtype == q.dtype and set(grads) == set(expected_grads)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=tolerance, rtol=tolerance)
    for name, grad in grads.items():
        # sums of as many terms as there are rows: their error goes with the largest of them
        atol = tolerance * max(1, np.max(np.abs(expected_grads[name])))
        np.testing.assert_allclose(np.asarray(grad, np.float64), expected_grads[name], atol=atol, err_msg=name)


FLOAT32 = 2e-5  # some hundred float32 roundings of numbers about 1
BFLOAT16 = 3e-2  # 2^-8 for each rounding: of the inputs' products' weights, of the output and of the gradient


@pytest.mark.parametrize("implementation", VERSIONS)
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False, "softcap": 2.0}, {"window": 40, "scale": 0.3}, {"causal": False, "window": 9}],
    ids=["causal", "softcap", "window", "two_sided"],
)
def test_options(implementation, options):
    arrays = inputs(300)  # more than one block of each version and a multiple of none
    places = np.broadcast_to(np.arange(300), (2, 300))
    seen = mask(places, places, causal=options.get("causal", True), window=options.get("window"))
    check(implementation, *arrays, seen, tolerance=FLOAT32, **options)


@pytest.mark.parametrize(
    ("width", "implementation"), [*itertools.product([64, 128], VERSIONS), (128, "interpret_mosaic")]
)
def test_packed_bfloat16_with_sinks(implementation, width):
    arrays = inputs(133, width=width, dtype=jnp.bfloat16)
    segments = np.sort(np.random.default_rng(1).integers(-1, 3, (2, 133)), axis=1)
    segments[1] = np.where(segments[1] == 1, 2, segments[1])  # segment 1 is empty in the second row
    places = np.broadcast_to(np.arange(133), (2, 133))
    seen = mask(places, places, segments=(segments, segments))
    extra = {"sinks": jnp.linspace(-1, 2, 4)}
    check(implementation, *arrays, seen, tolerance=BFLOAT16, segment_ids=jnp.asarray(segments), extra=extra)


@pytest.mark.parametrize("implementation", VERSIONS)
def test_pairs_and_rows_that_see_nothing(implementation):
    """Queries of a segment without keys, and a whole row of the batch: zeros, and no gradient but zeros."""
    arrays = inputs(5, 70, num_kv=1)
    ours = np.array([[0, 0, 1, 7, 7], [9, 9, 9, 9, 9]])
    theirs = np.stack([np.repeat([0, 1], 35), np.repeat([0, 1], 35)])
    positions = np.array([[3, 40, 50, 60, 61]] * 2), np.broadcast_to(np.arange(70), (2, 70))
    seen = mask(*positions, segments=(ours, theirs))
    assert not seen[0, 3:].any() and not seen[1].any()
    pairs = {"segment_ids": (jnp.asarray(ours), jnp.asarray(theirs)), "positions": tuple(map(jnp.asarray, positions))}
    check(implementation, *arrays, seen, tolerance=FLOAT32, **pairs)
    out, grads = run(dict(zip("qkv", arrays, strict=False)), arrays[3], *pairs.values(), implementation=implementation)
    assert not np.any(out[1]) and not np.any(out[0, 3:])
    assert not any(np.any(grad[1]) for grad in grads.values()) and not np.any(grads["q"][0, 3:])


@pytest.mark.parametrize(
    ("change", "dtype", "options"),
    [
        ({"length": 200}, jnp.bfloat16, {}),  # with blocks that are seen whole
        ({"length": 140, "width": 80}, jnp.float16, {"window": 70, "softcap": 2.0}),
        ({"length": 130, "key_length": 70}, jnp.float16, {"causal": False, "window": 40, "scale": -0.2}),
    ],
    ids=["causal", "softcap", "two_sided"],
)
def test_hopper(change, dtype, options):
    """Its own blocks, 128 x 128 and 128 x 64, in the dtypes it takes; all accesses to shared memory are in order."""
    arrays = inputs(**change, batch=1, heads=2, num_kv=1, dtype=dtype)
    length, key_length = arrays[0].shape[1], arrays[1].shape[1]
    places = np.arange(length)[None] + key_length - length, np.arange(key_length)[None]
    seen = mask(*places, causal=options.get("causal", True), window=options.get("window"))
    tolerance = BFLOAT16 if dtype == jnp.bfloat16 else BFLOAT16 / 8  # three bits more
    check("interpret_mosaic", *arrays, seen, tolerance=tolerance, **options)
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("implementation", VERSIONS)
def test_one_row_sees_all_keys_before_it(implementation):
    """Rows of unequal length end together: a single query stands at the last key's place."""
    arrays = inputs(1, 67, batch=1, heads=2, num_kv=2)
    check(implementation, *arrays, np.ones((1, 1, 67), bool), tolerance=FLOAT32)


@pytest.mark.parametrize("implementation", ["reference", "xla", None])
@pytest.mark.parametrize("shape", [(1, 4), (2, 1)])
def test_bias(implementation, shape):
    arrays = inputs(270)
    bias = jnp.asarray(np.random.default_rng(2).normal(size=(*shape, 270, 270)), jnp.float32)
    places = np.broadcast_to(np.arange(270), (2, 270))
    seen = mask(places, places, window=50)
    check(implementation, *arrays, seen, tolerance=FLOAT32, window=50, extra={"bias": bias})


RING = """
import functools
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from jaxrl_kernels.attention import flash_attention
from jaxrl_kernels.attention_ring import ring_attention

rng = np.random.default_rng(4)
q, k, v, out_grad = (rng.normal(size=(2, 45, heads, 16)).astype("float32") for heads in (4, 2, 2, 4))
segments, sinks = np.sort(rng.integers(0, 3, (2, 45)), axis=1), np.linspace(-1, 1, 4, dtype="float32")

def gradients(attend):
    def loss(q, k, v, sinks):
        out = attend(q, k, v, segments, sinks)
        return (out * out_grad).sum(), out
    return jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(q, k, v, sinks)

def call(attention, q, k, v, segments, sinks, **kwargs):
    return attention(q, k, v, segment_ids=segments, window=20, sinks=sinks, **kwargs)

rows = P(None, "ring")
ring = jax.shard_map(
    functools.partial(call, ring_attention, axis_name="ring"), mesh=jax.sharding.Mesh(jax.devices(), ("ring",)),
    in_specs=(rows, rows, rows, rows, P()), out_specs=rows, check_vma=False,
)
whole = gradients(functools.partial(call, flash_attention, implementation="reference"))
for got, expected in zip(jax.tree.leaves(gradients(ring)), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(got, expected, atol=5e-5 * np.abs(expected).max())
print("equal")
"""


def test_ring_equals_the_joined_rows():
    """Three devices with a part of each row, packed, with a window and sinks; in a process that has three."""
    devices = "--xla_force_host_platform_device_count=3"
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}", "JAX_PLATFORMS": "cpu"}
    kernels = Path(attention_tpu.__file__).parents[1]
    environment = {**os.environ, **flags, "PYTHONPATH": str(kernels)}
    done = subprocess.run([sys.executable, "-c", RING], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_tpu_kernels_without_races():
    """The interpreter that follows copies and semaphores: no two steps of the grid touch the same memory at once."""
    q, k, v, out_grad = inputs(140, batch=1, heads=2, num_kv=1)
    options, marks = Options(True, None, None, 0.125), make_marks(q, k, None, None)
    interpret = pltpu.InterpretParams(detect_races=True)
    out, normalizer = attention_tpu.forward(options, q, k, v, *marks, interpret=interpret)
    inner = jnp.einsum("bthd,bthd->bht", out, out_grad)
    grads = attention_tpu.backward(options, q, k, v, *marks, normalizer, inner, out_grad, interpret=interpret)
    places = np.arange(140)[None]
    expected, expected_grads = oracle(q, k, v, out_grad, mask(places, places))
    np.testing.assert_allclose(out, expected, atol=FLOAT32)
    for grad, name in zip(grads, "qkv", strict=True):
        np.testing.assert_allclose(grad, expected_grads[name], atol=FLOAT32 * np.max(np.abs(expected_grads[name])))
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


bounds_of_blocks = jax.jit(block_bounds, static_argnums=(2, 3, 4))
bounds_of_whole = jax.jit(whole_bounds, static_argnums=(2, 3, 4))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_bounds_hold_everything_visible(causal, window):
    rng = np.random.default_rng(3)
    for _ in range(20):
        ours, theirs = (np.stack([rng.integers(0, 3, (2, n)), rng.integers(0, 40, (2, n))], axis=1) for n in (24, 32))
        options = Options(causal, window, None, 1.0)
        by_query, by_key = bounds_of_blocks(jnp.asarray(ours), jnp.asarray(theirs), 4, 8, options)
        pairs = (ours[:, 0, :, None], ours[:, 1, :, None]), (theirs[:, 0, None], theirs[:, 1, None])
        by_query, by_key = np.asarray(by_query), np.asarray(by_key)
        blocks = np.asarray(visible(*pairs, options)).reshape(2, 6, 4, 4, 8).any((2, 4))
        for row, i, j in np.argwhere(blocks):
            assert by_query[row, 0, i] <= j <= by_query[row, 1, i]
            assert by_key[row, 0, j] <= i <= by_key[row, 1, j]


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 30), (False, 30)])
def test_whole_bounds_hold_nothing_hidden(causal, window):
    """Rows of two segments, in blocks of 4 queries and 8 keys; and some runs are longer than a block."""
    segments, longest = np.repeat([[0] * 40 + [1] * 24], 2, axis=0), 0
    marks = jnp.asarray(np.stack([segments, np.broadcast_to(np.arange(64), (2, 64))], axis=1))
    options = Options(causal, window, None, 1.0)
    pairs = (marks[:, 0, :, None], marks[:, 1, :, None]), (marks[:, 0, None], marks[:, 1, None])
    blocks = np.asarray(visible(*pairs, options)).reshape(2, 16, 4, 8, 8).all((2, 4))
    for bounds, whole in zip(
        bounds_of_whole(marks, marks, 4, 8, options), (blocks, blocks.swapaxes(1, 2)), strict=True
    ):
        bounds = np.asarray(bounds)
        for row, i in np.ndindex(whole.shape[:2]):
            first, last = bounds[row, :, i]
            assert whole[row, i, first : last + 1].all() and (last >= 0) == whole[row, i].any()
            longest = max(longest, last + 1 - first)
    assert longest > 2


@pytest.mark.parametrize(
    ("platform", "call"), [("tpu", "tpu_custom_call"), ("cuda", "triton"), ("cpu", "stablehlo.while")]
)
@pytest.mark.parametrize("width", [80, 128])
def test_exports_the_kernel_of_the_platform(platform, call, width):
    shape = jax.ShapeDtypeStruct((1, 200, 2, width), jnp.bfloat16)
    step = jax.grad(lambda q, k, v: jnp.sum(flash_attention(q, k, v, window=30).astype(jnp.float32)), (0, 1, 2))
    assert call in export_for(platform, step, *[shape] * 3).mlir_module()


@pytest.mark.parametrize("width", [64, 80])
def test_exports_the_hopper_kernels_by_name(width):
    """With every mask: Mosaic checks layouts of registers and shared memory as it lowers."""
    shape, segments = jax.ShapeDtypeStruct((1, 200, 2, width), jnp.bfloat16), jnp.zeros((1, 200), jnp.int32)

    def loss(q, k, v):
        options = {"window": 30, "softcap": 9.0, "segment_ids": segments, "implementation": "mosaic_gpu"}
        return jnp.sum(flash_attention(q, k, v, **options).astype(jnp.float32))

    text = export_for("cuda", jax.grad(loss, (0, 1, 2)), *[shape] * 3).mlir_module()
    assert text.count("@mosaic_gpu_v2(") == 3 and "triton" not in text


@pytest.mark.parametrize(("dtype", "call"), [(jnp.bfloat16, "mosaic_gpu_v2"), (jnp.float32, "triton")], ids=str)
def test_a_hopper_gpu_takes_its_kernels_by_itself(dtype, call, monkeypatch):
    """Where they take the dtype; a shape that no other test has, as the choice is kept with what was traced."""
    monkeypatch.setattr(dispatch, "compute_capability", lambda: "9.0")
    shape, segments = jax.ShapeDtypeStruct((1, 190, 2, 64), dtype), jnp.zeros((1, 190), jnp.int32)
    attend = functools.partial(flash_attention, segment_ids=segments)
    assert call in export_for("cuda", attend, *[shape] * 3).mlir_module()


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_for_tpus(topology):
    """32 heads of 128 over 8k packed tokens, forward and backward."""
    pytest.importorskip("libtpu")
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    q, k = (jax.ShapeDtypeStruct((1, 8192, n, 128), jnp.bfloat16, sharding=sharding) for n in (32, 8))
    segments = jax.ShapeDtypeStruct((1, 8192), jnp.int32, sharding=sharding)

    def loss(q, k, v, segments):
        return jnp.sum(flash_attention(q, k, v, segment_ids=segments).astype(jnp.float32))

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, segments).compile()
    assert "tpu_custom_call" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30  # the weights alone would be 4 GiB


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128])
def test_compiles_for_hopper(width):
    """32 heads over 8k packed tokens, forward and backward, down to the machine's code."""
    pytest.importorskip("jax_cuda12_plugin")
    sharding = jax.sharding.SingleDeviceSharding(device_of("h100"))
    q, k = (jax.ShapeDtypeStruct((1, 8192, n, width), jnp.bfloat16, sharding=sharding) for n in (32, 8))
    segments = jax.ShapeDtypeStruct((1, 8192), jnp.int32, sharding=sharding)

    def loss(q, k, v, segments):
        attend = functools.partial(flash_attention, segment_ids=segments, window=2048, softcap=30.0)
        return jnp.sum(attend(q, k, v, implementation="mosaic_gpu").astype(jnp.float32))

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, segments).compile()
    assert "mosaic_gpu" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**28  # the weights alone would be 4 GiB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 8, 3, 64), "v": (2, 8, 3, 64)}, "4 query heads are not a multiple of 3"),
        ({"v": (2, 9, 2, 64)}, "got q"),
        ({"q": (2, 0, 4, 64)}, "length 0"),
        ({"segment_ids": np.zeros((2, 9), np.int32)}, "segment_ids of shapes"),
        ({"segment_ids": np.zeros((2, 8), np.float32)}, "expected integers"),
        ({"q": (2, 3, 4, 64), "positions": np.zeros((2, 3), np.int32)}, "give a pair"),
        ({"window": 0}, "window=0"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"sinks": np.zeros(3, np.float32)}, "sinks of shape"),
        ({"bias": np.zeros((1, 1, 1, 8), np.float32)}, "bias of shape"),
        ({"implementation": "magic"}, "implementation must be None or one of"),
        ({"implementation": "pallas_tpu"}, "runs on tpu only"),
        ({"implementation": "mosaic_gpu"}, "cannot serve this call: takes bfloat16 and float16.*got float32"),
        ({"implementation": "cudnn"}, "cannot serve this call: needs an NVIDIA GPU"),
        ({"implementation": "cudnn", "segment_ids": np.zeros((2, 8), np.int32)}, "has no sinks, segments"),
        ({"implementation": "interpret", "bias": np.zeros((1, 1, 8, 8), np.float32)}, "takes no bias"),
    ],
)
def test_refuses(change, message):
    shapes = {"q": (2, 8, 4, 64), "k": (2, 8, 2, 64), "v": (2, 8, 2, 64)}
    arrays = {name: jnp.zeros(change.get(name, shape)) for name, shape in shapes.items()}
    options = {name: value for name, value in change.items() if name not in shapes}
    with pytest.raises(ValueError, match=message):
        flash_attention(**arrays, **options)
