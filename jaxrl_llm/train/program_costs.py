"""What a program costs: products counted in what was traced, time and exchanges read off what was compiled.

A compiler's `cost_analysis` counts the body of a loop once, however often it runs, and a Pallas call by what its
`cost_estimate` says. Steps are loops over micro-batches, layers and blocks of the vocabulary, so both counts here know
how often a body runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
EXCHANGE = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
NAME = r"%?([\w.\-]+)"


class Work(NamedTuple):
    """Of all devices together. `bytes` are those of the operands and results of products and kernels: what is
    elementwise is taken as part of its neighbors. `seconds` are the sum, over products and kernels, of the longer of
    what their FLOPs and their bytes take."""

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Any) -> Work:
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, number: float) -> Work:
        """As often as `number`."""
        return Work(*(number * value for value in self))


class Machine(NamedTuple):
    """What work is counted for: a chip's speed (FLOP/s, bytes/s), how many of them hold each matrix of weights whole
    when it is used, among how many experts are divided, each of which has its share of the rows that it is handed, and
    the platform by which a program chooses its kernels."""

    flops: float
    bandwidth: float
    copies: float = 1.0
    experts: float = 1.0
    platform: str = "tpu"

    def work(self, flops: float, moved: float) -> Work:
        """Of one product or kernel."""
        return Work(flops, moved, max(flops / self.flops, moved / self.bandwidth))


def count_work(function: Callable[..., Any], arguments: Mapping[str, Any], machine: Machine) -> Work:
    """Work of a call with these arguments (shapes will do), what is computed again included; arguments and results once
    more, as they are read and written.

    A loop whose length is known only when it runs counts once, of branches the dearest.
    """
    traced = jax.make_jaxpr(lambda given: function(**given))(dict(arguments))
    outside = sum(map(_bytes, [*traced.in_avals, *traced.out_avals]))
    return _work_of(traced.jaxpr, machine) + machine.work(0.0, outside)


def _bytes(aval: Any) -> float:
    dtype = getattr(aval, "dtype", None)
    if dtype is None:
        return 0.0
    key = jax.dtypes.issubdtype(dtype, jax.dtypes.extended)
    return math.prod(aval.shape) * (8 if key else np.dtype(dtype).itemsize)


def _work_of(jaxpr: Any, machine: Machine) -> Work:
    total, branch_of = Work(), {}
    for equation in jaxpr.eqns:
        name, values = equation.primitive.name, equation.params
        inputs, outputs = [x.aval for x in equation.invars], [x.aval for x in equation.outvars]
        moved = sum(map(_bytes, [*inputs, *outputs]))
        if name == "dot_general":
            (contracted, _), _ = values["dimension_numbers"]
            depth = math.prod(inputs[0].shape[axis] for axis in contracted)
            # a matrix among arrays of rows is weights, or their gradient, and whole on each device that has rows
            most = max(x.ndim for x in inputs)
            weights = [x for x in [*inputs, *outputs] if x.ndim == 2 < most or x.shape == inputs[1].shape and most == 2]
            moved += (machine.copies - 1) * sum(map(_bytes, weights))
            total += machine.work(2.0 * math.prod(outputs[0].shape) * depth, moved)
        elif name.startswith("ragged_dot"):
            width = inputs[1].shape[1] if inputs[1].ndim == 2 else outputs[0].shape[-1]
            total += machine.work(2.0 * math.prod(inputs[0].shape) * width / machine.experts, moved)
        elif name == "pallas_call":
            estimate = values.get("cost_estimate")
            pairs = values.get("input_output_aliases", ())  # what is changed in place is not moved as a whole
            moved -= sum(_bytes(inputs[a]) + _bytes(outputs[b]) for a, b in pairs)
            known = (0.0, moved) if estimate is None else (estimate.flops, estimate.bytes_accessed)
            total += machine.work(*known)
        elif name == "platform_index":
            named = [platforms and machine.platform in platforms for platforms in values["platforms"]]
            branch_of[equation.outvars[0]] = named.index(True) if True in named else len(named) - 1
        elif name == "cond":
            branches = values["branches"]
            chosen = branch_of.get(equation.invars[0])
            branches = branches if chosen is None else branches[chosen : chosen + 1]
            total += max((_work_of(branch.jaxpr, machine) for branch in branches), key=lambda work: work.flops)
        elif name == "shard_map":  # inside, shapes are those of one device
            alone = machine._replace(copies=1.0)
            total += _work_of(values["jaxpr"], alone).times(values["mesh"].size)
        else:
            often = values["length"] if name == "scan" else 1
            for inner in jaxprs_in_params(values):
                total += _work_of(inner, machine).times(often)
    return total


class Schedule(NamedTuple):
    """Of one device, read off a program that was compiled for TPUs."""

    cycles: float = 0.0  # the compiler's estimate for all that is not a kernel of ours or an exchange
    copied_bytes: float = 0.0  # read and written by copies from one layout to another
    kernel_flops: float = 0.0
    kernel_bytes: float = 0.0
    exchanged_bytes: float = 0.0  # that it receives

    def __add__(self, other: Any) -> Schedule:
        return Schedule(*(a + b for a, b in zip(self, other, strict=True)))


def read_schedule(text: str) -> Schedule:
    """From a program's text: the cycles that the compiler wrote beside each instruction, what copies move and kernels
    say that they cost, and what exchanges bring in; loops as often as they run, if their end is a constant, else once.

    An exchange may appear in several instructions while it is under way; its channel tells that it is one.
    """
    blocks: dict[str, list[str]] = {}
    entry = block = ""
    for line in text.split("\n"):
        if started := re.match(rf"(ENTRY )?{NAME} \(.*\{{$", line):
            block = started[2]
            blocks[block] = []
            entry = block if started[1] else entry
        elif block and line.startswith("  "):
            blocks[block].append(line)
    return _schedule_of(entry, blocks, set())


def _schedule_of(block: str, blocks: Mapping[str, list[str]], seen: set[str]) -> Schedule:
    total, sizes = Schedule(), {}
    for line in blocks.get(block, ()):
        if not (parts := re.match(rf"\s+(?:ROOT )?{NAME} = (.*)$", line)):
            continue
        name, rest = parts.groups()
        shapes = rest.split("(", 1)[0] if not rest.startswith("(") else rest.split(") ", 1)[0]
        sizes[name] = sum(_array_bytes(*array) for array in ARRAY.findall(shapes))
        if cycles := re.search(r'"estimated_cycles":"(\d+)"', rest):
            total += Schedule(float(cycles[1]))
        if " copy(" in rest:
            total += Schedule(copied_bytes=2.0 * sizes[name])
        if "tpu_custom_call" in rest and (cost := re.search(r'"cost_estimate":\{([^}]*)\}', rest)):
            flops, moved = (re.search(rf'"{key}":"?(\d+)', cost[1]) for key in ("flops", "bytes_accessed"))
            known = (float(number[1]) if number else 0.0 for number in (flops, moved))
            total += Schedule(0.0, 0.0, *known)
        if exchange := EXCHANGE.search(rest):
            channel = re.search(r"channel_id=(\d+)", rest)
            if (key := channel[1] if channel else name) not in seen:
                seen.add(key)
                operand = re.search(rf"\({NAME}", rest[exchange.start() :])
                size = max(sizes[name], sizes.get(operand[1], 0) if operand else 0)
                # a sum that is scattered is a step of the ring less than one that all get
                twice = exchange[1] == "all-reduce" and "scatter" not in block
                total += Schedule(exchanged_bytes=size * (2 if twice else 1))
        often = _trips(rest, blocks) if " while(" in rest else 1
        for inner in re.findall(rf"(?:body|calls|to_apply|branch_computations)=\{{?{NAME}", rest):
            found = _schedule_of(inner, blocks, seen)
            # a fusion's cycles stand beside it, and what is copied inside never leaves the chip's own memory
            if not re.search(r" (?:while|conditional|call)\(", rest):
                found = found._replace(cycles=0.0, copied_bytes=0.0)
            total += Schedule(*(often * number for number in found))
    return total


def _array_bytes(kind: str, dims: str) -> float:
    return math.prod(map(int, dims.split(","))) * SIZES.get(kind, 4) if dims else SIZES.get(kind, 4)


def _trips(loop: str, blocks: Mapping[str, list[str]]) -> int:
    """How often a loop that counts up from 0 runs."""
    condition = re.search(rf"condition={NAME}", loop)
    lines = blocks.get(condition[1], []) if condition else []
    numbers = [re.search(r"s32\[\]\S* constant\((\d+)\)", line) for line in lines]
    return max((int(number[1]) for number in numbers if number), default=1)
