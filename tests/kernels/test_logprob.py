"""fused_logprob and fused_top_k: every version against the definition in float64, values and gradients, what must not
be read, what must not exist, and what is refused."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxrl_kernels import logprob_gpu, logprob_hopper, logprob_tpu, logprob_xla
from jaxrl_kernels.bench.aot import compiler_of, device_of
from jaxrl_kernels.dispatch import export_for
from jaxrl_kernels.logprob import fused_logprob, fused_top_k
from jaxrl_kernels.logprob_math import Options

VERSIONS = ["reference", "xla", "interpret_tpu", "interpret_gpu"]
# Sums of some hundred float32 products of about 1, relative to the largest entry of an array.
FLOAT32 = 5e-6
# One rounding of the logits' gradient to bfloat16 (2^-9), and one of the result.
BFLOAT16 = 2**-7


def oracle(arrays, *, temperature=1.0, softcap=None):
    """Log-probs [N, K], entropy [N] and the gradient of their weighted sum, in float64, written out by hand."""
    hidden, head, bias, targets, needed, to_logprob, to_entropy = arrays
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    products = hidden @ head.T + (0 if bias is None else np.asarray(bias, np.float64))
    capped = products if softcap is None else softcap * np.tanh(products / softcap)
    slope = 1 if softcap is None else 1 - (capped / softcap) ** 2
    all_logprobs = capped / temperature
    all_logprobs = all_logprobs - all_logprobs.max(-1, keepdims=True)
    all_logprobs -= np.log(np.exp(all_logprobs).sum(-1, keepdims=True))
    p = np.exp(all_logprobs)
    entropy = -(p * all_logprobs).sum(-1, keepdims=True)
    counts = np.ones(len(hidden), bool) if needed is None else np.asarray(needed)
    to_logprob, to_entropy = to_logprob * counts[:, None], to_entropy * counts
    logit_grad = -p * (to_logprob.sum(1, keepdims=True) + to_entropy[:, None] * (all_logprobs + entropy))
    rows = np.arange(len(hidden))
    for k in range(targets.shape[1]):
        logit_grad[rows, targets[:, k]] += to_logprob[:, k]
    product_grad = logit_grad * slope / temperature
    logprobs = np.take_along_axis(all_logprobs, np.asarray(targets), axis=1) * counts[:, None]
    grads = product_grad @ head, product_grad.T @ hidden, product_grad.sum(0)
    return logprobs, entropy[:, 0] * counts, grads[: 2 if bias is None else 3]


def make(num_rows, vocab, width, *, num_targets=1, bias=False, needed=None, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(num_rows, width)), 2 * rng.normal(size=(vocab, width)) / width**0.5
    targets = rng.integers(0, vocab, (num_rows, num_targets)).astype(np.int32)
    return (
        *(jnp.asarray(hidden, dtype), jnp.asarray(head, dtype)),
        jnp.asarray(rng.normal(size=vocab), jnp.float32) if bias else None,
        *(targets, None if needed is None else rng.random(num_rows) < needed),
        *(rng.normal(size=(num_rows, num_targets)), rng.normal(size=num_rows)),
    )


@functools.partial(jax.jit, static_argnames=("layout", "entropy", "implementation", "temperature", "softcap"))
def run(arrays, *, layout="VD", entropy=True, **options):
    hidden, head, bias, targets, needed, to_logprob, to_entropy = arrays

    def loss(params):
        hidden, head, bias = params
        head = head if layout == "VD" else head.T
        results = fused_logprob(hidden, head, targets, bias=bias, needed=needed, with_entropy=entropy, **options)
        logprobs, entropies = results if entropy else (results, None)
        total = jnp.sum(to_logprob * logprobs) + (jnp.sum(to_entropy * entropies) if entropy else 0)
        return total, (logprobs, entropies)

    return jax.grad(loss, has_aux=True)((hidden, head, bias))


def close(got, expected, tolerance):
    atol = tolerance * max(1, np.max(np.abs(expected)))
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=atol, rtol=0)


def check(arrays, *, tolerance=FLOAT32, layout="VD", entropy=True, implementation, **options):
    if not entropy:
        arrays = (*arrays[:-1], np.zeros_like(arrays[-1]))
    grads, (logprobs, entropies) = run(arrays, layout=layout, entropy=entropy, implementation=implementation, **options)
    expected, expected_entropy, expected_grads = oracle(arrays, **options)
    close(logprobs, expected, FLOAT32)  # products of bfloat16 are exact in float32
    if entropy:
        close(entropies, expected_entropy, FLOAT32)
    for grad, expected_grad, argument in zip(grads, expected_grads, arrays, strict=False):
        assert grad.dtype == argument.dtype
        close(grad, expected_grad, tolerance)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of rows and of the vocabulary in every version, without large arrays."""
    monkeypatch.setattr(logprob_xla, "CPU_SIZES", (64, 96))
    monkeypatch.setattr(logprob_tpu, "BLOCK", 128)
    for module in (logprob_tpu, logprob_gpu, logprob_hopper):
        monkeypatch.setattr(module, "BACKWARD_SIZES", (160, 256))


