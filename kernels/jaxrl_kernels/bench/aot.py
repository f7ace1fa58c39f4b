"""`jaxrl_kernels.bench --compile`: kernels at real shapes, compiled for TPUs or an H100 without either."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxrl_kernels.attention import flash_attention
from jaxrl_kernels.bench.timing import first_line
from jaxrl_kernels.decode_attention import decode_attention
from jaxrl_kernels.logprob import fused_logprob
from jaxrl_kernels.policy_loss import fused_policy_loss
from jaxrl_kernels.sampling import sample_tokens
from jaxrl_kernels.scan import discounted_scan

Program = tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]
NAIVE, FAILED = "naive XLA", "failed"
HOPPER = "h100"
# What XLA asks a GPU about, of an H100 (from NVIDIA's data sheet and the programming guide's table of sm_90).
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def _sum_gradient(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Gradient of the sum of squares, so that the cotangents are no constants."""
    return jax.grad(lambda *arrays: jnp.sum(function(*arrays).astype(jnp.float32) ** 2), tuple(range(count)))


def programs(kernel: str, implementation: str | None = None) -> dict[str, Program]:
    """The programs of one kernel by their description."""
    options: dict[str, Any] = {"implementation": implementation}

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    arrays: tuple[jax.ShapeDtypeStruct, ...]
    if kernel == "fused_logprob":
        rows, width, vocab = 8192, 3584, 152064
        arrays = array(rows, width), array(vocab, width), array(rows, dtype=jnp.int32)

        def naive(hidden: Any, head: Any, targets: Any) -> Any:
            logits = jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=jnp.float32)
            return jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), targets[:, None], axis=1)

        shape = f"N {rows}, D {width}, V {vocab}, bf16, forward + backward"
        both = {shape: (_sum_gradient(functools.partial(fused_logprob, **options), 2), arrays)}
        return both | {f"{shape}, {NAIVE}": (_sum_gradient(naive, 2), arrays)}
    if kernel == "flash_attention":
        q, k = array(1, 8192, 32, 128), array(1, 8192, 8, 128)

        def attend(q: Any, k: Any, v: Any, ids: Any) -> Any:
            return flash_attention(q, k, v, segment_ids=ids, **options)

        arrays = q, k, k, array(1, 8192, dtype=jnp.int32)
        return {"[1, 8192, 32, 128], KV 8, bf16, packed, forward + backward": (_sum_gradient(attend, 3), arrays)}
    if kernel == "decode_attention":
        found: dict[str, Program] = {}
        for tokens, page in ((1, 128), (8, 128), (1, 256), (8, 256)):
            pages = 64 * 8192 // page
            keys, values = array(pages, 8, 128, page), array(pages, 8, page, 128)
            numbers = array(64, dtype=jnp.int32), array(64, 8192 // page, dtype=jnp.int32)
            shape = f"S 64, T {tokens}, H 32, KV 8, D 128, 8192 keys in pages of {page}, bf16"
            found[shape] = (
                functools.partial(decode_attention, **options),
                (array(64, tokens, 32, 128), keys, values, *numbers),
            )
        return found
    if kernel == "sample_tokens":
        logits, key = array(64, 152064, dtype=jnp.float32), jax.eval_shape(lambda: jax.random.key(0))

        def draw(logits: Any, key: Any) -> Any:
            return sample_tokens(logits, key, temperature=0.7, top_k=50, top_p=0.9, min_p=0.05, **options)

        return {
            "[64, 152064] float32": (functools.partial(sample_tokens, **options), (logits, key)),
            "[64, 152064] float32, top-k, top-p and min-p": (draw, (logits, key)),
        }
    batch, mask = array(64, 8192, dtype=jnp.float32), array(64, 8192, dtype=jnp.bool_)
    if kernel == "discounted_scan":

        def scan(values: Any, discount: Any, mask: Any) -> Any:
            return discounted_scan(values, discount, mask=mask, **options)

        return {"[64, 8192] float32, forward + backward": (_sum_gradient(scan, 2), (batch, batch, mask))}

    def loss(logprobs: Any, old: Any, advantages: Any, mask: Any) -> Any:
        return fused_policy_loss(logprobs, old, advantages, mask, dual_clip=3.0, **options)[0]

    return {"[64, 8192] float32, forward + backward": (jax.grad(loss), (batch, batch, batch, mask))}


def compiler_of(chip: str) -> str:
    """The package that compiles for a chip."""
    return "jax_cuda12_plugin" if chip == HOPPER else "libtpu"


def device_of(chip: str) -> Any:
    """A chip to compile for that need not be there: a TPU topology such as "v5e:2x2", or "h100"."""
    if chip != HOPPER:
        return topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
    options = {"target_config": H100, "topology": "1x1x1"}
    return topologies.get_topology_desc(platform="cuda", topology_name=chip, **options).devices[0]


def compiled(program: Program, chip: str) -> str:
    """Temporary memory, or why there is no such program."""
    function, arrays = program
    try:
        sharding = jax.sharding.SingleDeviceSharding(device_of(chip))
        placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arrays]
        memory: Any = jax.jit(function).lower(*placed).compile().memory_analysis()
    except Exception as error:  # a compiler's refusal is a result, whatever its type
        return f"{FAILED}: {first_line(error)}"
    return f"{memory.temp_size_in_bytes / 1e6:,.1f} MB"


def lowered_for_cuda(program: Program) -> str:
    """How many Triton kernels the exported program calls, or why it does not lower."""
    function, arrays = program
    checks = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    try:
        exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(*arrays)
    except Exception as error:
        return f"{FAILED}: {first_line(error)}"
    return f"{exported.mlir_module().count('custom_call @__gpu$xla.gpu.triton')} Triton calls"


def main(kernels: Sequence[str], chips: Sequence[str], print_table: Callable[..., None]) -> int:
    """Prints a table per kernel; the exit code is 1 if a compiler is missing or a program failed."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no TPU is there to be asked about
    jax.config.update("jax_platforms", "cpu")
    missing = {package for package in map(compiler_of, chips) if importlib.util.find_spec(package) is None}
    places = {"libtpu": ("TPUs", "libtpu"), "jax_cuda12_plugin": ("an H100", '"jax[cuda12]"')}
    for package in missing:
        place, name = places[package]
        print(
            f"{package} is not installed, so nothing is compiled for {place}: pip install {name}, then run this again"
        )
    chips = [chip for chip in chips if compiler_of(chip) not in missing]
    print(f"jax {jax.__version__}; temporary memory of the program compiled for one chip")
    failed = False
    for kernel in kernels:
        lines, problems = [], []
        columns = (*chips, "cuda (lowered)")
        hopper = programs(kernel, "mosaic_gpu")
        for shape, program in programs(kernel).items():
            entries = [compiled(hopper[shape] if chip == HOPPER else program, chip) for chip in chips]
            entries.append("" if shape.endswith(NAIVE) else lowered_for_cuda(program))
            for place, entry in zip(columns, entries, strict=True):
                if entry.startswith(FAILED):
                    problems.append(f"- {shape}, {place}: {entry}")
                    failed = failed or not shape.endswith(NAIVE)
            lines.append([shape, *(FAILED if entry.startswith(FAILED) else entry for entry in entries)])
        print_table(f"{kernel}, ahead of time", ("program", *columns), lines)
        if problems:
            print("", *problems, sep="\n")
    return 1 if missing or failed else 0
