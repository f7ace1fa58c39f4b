"""What `jaxrl_kernels.bench` measures with: alternatives that take turns, and the ceilings of the machine."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FORWARD, BOTH, BACKWARD = "forward", "forward + backward", "backward, by difference"
COPY = "a copy that moves as many bytes"
MIN_ROUNDS = 3
# On an accelerator, calls are queued until they take this long together, so that the host's part does not show.
QUEUE_SECONDS, MAX_QUEUED = 5e-3, 50


class Work(NamedTuple):
    """The least that a pass has to do. 0 FLOPs: elementwise arithmetic, which nobody counts."""

    flops: float
    bytes: float


class Call(NamedTuple):
    """A compiled alternative: `start` queues it on its inputs, `wait` returns when the result is there."""

    start: Callable[[], Any]
    wait: Callable[[Any], Any]
    temporary_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Alternative:
    """One way to do a case: what makes it ready, for each pass. `result` gives its output the layout of ours."""

    name: str
    passes: dict[str, Callable[[], Call]]
    result: Callable[[Any], Any] = lambda output: output


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel at one shape. The first alternative is ours as it is dispatched; `not_run` holds reasons by name.
    Results of the pass `compared` must equal those of the first; None where they are random."""

    kernel: str
    shape: str
    work: dict[str, Work]
    alternatives: list[Alternative]
    not_run: dict[str, str]
    compared: str | None = FORWARD


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the result: medians in seconds, per second, and as shares of the ceilings."""

    implementation: str
    passes: str
    seconds: float
    flops_per_second: float | None
    share_of_matmul: float | None
    bytes_per_second: float
    share_of_copy: float
    temporary_bytes: int | None
    difference: float | None


def jax_call(function: Callable[..., Any], arrays: Sequence[Any]) -> Call:
    """Compiles a function for its arrays."""
    compiled = jax.jit(function).lower(*arrays).compile()
    memory = compiled.memory_analysis()
    temporary = None if memory is None else int(memory.temp_size_in_bytes)
    return Call(lambda: compiled(*arrays), jax.block_until_ready, temporary)


def alternative(
    name: str,
    function: Callable[..., Any],
    arrays: Sequence[Any],
    cotangent: Any = None,
    *,
    differentiated: int = 0,
    passes: str = FORWARD,
    result: Callable[[Any], Any] = lambda output: output,
) -> Alternative:
    """A function of JAX arrays, and its gradients in the first `differentiated` of them. `passes`: what the function
    itself computes."""

    def step(*inputs: Any) -> Any:
        *inputs_, cotangent = inputs
        first, rest = inputs_[:differentiated], inputs_[differentiated:]
        output, pull = jax.vjp(lambda *first: function(*first, *rest), *first)
        return output, pull(cotangent)

    calls = {passes: lambda: jax_call(function, arrays)}
    if differentiated:
        calls[BOTH] = lambda: jax_call(step, (*arrays, cotangent))
    return Alternative(name, calls, result)


def size_of(*arrays: Any) -> int:
    """Bytes of all leaves."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def least_work(
    flops: tuple[float, float], inputs: Sequence[Any], outputs: Sequence[Any], gradients: Sequence[Any] = ()
) -> dict[str, Work]:
    """Work where each array moves once in each pass: inputs and outputs forward; backward inputs and cotangents, which
    are as large as the outputs, are read and the gradients written. `flops`: forward, and both."""
    forward = size_of(inputs, outputs)
    return {FORWARD: Work(flops[0], forward), BOTH: Work(flops[1], 2 * forward + size_of(gradients))}