@pytest.mark.parametrize("implementation", VERSIONS)
def test_several_blocks_with_everything(implementation, small_blocks):
    """Rows and a vocabulary that fill no block, some rows needed, K targets, bias, cap, temperature, head [D, V]."""
    arrays = make(301, 331, 72, num_targets=3, bias=True, needed=0.6)
    check(arrays, layout="DV", temperature=0.7, softcap=2.0, implementation=implementation)


@pytest.mark.parametrize("implementation", VERSIONS)
def test_one_target_without_entropy(implementation, small_blocks):
    check(make(133, 259, 64), entropy=False, implementation=implementation)


@pytest.mark.parametrize("implementation", VERSIONS)
@pytest.mark.parametrize(("num_rows", "vocab", "width"), [(1, 130, 256), (200, 97, 128)])
def test_bfloat16(implementation, num_rows, vocab, width):
    arrays = make(num_rows, vocab, width, needed=None if num_rows == 1 else 0.5, dtype=jnp.bfloat16)
    check(arrays, tolerance=BFLOAT16, implementation=implementation)


@pytest.mark.parametrize("implementation", VERSIONS)
@pytest.mark.parametrize("share", [0, 0.6])
def test_rows_that_are_not_needed_are_never_read(implementation, share, small_blocks):
    """NaN and ids of no token stand there. Where no row is needed at all, everything is 0."""
    arrays = make(301, 331, 72, num_targets=3, bias=True, needed=share)
    hidden, head, bias, targets, needed, *weights = arrays
    poisoned = jnp.where(needed[:, None], hidden, jnp.nan), head, bias, np.where(needed[:, None], targets, -7), needed
    options = dict(layout="DV", temperature=0.7, softcap=2.0, implementation=implementation)
    results = run((*poisoned, *weights), **options)
    for got, expected in zip(jax.tree.leaves(results), jax.tree.leaves(run(arrays, **options)), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert share or not np.any(got)


def test_hopper_with_everything(small_blocks):
    """Tiles [128, 256] that neither rows nor vocabulary fill, two shares of the vocabulary, and blocks of the gradient
    that overlap."""
    arrays = make(200, 320, 128, num_targets=3, bias=True, needed=0.8, dtype=jnp.bfloat16)
    options = dict(layout="DV", temperature=0.7, softcap=2.0, implementation="interpret_mosaic")
    check(arrays, tolerance=BFLOAT16, **options)
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    assert not gpu_callbacks.get_races().races_found


def test_hopper_with_one_target(monkeypatch):
    """Several tiles in one share of the vocabulary, which carry on each other's sums."""
    monkeypatch.setattr(logprob_hopper, "BLOCKS", 1)
    arrays = make(70, 600, 64, dtype=jnp.float16)
    check(arrays, tolerance=BFLOAT16 / 8, entropy=False, implementation="interpret_mosaic")  # three bits more


@pytest.mark.parametrize("implementation", ["xla", "interpret_tpu", "interpret_gpu"])
def test_tokens_that_are_ruled_out(implementation, small_blocks):
    """A bias of minus infinity over a whole block takes its tokens out of the distribution, without a NaN."""
    hidden, head, _, targets, *rest = make(133, 259, 64)
    bias = jnp.where(jnp.arange(259) < 131, 0, -jnp.inf)
    grads, numbers = run((hidden, head, bias, targets % 131, *rest), softcap=3.0, implementation=implementation)
    short = (hidden, head[:131], jnp.zeros(131), targets % 131, *rest)
    expected, expected_entropy, expected_grads = oracle(short, softcap=3.0)
    for got, wanted in zip((*numbers, *grads), (expected, expected_entropy, *expected_grads), strict=True):
        close(got[: len(wanted)], wanted, FLOAT32)
        assert not np.any(got[len(wanted) :])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_ids_outside_the_vocabulary(implementation):
    """NaN where nobody could look beforehand, and a ValueError where somebody can."""
    hidden, head, _, targets, *_ = make(8, 130, 64)
    targets[2], targets[3] = -1, 130
    call = functools.partial(fused_logprob, hidden, head, implementation=implementation)
    logprobs = np.asarray(jax.jit(call)(targets[:, 0]))
    assert np.array_equal(np.isnan(logprobs), np.isin(np.arange(8), (2, 3)))
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 130\), got -1 to 130"):
        call(targets[:, 0])
    assert call(targets[:, 0], needed=np.isin(np.arange(8), (2, 3), invert=True))[2] == 0


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_top_k(implementation, monkeypatch):
    monkeypatch.setattr(logprob_xla, "TOP_K_VOCAB", 96)
    hidden, head, bias, *_, weights, _ = make(133, 259, 64, num_targets=5, bias=True)

    def loss(hidden, head, bias):
        logprobs, ids = fused_top_k(hidden, head, 5, bias=bias, temperature=1.3, implementation=implementation)
        return jnp.sum(weights * logprobs), (logprobs, ids)

    grads, (logprobs, ids) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(hidden, head, bias)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T + np.asarray(bias, np.float64)
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=1)[:, :5])
    arrays = hidden, head, bias, np.asarray(ids), None, weights, np.zeros(133)
    expected, _, expected_grads = oracle(arrays, temperature=1.3)
    for got, wanted in zip((logprobs, *grads), (expected, *expected_grads), strict=True):
        close(got, wanted, FLOAT32)


