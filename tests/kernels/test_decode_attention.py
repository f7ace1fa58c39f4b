"""decode_attention: every version against a float64 oracle in NumPy over ragged, shared pages, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from jaxrl_kernels import decode_attention_hopper, decode_attention_tpu
from jaxrl_kernels.attention import flash_attention
from jaxrl_kernels.attention_mask import Options
from jaxrl_kernels.bench.aot import device_of
from jaxrl_kernels.decode_attention import _sight, decode_attention
from jaxrl_kernels.dispatch import export_for

VERSIONS = ["reference", "xla", "interpret_tpu", "interpret_gpu"]
FLOAT32 = 2e-5  # some hundred float32 roundings of numbers about 1
BFLOAT16 = 2e-2  # 2^-8 for each rounding: of the weights and of the output


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two pages to a block of the TPU kernel, so that a slot has several."""
    monkeypatch.setattr(decode_attention_tpu, "MOST_KEYS", 256)


def oracle(q, k_pages, v_pages, lengths, table, positions=None, *, window=None, sinks=None, softcap=None, scale=None):
    """The definition in float64, a query at a time."""
    q, k_pages, v_pages = (np.asarray(x, np.float64) for x in (q, k_pages, v_pages))
    (slots, length, heads, width), (num_kv, page) = q.shape, (k_pages.shape[1], k_pages.shape[3])
    out = np.zeros(q.shape)
    for s, t, h in np.ndindex(slots, length, heads):
        position = lengths[s] - length + t if positions is None else positions[s, t]
        places = [n for n in range(lengths[s]) if n <= position and (window is None or position - n < window)]
        if not places:
            continue
        pages, inside = np.asarray(table)[s][np.array(places) // page], np.array(places) % page
        head = h // (heads // num_kv)
        logits = k_pages[pages, head, :, inside] @ q[s, t, h] * (width**-0.5 if scale is None else scale)
        logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
        weights = np.exp(logits)
        total = weights.sum() + (0 if sinks is None else np.exp(np.float64(sinks[h])))
        out[s, t, h] = weights @ v_pages[pages, head, inside] / total
    return out


def make(length=3, heads=4, num_kv=2, width=64, page=128, dtype=jnp.float32, seed=0):
    """Five slots: full, empty, one key, up to a page's border and one beyond it; the last three share their pages."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(rng.normal(size=shape), dtype)
        for shape in ((5, length, heads, width), (7, num_kv, width, page), (7, num_kv, page, width))
    )
    lengths = np.array([5 * page, 0, 1, 2 * page, 2 * page + 1], np.int32)
    table = rng.permutation(7)[:5] + np.zeros((5, 1), int)
    table[3:, 1], table[4, 2] = table[0, 3], table[0, 4]
    # what no slot holds has no page
    table = np.where(np.arange(5) * page < lengths[:, None], table, [[-3, 10**6, 7, -(2**31), 2**31 - 1]])
    return (q, k, v, jnp.asarray(lengths), jnp.asarray(table, jnp.int32)), lengths, table


@functools.partial(jax.jit, static_argnames=("implementation", "window", "softcap", "scale"))
def run(*arrays, **options):
    return decode_attention(*arrays, **options)


def check(arrays, lengths, table, tolerance, implementation, positions=None, **options):
    given = {} if positions is None else {"positions": jnp.asarray(positions)}
    out = run(*arrays, implementation=implementation, **given, **options)
    assert out.dtype == arrays[0].dtype
    expected = oracle(*arrays[:3], lengths, table, positions, **options)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=tolerance, rtol=tolerance)
    return out


@pytest.mark.parametrize("implementation", VERSIONS)
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 140, "scale": 0.3}, {"softcap": 2.0, "sinks": np.linspace(-1, 2, 4, dtype=np.float32)}],
    ids=["plain", "window", "softcap_sinks"],
)
def test_ragged_shared_pages(implementation, options):
    """A slot with fewer keys than queries has padding by default: the first two queries of the slot with one key."""
    arrays, lengths, table = make()
    out = check(arrays, lengths, table, FLOAT32, implementation, **options)
    assert not np.any(out[1]) and not np.any(out[2, :2]) and np.all(np.any(out[2, 2], axis=-1))


@pytest.mark.parametrize("implementation", VERSIONS)
def test_padding_queries_and_places(implementation):
    """Forced tokens: other numbers of queries per slot, the padding before, behind and between; queries in the past."""
    arrays, lengths, table = make()
    positions = np.array([[638, 639, -1], [-1, -1, -1], [-1, 0, -1], [17, -1, 130], [-1, -1, 256]], np.int32)
    out = check(arrays, lengths, table, FLOAT32, implementation, positions, window=140)
    assert not np.any(np.asarray(out)[positions < 0])


@pytest.mark.parametrize("implementation", VERSIONS)
@pytest.mark.parametrize(("heads", "num_kv", "width"), [(4, 1, 256), (2, 2, 128)], ids=["mqa_256", "mha_128"])
def test_contiguous_bfloat16(implementation, heads, num_kv, width):
    """One query per slot and a cache of one long page per slot, which the TPU kernel takes in parts."""
    rng = np.random.default_rng(1)
    shapes = (4, 1, heads, width), (4, num_kv, width, 640), (4, num_kv, 640, width)
    lengths = np.array([0, 639, 640, 130], np.int32)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    check([*arrays, jnp.asarray(lengths)], lengths, np.arange(4)[:, None], BFLOAT16, implementation)


@pytest.mark.parametrize("implementation", ["xla", "interpret_gpu"])
def test_odd_sizes(implementation):
    """Pages of 100 places and heads of 80: no power of two. More than one block of keys to a page, and 72 rows to a key
    head, more than one program of the GPU has."""
    arrays, lengths, table = make(12, 12, 2, 80, 100, jnp.bfloat16)
    check(arrays, lengths, table, BFLOAT16, implementation, window=150)


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((2, 4, 2, 64, 128), jnp.float16, {"softcap": 2.0, "sinks": np.linspace(-1, 2, 4, dtype=np.float32)}),
        ((3, 23, 1, 128, 64), jnp.bfloat16, {"window": 70, "scale": 0.05}),
    ],
    ids=["softcap_sinks", "window"],
)
def test_hopper(shape, dtype, options, monkeypatch):
    """Ragged, shared pages; the second has 69 rows to its key head, more than a block of the grid takes."""
    monkeypatch.setattr(decode_attention_hopper, "FEWEST_KEYS", 64 * shape[4] // 32)  # two or three shares
    arrays, lengths, table = make(*shape, dtype)
    tolerance = BFLOAT16 if dtype == jnp.bfloat16 else BFLOAT16 / 8  # three bits more
    out = check(arrays, lengths, table, tolerance, "interpret_mosaic", **options)
    assert not np.any(out[1])
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    assert not gpu_callbacks.get_races().races_found


def test_tpu_kernel_has_no_races():
    """Copies of this block and the next, under the interpreter that watches every access; unwritten memory is NaN."""
    (q, k, v, lengths, table), held, ids = make()
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    sight = _sight(lengths[:, None] - 3 + jnp.arange(3), lengths, 140)
    table = jnp.clip(table, 0, 6)
    attend = functools.partial(decode_attention_tpu.attend, Options(True, 140, None, 0.125), interpret=interpret)
    out = attend(q[:4], k, v, table[:4], jax.tree.map(lambda x: x[:4], sight), None)
    np.testing.assert_allclose(out, oracle(q[:4], k, v, held, ids, window=140), atol=FLOAT32)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


def test_a_wider_query_is_rounded_to_the_cache():
    (q, k, v, lengths, table), *_ = make()
    k, v = k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
    out = run(q, k, v, lengths, table)
    assert out.dtype == jnp.float32
    assert jnp.array_equal(out, run(q.astype(jnp.bfloat16), k, v, lengths, table).astype(jnp.float32))


def test_a_contiguous_cache_is_not_gathered():
    shapes = [(64, 1, 8, 32), (64, 2, 32, 256), (64, 2, 256, 32)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(decode_attention).lower(*arrays, jax.ShapeDtypeStruct((64,), jnp.int32)).as_text()
    assert "gather" not in text and "dynamic_slice" not in text and "while" not in text


@pytest.mark.parametrize("table", [None, (8, 3)], ids=["contiguous", "paged"])
@pytest.mark.parametrize(
    ("platform", "page", "call"), [("tpu", 256, "@tpu_custom_call"), ("tpu", 100, None), ("cuda", 100, "triton")]
)
def test_exports_the_kernel_of_the_platform(platform, page, call, table):
    shapes = [(8, 4, 8, 80), (8, 2, 80, page), (8, 2, page, 80)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    arrays += [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8,), table) if shape is not None]
    call_it = functools.partial(decode_attention, window=70, sinks=jnp.zeros(8))
    text = export_for(platform, call_it, *arrays).mlir_module()
    assert call in text if call else "tpu_custom_call" not in text


@pytest.mark.parametrize("shape", [(1, 8, 2, 64, 128), (2, 80, 2, 128, 64)], ids=["64", "128"])
def test_exports_the_hopper_kernel_by_name(shape):
    arrays, *_ = make(*shape, jnp.bfloat16)
    call_it = functools.partial(decode_attention, window=70, softcap=9.0, implementation="mosaic_gpu")
    text = export_for("cuda", call_it, *arrays).mlir_module()
    assert text.count("@mosaic_gpu_v2(") == 1 and "triton" not in text


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("width", [64, 128])
def test_compiles_for_tpus(topology, width, monkeypatch):
    """64 slots of 8k tokens, 32 heads, and no copy of the cache to another layout, narrow heads included."""
    pytest.importorskip("libtpu")
    monkeypatch.undo()  # blocks as they are
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = [(64, 8, 32, width), (4096, 8, width, 128), (4096, 8, 128, width)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    arrays += [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for shape in ((64,), (64, 64))]
    compiled = jax.jit(decode_attention).lower(*arrays).compile()
    assert "tpu_custom_call" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**25  # half of the values would be 2^29


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128, 192])
def test_compiles_for_hopper(width):
    """64 slots of 8k tokens, 32 heads, down to the machine's code."""
    pytest.importorskip("jax_cuda12_plugin")
    sharding = jax.sharding.SingleDeviceSharding(device_of("h100"))
    shapes = [(64, 8, 32, width), (4096, 8, width, 128), (4096, 8, 128, width)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    arrays += [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for shape in ((64,), (64, 64))]
    compiled = jax.jit(functools.partial(decode_attention, implementation="mosaic_gpu")).lower(*arrays).compile()
    assert "mosaic_gpu" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**26  # half of the values would be 2^28 or more


@pytest.mark.parametrize("paged", [False, True])
def test_gradients_are_those_of_flash_attention(paged):
    """Through queries, keys and values, for rows whose keys lie in order."""
    rng = np.random.default_rng(0)
    q, k, v, weights = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in [(2, 3, 4, 8), (2, 2, 8, 16), (2, 2, 16, 8), (2, 3, 4, 8)]
    )
    lengths, sinks = jnp.array([10, 5]), jnp.asarray(rng.normal(size=4), jnp.float32)
    table = jnp.array([[1, 0], [3, 2]]) if paged else None
    places = lengths[:, None] - 3 + jnp.arange(3), jnp.broadcast_to(jnp.arange(16), (2, 16))

    def ours(q, k, v):
        if paged:  # pages of 8 places, out of order
            k = k.reshape(2, 2, 8, 2, 8).transpose(0, 3, 1, 2, 4).reshape(4, 2, 8, 8)[jnp.array([1, 0, 3, 2])]
            v = v.reshape(2, 2, 2, 8, 8).transpose(0, 2, 1, 3, 4).reshape(4, 2, 8, 8)[jnp.array([1, 0, 3, 2])]
        return jnp.sum(weights * decode_attention(q, k, v, lengths, table, sinks=sinks, window=6))

    def expected(q, k, v):
        keys, values = jnp.moveaxis(k, 3, 1), jnp.moveaxis(v, 2, 1)
        return jnp.sum(weights * flash_attention(q, keys, values, positions=places, sinks=sinks, window=6))

    grads = [jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v) for loss in (ours, expected)]
    for found, wanted in zip(*grads, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-6)  # float32 sums of ten numbers of size 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 3, 5, 64)}, "5 query heads are not a multiple of 2"),
        ({"q": (2, 3, 4, 32)}, "heads of 32 in q and of 64 in the cache"),
        ({"q": (2, 0, 4, 64)}, "length 0"),
        ({"v_pages": (6, 2, 64, 128)}, "got q"),
        ({"v_pages": np.zeros((6, 2, 128, 64), np.float16)}, "one dtype for keys and values"),
        ({"page_table": None}, "6 pages for 2 slots"),
        ({"page_table": np.zeros((3, 3), np.int32)}, r"page_table of shape \(3, 3\), expected \[2, M\]"),
        ({"page_table": np.zeros((2, 3), np.float32)}, "page_table of dtype float32"),
        ({"page_table": np.full((2, 3), 6, np.int32)}, "names pages 6 to 6 in use, expected 0 to 5"),
        ({"lengths": np.zeros(3, np.int32)}, "lengths of shape"),
        ({"lengths": np.array([1, 385], np.int32)}, "lengths of 1 to 385, expected 0 to 384"),
        ({"positions": np.zeros((2, 2), np.int32)}, "positions of shape"),
        ({"window": 0}, "window=0"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"sinks": np.zeros(3, np.float32)}, "sinks of shape"),
        ({"implementation": "magic"}, "implementation must be None or one of"),
        ({"implementation": "pallas_gpu"}, "runs on cuda only"),
        ({"implementation": "mosaic_gpu"}, "needs a cache in bfloat16 or float16.*got float32"),
        (
            {"k_pages": (6, 2, 64, 100), "v_pages": (6, 2, 100, 64), "implementation": "pallas_tpu"},
            "cannot serve this call: needs pages of a multiple of 128 places, got 100",
        ),
    ],
)
def test_refuses(change, message):
    shapes = {"q": (2, 3, 4, 64), "k_pages": (6, 2, 64, 128), "v_pages": (6, 2, 128, 64)}
    given = {**shapes, "lengths": np.array([1, 200]), "page_table": np.zeros((2, 3), np.int32), **change}
    arrays = {name: jnp.zeros(x) if isinstance(x, tuple) else x for name, x in given.items()}
    with pytest.raises(ValueError, match=message):
        decode_attention(**arrays)


def test_refuses_a_table_beyond_the_scalar_memory():
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((256, 1, 1, 8), (4, 1, 8, 128), (4, 1, 128, 8))]
    arrays += [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((256,), (256, 1024))]
    with pytest.raises(ValueError, match="take larger pages"):
        jax.eval_shape(functools.partial(decode_attention, implementation="pallas_tpu"), *arrays)
    jax.eval_shape(decode_attention, *arrays)
