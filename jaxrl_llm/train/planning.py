"""What a step costs on TPUs that are not there: memory, work and time of the real programs, compiled ahead of time.

    devices = topology_devices("v5e:8x8")
    report = plan(rollout_programs(model, step, init, rows=1024, length=4096, num_slots=512), devices, {"fsdp": 64})

Compiling for TPUs needs the package libtpu and no TPU. Where each number comes from:

- memory of weights, optimizer, reference, cache and batch: shapes and shardings of the arguments;
- memory of activations, which is all else (gradients, what a layer keeps, buffers): what the compiler says of the
  whole program less the arguments, also where that is too much for it;
- FLOPs and bytes: products and kernels of the traced program, loops as often as they run (`count_work`);
- time of exchanges: their bytes in the compiled program, loops as often as they run, under way while the rest runs;
- time of the rest: the sum over products and kernels of the longer of what their FLOPs and bytes take, which is the
  least, and of what copies to other layouts read and write; or, where it compiles to the end (`thorough`), the cycles
  that the compiler estimates for each instruction, loops as often as they run, and our kernels as before
  (`read_schedule`);
- model FLOP utilization: `decoder_flops` of the tokens, by that time and the chip's peak.

The compiler's `optimal_seconds` is not used: it is the first of those sums, with a loop's body counted once. Without
`thorough` the compiler optimizes little, which takes 6% more memory in a feed-forward network and its gradient, and is
not waited for when it writes machine code (see `tpu_compiler`): seconds instead of minutes.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxrl_kernels.mesh import mesh_axes
from jaxrl_llm.models.decoder import Model
from jaxrl_llm.models.decoder_config import DecoderConfig
from jaxrl_llm.sampling.slots import Limits, Prompts, decode, finish, start
from jaxrl_llm.train.program_costs import Machine, count_work, read_schedule
from jaxrl_llm.train.sharding import batch_shardings, make_mesh, state_shardings
from jaxrl_llm.train.tpu_compiler import compile_ahead
from jaxrl_llm.types import Batch, Decoding, Params, TrainState

QUICK: dict[str, Any] = {"optimization_level": 9}  # the number of jax's O0
INSTALL = "pip install libtpu==0.0.52"
GIB = 2**30


class Chip(NamedTuple):
    """What the makers say of one chip: HBM (bytes), bfloat16 peak (FLOP/s), HBM and interconnect (bytes/s, the latter
    in one direction over all links), and the clock (1/s) that gives that peak."""

    memory: float
    flops: float
    bandwidth: float
    interconnect: float
    clock: float


# From docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "system architecture"; clocks from peak / (multipliers * 2).
CHIPS = {
    "v4": Chip(16 * GIB, 137.5e12, 614e9, 150e9, 275e12 / (8 * 128**2 * 2)),  # a half: it shows as two devices
    "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9, 197e12 / (4 * 128**2 * 2)),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9, 459e12 / (8 * 128**2 * 2)),
    "v6e": Chip(32 * GIB, 918e12, 1640e9, 400e9, 918e12 / (4 * 256**2 * 2)),
}
EXAMPLES = ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16", "v5p:2x2x1", "v5p:4x4x4", "v5p:8x8x16", "v6e:2x2", "v6e:8x8")
# Which kind of memory an argument is, by the beginning of its path.
KINDS = (
    (r"state\.params|params", "weights"),
    (r"state\.opt_state", "optimizer"),
    (r"state\.ref_params", "reference"),
    (r"slots\.cache", "cache"),
    (r"", "batch"),
)


STEP = ("flops", "bytes", "step_seconds", "mfu", "limit", "tokens_per_second")  # of a report, those of the train step


class Program(NamedTuple):
    """A function with the shapes of its arguments by name; arguments called `state` and `params` lie as parameters do,
    the others by rows."""

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    tokens: int  # that a call works on: of the batch, or one for each slot
    model_flops: float  # of these tokens, nothing computed twice
    donated: tuple[str, ...] = ()


def topology_devices(name: str) -> Sequence[Any]:
    """The devices of a topology such as "v5e:8x8", none of which need be there.

    Raises:
      ValueError: libtpu is missing or does not know the name.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"planning for TPUs needs the package libtpu, which is not installed: {INSTALL}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no TPU is there to be asked about
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor to be kept from others
    from jax.experimental import topologies

    chip_of(name)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # of a type that no release of jax promises
        reason = str(error).split("\n")[0]
        raise ValueError(f"libtpu knows no topology {name!r} ({reason}); take one like {', '.join(EXAMPLES)}") from None