PARALLEL = """
import functools
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from jaxrl_kernels.logprob import fused_logprob, fused_top_k

rng = np.random.default_rng(4)
hidden, head, weights, mix, bias = (
    rng.normal(size=shape).astype("float32") for shape in ((45, 16), (44, 16), (45, 2), 45, 44)
)
bias[-13:] = -np.inf  # the last device has nothing at all
targets, needed = rng.integers(0, 31, (45, 2)), rng.random(45) < 0.7

def call(hidden, head, bias, targets, needed, implementation, **kwargs):
    pair = fused_logprob(hidden, head, targets, bias=bias, needed=needed, with_entropy=True, softcap=3.0,
                         implementation=implementation, **kwargs)
    plain = None if implementation == "interpret_tpu" else implementation
    return *pair, *fused_top_k(hidden, head, 5, bias=bias, implementation=plain, **kwargs)

def gradients(function):
    def loss(hidden, head, bias):
        logprobs, entropy, best, ids = results = function(hidden, head, bias, targets, needed)
        return (weights * logprobs).sum() + (mix * entropy).sum() + (mix * best[:, 1]).sum(), results
    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(hidden, head, bias)

whole = gradients(functools.partial(call, implementation="reference"))
# the interpreter of Pallas does not keep count of what varies between devices
for implementation, check_vma in [(None, True), (None, False), ("reference", True), ("interpret_tpu", False)]:
    split = jax.shard_map(
        functools.partial(call, axis_name="vocabulary", implementation=implementation),
        mesh=jax.sharding.Mesh(jax.devices(), ("vocabulary",)),
        in_specs=(P(), P("vocabulary"), P("vocabulary"), P(), P()), out_specs=P(), check_vma=check_vma,
    )
    for got, expected in zip(jax.tree.leaves(gradients(split)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), err_msg=f"{implementation}")
print("equal")
"""