def copy_alternative(num_bytes: float, passes: str = FORWARD) -> Alternative:
    """Reads and writes as many bytes as a pass moves: what can be had at this size."""
    array = jnp.zeros(max(1, int(num_bytes) // 8), jnp.float32)
    return alternative(COPY, jnp.negative, (array,), passes=passes)


def measure_ceilings(small: bool, dtype: Any) -> dict[str, float]:
    """FLOP/s of a square matmul in `dtype` and bytes/s (read and written) of a pass over a large array."""
    on_cpu = jax.default_backend() == "cpu"
    width = 256 if small else 2048 if on_cpu else 8192
    matrix = jnp.ones((width, width), dtype)
    product = jax_call(jnp.matmul, (matrix, matrix))
    # The array is given up for the result: a CPU would else spend the time on mapping new pages.
    negate = jax.jit(jnp.negative, donate_argnums=0)
    array = [jnp.zeros(2**20 if small else 2**25 if on_cpu else 2**28, jnp.float32)]
    num_bytes = 2 * size_of(array)

    def pass_over() -> Any:
        array[0] = negate(array[0])
        return array[0]

    times = _take_turns([product, Call(pass_over, jax.block_until_ready, None)], 10, 10.0)
    matmul, copy = (statistics.median(column) for column in times)
    return {"matmul_flops_per_second": 2 * width**3 / matmul, "copy_bytes_per_second": num_bytes / copy}


def measure(case: Case, ceilings: dict[str, float], repeats: int, budget: float) -> tuple[list[Row], dict[str, str]]:
    """Rows of a case, and why each of the other alternatives gave none.

    Everything is compiled and run once first. Then the calls take turns, one of each in a round, so that drift and
    disturbances hit all alike; the rounds end after `repeats`, or after `budget` seconds if three are done.
    """
    problems = dict(case.not_run)
    calls: list[tuple[Alternative, str, Call]] = []
    differences: dict[str, float] = {}
    expected: Any = None
    for entry in case.alternatives:
        for passes, build in entry.passes.items():
            try:
                call = build()
                output = call.wait(call.start())
                if passes == case.compared and entry.name != COPY:
                    leaf = np.asarray(jax.tree.leaves(entry.result(output))[0], np.float32)
                    expected = leaf if expected is None else expected
                    differences[entry.name] = _difference(leaf, expected)
            except Exception as error:  # whatever another library raises, it must not end the run
                problems[f"{entry.name}, {passes}"] = f"failed: {first_line(error)}"
            else:
                calls.append((entry, passes, call))
            output = None
    times = _take_turns([call for _, _, call in calls], repeats, budget)
    rows: list[Row] = []
    for entry, group in _grouped(calls, times):
        seconds = {passes: value for passes, (_, value) in group.items()}
        if BACKWARD in case.work and len(seconds) == 2:
            if seconds[BOTH] > seconds[FORWARD]:
                seconds[BACKWARD] = seconds[BOTH] - seconds[FORWARD]
            else:
                problems[f"{entry.name}, {BACKWARD}"] = "disturbed: forward alone took no less time than both passes"
        for passes, value in seconds.items():
            work = case.work[passes]
            rate = work.flops / value if work.flops and entry.name != COPY else None
            rows.append(
                Row(
                    implementation=entry.name,
                    passes=passes,
                    seconds=value,
                    flops_per_second=rate,
                    share_of_matmul=rate and rate / ceilings["matmul_flops_per_second"],
                    bytes_per_second=work.bytes / value,
                    share_of_copy=work.bytes / value / ceilings["copy_bytes_per_second"],
                    temporary_bytes=group[passes][0].temporary_bytes if passes in group else None,
                    difference=differences.get(entry.name) if passes == case.compared else None,
                )
            )
    return rows, problems


def _grouped(calls: list, times: list[list[float]]) -> Iterator[tuple[Alternative, dict[str, tuple[Call, float]]]]:
    """Calls and their median times by pass, for each alternative."""
    groups: dict[str, tuple[Alternative, dict]] = {}
    for (entry, passes, call), column in zip(calls, times, strict=True):
        groups.setdefault(entry.name, (entry, {}))[1][passes] = call, statistics.median(column)
    yield from groups.values()


def _take_turns(calls: Sequence[Call], repeats: int, budget: float) -> list[list[float]]:
    """Seconds per call, for each call a list."""
    queued = [1 if jax.default_backend() == "cpu" else _number_to_queue(call) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    begun = time.perf_counter()
    for round_ in range(repeats):
        if round_ >= MIN_ROUNDS and time.perf_counter() - begun > budget:
            break
        for call, number, column in zip(calls, queued, times, strict=True):
            start = time.perf_counter()
            for _ in range(number):
                output = call.start()
            call.wait(output)
            column.append((time.perf_counter() - start) / number)
            output = None
    return times


def _number_to_queue(call: Call) -> int:
    start = time.perf_counter()
    call.wait(call.start())
    return min(MAX_QUEUED, math.ceil(QUEUE_SECONDS / (time.perf_counter() - start)))


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    """Largest distance over the largest number."""
    if one.shape != other.shape:
        raise ValueError(f"the result is {one.shape}, ours {other.shape}")
    return float(np.max(np.abs(one - other)) / max(np.max(np.abs(other)), 1e-30))


def first_line(error: BaseException) -> str:
    """Type and first line of an exception."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