def chip_of(topology: str) -> Chip:
    """The chip that a topology's name begins with.

    Raises:
      ValueError: no facts about such a chip are here.
    """
    if (kind := topology.partition(":")[0]) not in CHIPS:
        raise ValueError(f"unknown chip {kind!r} in topology {topology!r}; take one like {', '.join(EXAMPLES)}")
    return CHIPS[kind]


def decoder_flops(config: DecoderConfig, tokens: float, context: float, *, passes: int = 1) -> float:
    """Floating point operations of a model on tokens that see `context` tokens each on average: two for each parameter
    that works on a token and four for each number of a query and a key it sees. `passes` is 3 with the gradient.
    """
    head_dim: int = config.head_dim  # type: ignore[assignment]  # set by the config
    attention = config.width * head_dim * 2 * (config.num_heads + config.num_kv_heads)
    inner = config.experts_per_token * (config.expert_width or config.ffn_width)
    routed = config.width * (config.num_experts + 3 * inner)
    sparse = sum(map(config.has_experts, range(config.num_layers)))
    dense = config.num_layers - sparse
    parameters = config.num_layers * attention + sparse * routed + dense * 3 * config.width * config.ffn_width
    seen = config.num_layers * 4 * config.num_heads * head_dim * context
    return passes * tokens * (2 * (parameters + config.vocab_size * config.width) + seen)