def test_vocabulary_split_between_devices():
    """Four devices with a part of the vocabulary each, in a process that has four: one result, whole gradients."""
    devices = "--xla_force_host_platform_device_count=4"
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}", "JAX_PLATFORMS": "cpu"}
    environment = {**os.environ, **flags, "PYTHONPATH": str(Path(logprob_xla.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", PARALLEL], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_tpu_kernels_without_races(monkeypatch):
    """Two blocks each way under the interpreter that watches every access to memory; what no one wrote is NaN."""
    monkeypatch.setattr(logprob_tpu, "BLOCK", 128)
    hidden, head, _, targets, _, to_logprob, to_entropy = arrays = make(150, 200, 64)
    watched = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    options = Options(1.0, None, 0, True)
    numbers = logprob_tpu.forward(options, hidden, head, None, targets, None, interpret=watched)
    expected, expected_entropy, (expected_grad, _) = oracle(arrays)
    close(numbers[2][:, 0] - numbers[0], expected[:, 0], FLOAT32)
    close(numbers[0] - numbers[1], expected_entropy, FLOAT32)
    to_normalizer = jnp.asarray(to_entropy - to_logprob[:, 0], jnp.float32)
    numbers = *numbers[:2], to_normalizer, jnp.asarray(-to_entropy, jnp.float32), jnp.asarray(to_logprob, jnp.float32)
    block = logprob_tpu.gradient_block(options, hidden, head, None, targets, *numbers, 0, interpret=watched)
    close(block @ head, expected_grad, FLOAT32)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(
    ("platform", "call"), [("tpu", "tpu_custom_call"), ("cuda", "__gpu$xla.gpu.triton"), ("cpu", "stablehlo.while")]
)
@pytest.mark.parametrize("layout", ["VD", "DV"])
def test_lowers_with_the_kernel_of_the_platform(platform, call, layout):
    dtype = jnp.bfloat16 if layout == "VD" else jnp.float32
    hidden, head = (
        jax.ShapeDtypeStruct((300, 96), dtype),
        jax.ShapeDtypeStruct((700, 96)[:: 1 if layout == "VD" else -1], dtype),
    )
    targets, needed = jax.ShapeDtypeStruct((300, 2), jnp.int32), jax.ShapeDtypeStruct((300,), bool)

    def loss(hidden, head, targets, needed):
        logprobs, entropy = fused_logprob(hidden, head, targets, needed=needed, with_entropy=True, softcap=30.0)
        return jnp.sum(logprobs) + jnp.sum(entropy)

    assert call in export_for(platform, jax.grad(loss, (0, 1)), hidden, head, targets, needed).mlir_module()


@pytest.mark.parametrize(("layout", "softcap"), [("VD", None), ("DV", 30.0)])
def test_lowers_the_hopper_kernels_by_name(layout, softcap):
    """At a real shape: Mosaic decides on registers and shared memory, and on how wgmma reads the head, as it lowers."""
    head = (152064, 3584)[:: 1 if layout == "VD" else -1]
    shapes = [((16384, 3584), jnp.bfloat16), (head, jnp.bfloat16), ((16384,), jnp.int32), ((152064,), jnp.float32)]

    def loss(hidden, head, targets, bias):
        options = dict(bias=bias, softcap=softcap, with_entropy=True, implementation="mosaic_gpu")
        logprobs, entropy = fused_logprob(hidden, head, targets, **options)
        return jnp.sum(logprobs) + jnp.sum(entropy)

    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    text = export_for("cuda", jax.grad(loss, (0, 1)), *arrays).mlir_module()
    assert text.count("@mosaic_gpu_v2(") == 2 and "triton" not in text


def test_all_logits_never_exist():
    """Forward and backward pass together hold a hundredth of one [N, V] array beyond arguments and results."""
    rows, width, vocab = 16384, 8, 65536
    shapes = [((rows, width), jnp.float32), ((vocab, width), jnp.float32), ((rows,), jnp.int32), ((rows,), bool)]

    def loss(hidden, head, targets, needed):
        logprobs, entropy = fused_logprob(hidden, head, targets, needed=needed, with_entropy=True)
        return jnp.sum(logprobs) + jnp.sum(entropy)

    lowered = jax.jit(jax.grad(loss, (0, 1))).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < rows * vocab * 4 / 100


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "h100"])
def test_compiles_for_accelerators(chip):
    """8192 rows of 3584 with a vocabulary of 152064: at most a twentieth of what the plain head holds, which is
    one float32 array of logits and a little, and two of them on a GPU."""
    pytest.importorskip(compiler_of(chip))
    implementation, call = ("mosaic_gpu", "mosaic_gpu") if chip == "h100" else ("pallas_tpu", "tpu_custom_call")
    sharding = jax.sharding.SingleDeviceSharding(device_of(chip))
    shapes = [((8192, 3584), jnp.bfloat16), ((152064, 3584), jnp.bfloat16), ((8192,), jnp.int32)]

    def loss(hidden, head, targets):
        return jnp.sum(fused_logprob(hidden, head, targets, implementation=implementation))

    lowered = jax.jit(jax.grad(loss, (0, 1))).lower(*(jax.ShapeDtypeStruct(*s, sharding=sharding) for s in shapes))
    compiled = lowered.compile()
    assert call in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < (2 if chip == "h100" else 1) * 8192 * 152064 * 4 / 20


def test_empty():
    assert fused_logprob(jnp.zeros((0, 3)), jnp.zeros((5, 3)), jnp.zeros(0, int)).shape == (0,)
    assert [x.shape for x in fused_top_k(jnp.zeros((0, 3)), jnp.zeros((5, 3)), 2)] == [(0, 2), (0, 2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"head": (5, 4)},
            r"expected hidden \[N, D\] and head \[V, D\] or \[D, V\], got hidden \[2, 3\], head \[5, 4\]",
        ),
        ({"head": (3, 3)}, 'is square: say with layout="VD" or "DV"'),
        ({"layout": "DV"}, "does not fit hidden"),
        ({"layout": "vd"}, 'expected "VD", "DV" or None'),
        ({"targets": np.zeros(3, int)}, r"targets must be integers \[2\] or \[2, K\]"),
        ({"targets": np.zeros(2)}, "got float64"),
        ({"targets": np.array([0, 5])}, r"must lie in \[0, 5\), got 0 to 5; mask others with needed"),
        ({"bias": np.zeros(3)}, "bias must have one entry for each of the 5"),
        ({"needed": np.ones(2)}, r"needed must be boolean \[2\], got float64 \[2\]"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0; for the most probable token take fused_top_k"),
        ({"softcap": -1.0}, "softcap must be positive, got -1.0"),
        ({"implementation": "magic"}, 'implementation must be None or one of "xla"'),
        ({"implementation": "pallas_tpu"}, "runs on tpu only"),
        ({"implementation": "mosaic_gpu"}, "cannot serve this call: needs hidden and head both in bfloat16 or"),
    ],
)
def test_says_what_does_not_fit(change, message):
    arguments = {"hidden": np.zeros((2, 3), np.float32), "head": (5, 3), "targets": np.zeros(2, int), **change}
    arguments["head"] = np.zeros(arguments["head"], np.float32)
    with pytest.raises(ValueError, match=message):
        fused_logprob(**arguments)


def test_top_k_says_what_does_not_fit():
    with pytest.raises(ValueError, match="k=6 must be from 1 to the 5 entries"):
        fused_top_k(jnp.zeros((2, 3)), jnp.zeros((5, 3)), 6)