def rollout_programs(
    model: Model,
    step: Callable[[TrainState, Batch], Any],
    init: Callable[[Params, Any], TrainState],
    *,
    rows: int,
    length: int,
    num_slots: int,
    max_turns: int = 1,
    max_turn_tokens: int | None = None,
    window: int = 1,
    decoding: Decoding = Decoding(),
    reference: bool = False,
    critic: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> dict[str, Program]:
    """The train step on a `Batch` of `rows` sequences of `length` tokens, and a step of `sampling.rollout` with its
    cache. `init(params, seed)` gives the state, from weights of `dtype`; `reference` and `critic` say what
    else is in the batch. Scores under the reference, made once a batch, are not in the step.
    """
    limits = Limits(length, max_turns, max_turn_tokens or length)
    params = _shapes(lambda: jax.tree.map(lambda x: x.astype(dtype), model.init(jax.random.key(0))))
    state = _shapes(init, params, jax.ShapeDtypeStruct((), jnp.int32))

    def sampler(count: int) -> Any:
        number = jnp.zeros(count, jnp.int32)
        prompts = Prompts(number[:, None], number, None, model.init_cache(count, 1, jnp.dtype(dtype)))
        return prompts, start(model, prompts, limits, 1, min(count, num_slots))

    def batch() -> Batch:
        prompts, (written, _) = sampler(rows)
        numbers = jnp.zeros((rows, length), jnp.float32)
        sampled = finish(written, prompts, 1, decoding)
        batch = Batch(sampled, sampled.mask, numbers, numbers, numbers if reference else None)
        return dataclasses.replace(batch, returns=numbers, old_values=numbers) if critic else batch

    written, slots = _shapes(lambda: sampler(num_slots)[1])
    keys = _shapes(lambda: jax.random.split(jax.random.key(0), num_slots))

    def decode_step(params: Params, row_keys: Any, written: Any, slots: Any) -> Any:
        return decode(model, params, row_keys, decoding, (), limits, window, written, slots)

    return {
        "train": Program(
            step,
            {"state": state, "batch": _shapes(batch)},
            rows * length,
            decoder_flops(model.config, rows * length, length / 2, passes=3),
            ("state",),
        ),
        "decode": Program(
            decode_step,
            {"params": params, "row_keys": keys, "written": written, "slots": slots},
            num_slots,
            decoder_flops(model.config, num_slots, length),
            ("written", "slots"),
        ),
    }


def _shapes(function: Callable[..., Any], *arguments: Any) -> Any:
    return jax.eval_shape(function, *arguments)


def choose_mesh(config: DecoderConfig, chip: Chip, chips: int, *, length: int, rows: int) -> dict[str, int]:
    """Axes for so many chips, with a row of a micro-batch, or a part of one, on each: 8 along `expert` where there are
    experts, `fsdp` up to 64, as each layer's weights travel around it, `data` for the rest, and as few along
    `sequence` as leave an estimate of memory below 7/8 of the chip's, or where none does, those with the lowest.

    Raises:
      ValueError: the `rows` of a micro-batch do not divide among the chips that have whole rows.
    """
    head_dim: int = config.head_dim  # type: ignore[assignment]  # set by the config
    parameters = _count_parameters(config)
    per_token = 2 * config.num_layers * config.width + 2 * 6 * (config.ffn_width + config.num_heads * head_dim)
    candidates: list[tuple[float, dict[str, int]]] = []
    for sequence in (2**i for i in range(chips.bit_length())):
        rest = chips // sequence
        if length % sequence or chips % sequence or rows % rest:
            continue
        expert = math.gcd(8, math.gcd(config.num_experts, rest)) if config.num_experts else 1
        fsdp = math.gcd(64, math.gcd(config.width, rest // expert))
        sizes = {"data": rest // expert // fsdp, "fsdp": fsdp, "sequence": sequence, "expert": expert}
        # bfloat16 weights and their reference, float32 moments, gradients in both; a matrix of the vocabulary gathered
        held = parameters * (2 + 2 + 8 + 4 + 2) / (fsdp * expert) + 8 * config.vocab_size * config.width
        candidates.append((held + per_token * length / sequence, sizes))
    fitting = [sizes for size, sizes in candidates if size < 7 / 8 * chip.memory]
    if not candidates:
        raise ValueError(
            f"a micro-batch of {rows} rows does not divide among {chips} chips: take other micro_batches, or give the "
            "mesh's axes yourself"
        )
    chosen = fitting[0] if fitting else min(candidates, key=lambda candidate: candidate[0])[1]
    return {axis: size for axis, size in chosen.items() if size > 1} or {"data": 1}


def choose_slots(config: DecoderConfig, chip: Chip, mesh: Mapping[str, int], *, length: int, most: int) -> int:
    """`most` slots of a sampler, or a half, a quarter and so on, of which the bfloat16 cache stays, beside the state
    and gathered matrices of the vocabulary, below 7/8 of a chip's memory; at least one where rows are."""
    head_dim: int = config.head_dim  # type: ignore[assignment]  # set by the config
    where = math.prod(mesh.get(axis, 1) for axis in ("data", "fsdp", "expert"))
    divided = math.prod(mesh.get(axis, 1) for axis in ("fsdp", "expert", "tensor"))
    heads = config.num_kv_heads / math.gcd(config.num_kv_heads, mesh.get("tensor", 1))  # on a chip
    row = 2 * 2 * config.num_layers * heads * head_dim * length
    beside = _count_parameters(config) * (2 + 2 + 8) / divided + 2 * 2 * config.vocab_size * config.width
    while most > where and most / where * row + beside > 7 / 8 * chip.memory:
        most //= 2
    return most


def _count_parameters(config: DecoderConfig) -> float:
    return decoder_flops(dataclasses.replace(config, experts_per_token=max(config.num_experts, 1)), 1, 0) / 2


def plan(
    programs: Mapping[str, Program], topology: str, sizes: Mapping[str, int], *, thorough: bool = False
) -> dict[str, Any]:
    """The report on programs for a topology and a mesh, as JSON can hold it.

    `memory_per_chip` has bytes by kind, `total` (the larger of the train step's and of the sampler's, beside which the
    state stays) and `available`. `flops` and `bytes` are those of a chip in one train step, `mfu` its share of the peak
    that the model itself needs. The same of each program is in `programs`. Without `thorough`, see `compile_ahead`.

    Raises:
      ValueError: see `topology_devices`, `make_mesh`, `state_shardings`.
    """
    chip, mesh = chip_of(topology), make_mesh(sizes, topology_devices(topology))
    reports = {name: _compile(program, chip, mesh, thorough) for name, program in programs.items()}
    train, decode = reports["train"]["memory_per_chip"], reports["decode"]["memory_per_chip"]
    kinds = ("weights", "optimizer", "reference", "cache")
    memory = {kind: max(train.get(kind, 0), decode.get(kind, 0)) for kind in kinds}
    kept = sum(train.get(kind, 0) for kind in ("weights", "optimizer", "reference"))
    sampling = kept - decode["weights"] + sum(decode.values())
    memory |= {"batch": train["batch"], "activations": train["activations"]}
    memory |= {"sampler_activations": decode["activations"], "total": max(sum(train.values()), sampling)}
    memory["available"] = chip.memory
    report = {
        "topology": topology,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "fits": all(found["compiles"] for found in reports.values()) and memory["total"] <= chip.memory,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(programs["decode"].arguments["params"])),
        "memory_per_chip": memory,
        **{key: value for key, value in reports["train"].items() if key in STEP},
        "programs": reports,
    }
    return report | {"advice": advice(report, sampling)}


def _compile(program: Program, chip: Chip, mesh: Any, thorough: bool) -> dict[str, Any]:
    machine = Machine(chip.flops, chip.bandwidth, mesh.size / mesh.shape.get("tensor", 1), mesh.shape.get("expert", 1))
    with jax.set_mesh(mesh):
        placed = {name: _place(name, shapes, mesh) for name, shapes in program.arguments.items()}
        memory = dict.fromkeys(["batch"], 0.0)
        for path, leaf in jax.tree_util.tree_leaves_with_path(placed):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            kind = next(kind for start, kind in KINDS if re.match(start, name))
            item = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) else leaf.dtype.itemsize
            memory[kind] = memory.get(kind, 0.0) + math.prod(leaf.sharding.shard_shape(leaf.shape)) * item
        work = count_work(program.function, program.arguments, machine)
        started = time.process_time()
        lowered = jax.jit(program.function, donate_argnames=program.donated).lower(**placed)
    compiled = compile_ahead(lowered, machine_code=thorough, options={} if thorough else QUICK)
    memory["activations"] = max(compiled.total_bytes - sum(memory.values()), 0.0)
    flops, moved, least = (value / mesh.size for value in work)
    found = read_schedule(compiled.text)
    seconds = {"compute": flops / chip.flops, "memory bandwidth": moved / chip.bandwidth}
    seconds["interconnect"] = found.exchanged_bytes / chip.interconnect
    if found.cycles:
        least = found.cycles / chip.clock + max(found.kernel_flops / chip.flops, found.kernel_bytes / chip.bandwidth)
    else:
        least += found.copied_bytes / chip.bandwidth
    estimate = max(least, *seconds.values())
    return {
        "compiles": not compiled.refused,
        "time_from": "the compiler's schedule" if found.cycles else "FLOPs and bytes",
        "memory_per_chip": memory,
        "flops": flops,
        "bytes": moved,
        "least_seconds": seconds,
        "step_seconds": estimate,
        "limit": max(seconds, key=lambda name: seconds[name]),
        "mfu": program.model_flops / mesh.size / chip.flops / estimate,
        "tokens_per_second": program.tokens / estimate,
        "compile_cpu_seconds": time.process_time() - started,
    }


def _place(name: str, shapes: Any, mesh: Any) -> Any:
    """Shapes with the shardings that a run has: parameters as in the table, rows along "batch", heads of a cache along
    "heads" where they divide."""
    if name in ("state", "params"):
        shardings = state_shardings(shapes, mesh)
    elif name == "batch":
        shardings = batch_shardings(shapes, mesh)
    else:

        def one(leaf: Any) -> NamedSharding:
            axes: list[Any] = [mesh_axes("batch", leaf.shape[0], mesh=mesh, strict=False) if leaf.ndim else None]
            if leaf.ndim >= 4:  # [S, (layers,) KV, ., .]
                axes += [None] * (leaf.ndim - 4) + [mesh_axes("heads", leaf.shape[-3], mesh=mesh, strict=False)]
            return NamedSharding(mesh, PartitionSpec(*axes[: leaf.ndim]))

        shardings = jax.tree.map(one, shapes)
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)


def advice(report: Mapping[str, Any], sampling: float = 0.0) -> list[str]:
    """What to change where memory does not suffice, the largest saving first; what limits the step, where it does."""
    memory, mesh, said = report["memory_per_chip"], report["mesh"], []
    if report["fits"]:
        said.append(f"fits; the train step is limited by {report['limit']}")
        if report["limit"] == "interconnect" and report["programs"]["train"]["compiles"]:
            said.append("exchanges take longest: fewer micro-batches or a smaller fsdp axis gather weights less often")
        return said
    whole, available = memory["total"], memory["available"]
    said.append(f"does not fit: {whole / GIB:.1f} GiB of {available / GIB:.1f} GiB a chip")
    fixed = memory["weights"] + memory["optimizer"] + memory["reference"]
    if fixed > available / 2:
        said.append(
            f"weights, optimizer and reference take {fixed / GIB:.1f} GiB: raise fsdp (now {mesh.get('fsdp', 1)}) or "
            "tensor, or take more chips, or train with LoRA"
        )
    if memory["activations"] > available / 4:
        said.append(
            f"activations take {memory['activations'] / GIB:.1f} GiB: more micro_batches, remat='full', or a larger "
            f"sequence axis (now {mesh.get('sequence', 1)})"
        )
    if sampling > available:
        said.append(
            f"the sampler needs {sampling / GIB:.1f} GiB, {memory['cache'] / GIB:.1f} GiB of them for the cache: lower "
            "num_slots, or raise tensor, which divides its heads"
        )
    return said
