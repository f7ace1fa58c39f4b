"""Discounted sums along time, `y_t = x_t + d_t * y_next`: returns, generalized advantages, traces.

A step of the recurrence is an affine map `y -> slope * y + offset`; a false entry of the mask is the identity and a
border between segments has slope 0. Maps compose associatively, which is what the parallel versions rest on (Blelloch
1990): on a TPU by doubling inside a block of lanes, on a GPU by a tree over a chunk of a row, in both with the state
carried from block to block, so that every array is read or written once. A CPU is served best by plain steps with the
batch in the vector lanes: they cost little more than bringing time to the front, which is done inside the cache.

| | reads | holds |
| --- | --- | --- |
| TPU | a block [32, 512] at a time, blocks of a row in order of the recurrence | one state per row in VMEM |
| GPU | a row per program, 1024 entries at a time | one state in a register |
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int, Int8

from jaxrl_kernels import scan_hopper
from jaxrl_kernels.dispatch import choose
from jaxrl_kernels.mesh import split_rows

Discount = Float[Array, "B T"] | Float[Array, "1 1"]
# Of an entry: bit 0, it counts; bit 1, the state behind it (the one that it would add) belongs to another segment.
Code = Int8[Array, "B T"] | None
COUNTED, BORDER = 1, 2

CPU_STEPS = 128
TPU_ROWS, TPU_LANES = 32, 512  # 32 rows are one tile of int8
GPU_CHUNK = 1024


def discounted_scan(
    values: Float[Array, "B T"],
    discount: Float[Array, "B T"] | Float[Array, ""] | float,
    *,
    mask: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    reverse: bool = True,
    implementation: str | None = None,
) -> Float[Array, "B T"]:
    """`y_t = values_t + discount_t * y_next` over the true entries of `mask`, each segment by itself.

    Next is the following true entry (the preceding one with `reverse=False`); there is none at the end of a row or of a
    segment, where `y_t = values_t`. Discounted returns are the scan of rewards, generalized advantages (Schulman et al.
    2016, eq. 16) that of TD errors with `gamma * lambda`. Differentiable in values and discount: the gradient of a scan
    is a scan in the other direction.

    Args:
      values: [B, T], read at true entries only: what stands under a false one may be NaN.
      discount: a number, or [B, T] with the factor between entry t and the true entry that follows it.
      mask: [B, T], default all true. A false entry is stepped over: the state passes it unchanged.
      segment_ids: [B, T], packed sequences; the scan starts anew wherever the id changes from one entry to the next.
      reverse: from the end of the row to its beginning.
      implementation: None, "xla", "associative", "reference", "pallas_tpu", "pallas_gpu", "mosaic_gpu" (Hopper),
        or, for tests, "interpret_tpu", "interpret_gpu", "interpret_mosaic"; see `dispatch.choose`.

    Returns:
      [B, T] float32, accumulated in float32, 0 at false entries.

    Raises:
      ValueError: shapes, types, an implementation that is unknown or cannot run here.
    """
    if values.ndim != 2 or not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(f"values must be floating point of shape [B, T], got {values.dtype} {list(values.shape)}")
    discount = jnp.asarray(discount, jnp.result_type(discount) if jnp.ndim(discount) else jnp.float32)
    for name, array in (("discount", discount), ("mask", mask), ("segment_ids", segment_ids)):
        if array is not None and array.shape != values.shape and not (name == "discount" and array.ndim == 0):
            raise ValueError(f"{name} must have the shape of values, {list(values.shape)}, got {list(array.shape)}")
    if mask is not None and mask.dtype != bool:
        raise ValueError(f"mask must be boolean, got {mask.dtype}; pass mask != 0")
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids must be integers, got {segment_ids.dtype}")
    discount = discount if discount.ndim else discount[None, None]
    return _scan(values, discount, _encode(mask, segment_ids, reverse), reverse, implementation)


def _encode(mask: Bool[Array, "B T"] | None, segment_ids: Int[Array, "B T"] | None, reverse: bool) -> Code:
    """What a step does, in one byte, so that a kernel reads neither masks nor ids twice."""
    if segment_ids is None:
        return None if mask is None else mask.astype(jnp.int8)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    borders = jnp.pad(changes, ((0, 0), (0, 1) if reverse else (1, 0)))
    return BORDER * borders.astype(jnp.int8) + (jnp.int8(COUNTED) if mask is None else mask.astype(jnp.int8))


def _affine(values: Array, discount: Array, code: Array | None) -> tuple[Array, Array, Array | bool]:
    """Slope, offset and whether an entry counts, of a whole array or of a block in a kernel."""
    offset = values.astype(jnp.float32)
    slope = jnp.broadcast_to(discount.astype(jnp.float32), values.shape)
    if code is None:
        return slope, offset, True
    bits = code.astype(jnp.int32)
    counted = (bits & COUNTED) != 0
    slope = jnp.where((bits & BORDER) != 0, 0.0, jnp.where(counted, slope, 1.0))
    return slope, jnp.where(counted, offset, 0.0), counted


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _scan(values: Array, discount: Discount, code: Code, reverse: bool, implementation: str | None) -> Array:
    return _run(values, discount, code, reverse, implementation)


def _scan_forward(values: Array, discount: Discount, code: Code, reverse: bool, implementation: str | None) -> Any:
    return _run(values, discount, code, reverse, implementation), (values, discount, code)


def _scan_backward(reverse: bool, implementation: str | None, saved: Any, cotangent: Array) -> Any:
    """The transposed recurrence, `z_t = g_t + slope_(t-1) * z_(t-1)` for a reverse scan, then `dL/dslope_t = z_t *
    y_(t+1)`; the scan that gives y once more is dead code unless somebody differentiates in the discount."""
    values, discount, code = saved
    slope, _, counted = _affine(values, discount, code)
    total = _run(jnp.where(counted, cotangent, 0), _shift(slope, not reverse), None, not reverse, implementation)
    state = _shift(_run(values, discount, code, reverse, implementation, keep_state=True), reverse)
    used = True if code is None else code == COUNTED
    to_discount = jnp.where(used, total * state, 0)
    if discount.shape != values.shape:
        to_discount = jnp.sum(to_discount, keepdims=True)
    return jnp.where(counted, total, 0).astype(values.dtype), to_discount.astype(discount.dtype), None


_scan.defvjp(_scan_forward, _scan_backward)


def _shift(x: Array, left: bool) -> Array:
    """The entry that comes next in time (`left`) or came before, 0 where there is none."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1))) if left else jnp.pad(x[:, :-1], ((0, 0), (1, 0)))


def _run(
    values: Array, discount: Array, code: Code, reverse: bool, implementation: str | None, keep_state: bool = False
) -> Array:
    """The recurrence by the version that is chosen. `keep_state`: at a false entry the state that passes, not 0."""
    options = {"reverse": reverse, "keep_state": keep_state}
    versions: dict[str, Any] = {
        "cpu": _steps,
        "tpu": _pallas_tpu,
        "gpu": _pallas_gpu,
        "associative": _associative,
        "reference": _reference,
        "interpret_tpu": functools.partial(_pallas_tpu, interpret=True),
        "interpret_gpu": functools.partial(_pallas_gpu, interpret=True),
        "hopper": functools.partial(scan_hopper.discounted_scan, affine=_affine),
        "interpret_mosaic": functools.partial(scan_hopper.discounted_scan, affine=_affine, interpret=True),
    }
    run = choose(implementation, **{name: functools.partial(version, **options) for name, version in versions.items()})
    arrays = values, discount, code
    return split_rows(run, arrays, len(values))(*arrays) if values.size else jnp.zeros(values.shape, jnp.float32)


def _reference(values: Array, discount: Array, code: Code, *, reverse: bool, keep_state: bool) -> Array:
    """The definition, entry by entry."""
    state = jnp.zeros(values.shape[0])
    result: list[Array] = []
    discount = jnp.broadcast_to(discount, values.shape)
    for t in reversed(range(values.shape[1])) if reverse else range(values.shape[1]):
        bits = COUNTED if code is None else code[:, t].astype(jnp.int32)
        state = jnp.where(jnp.bitwise_and(bits, BORDER) != 0, 0, state)
        counted = jnp.bitwise_and(bits, COUNTED) != 0
        state = jnp.where(counted, values[:, t].astype(jnp.float32) + discount[:, t] * state, state)
        result.append(jnp.where(counted | keep_state, state, 0))
    return jnp.stack(result[::-1] if reverse else result, axis=1)


def _steps(values: Array, discount: Array, code: Code, *, reverse: bool, keep_state: bool) -> Array:
    """Plain steps over the rows as one vector, for 128 entries at a time, which are transposed while in the cache."""
    num_rows, length = values.shape
    whole, rest = divmod(length, CPU_STEPS)

    def step(state: Array, entry: tuple[Array, Array]) -> tuple[Array, Array]:
        state = entry[1] + entry[0] * state
        return state, state

    def piece(start: Array | int, size: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        def cut(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) if x.shape == values.shape else x

        slope, offset, counted = _affine(*jax.tree.map(cut, (values, discount, code)))
        state, states = jax.lax.scan(step, carry[0], (slope.T, offset.T), reverse=reverse)
        block = states.T if keep_state else jnp.where(counted, states.T, 0)
        return state, jax.lax.dynamic_update_slice_in_dim(carry[1], block, start, axis=1)

    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        return piece((whole - 1 - i if reverse else i) * CPU_STEPS, CPU_STEPS, carry)

    carry = jnp.zeros(num_rows), jnp.zeros(values.shape)
    if rest and reverse:
        carry = piece(length - rest, rest, carry)
    if whole:
        carry = jax.lax.fori_loop(0, whole, body, carry)
    if rest and not reverse:
        carry = piece(length - rest, rest, carry)
    return carry[1]


def _associative(values: Array, discount: Array, code: Code, *, reverse: bool, keep_state: bool) -> Array:
    def compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return second[0] * first[0], second[1] + second[0] * first[1]

    slope, offset, counted = _affine(values, discount, code)
    result = jax.lax.associative_scan(compose, (slope, offset), reverse=reverse, axis=1)[1]
    return result if keep_state else jnp.where(counted, result, 0)


def _pallas_tpu(
    values: Array, discount: Array, code: Code, *, reverse: bool, keep_state: bool, interpret: Any = False
) -> Array:
    num_rows, length = values.shape
    rows, lanes = min(num_rows, TPU_ROWS), min(pl.cdiv(length, 128) * 128, TPU_LANES)
    num_blocks = pl.cdiv(length, lanes)

    def block(step):
        return num_blocks - 1 - step if reverse else step

    def kernel(values_ref, discount_ref, *refs):
        out_ref, state_ref = refs[-2:]
        start = block(pl.program_id(1)) * lanes

        @pl.when(pl.program_id(1) == 0)
        def _():
            state_ref[...] = jnp.zeros_like(state_ref)

        slope, offset, counted = _affine(values_ref[...], discount_ref[...], None if code is None else refs[0][...])
        lane = jax.lax.broadcasted_iota(jnp.int32, (rows, lanes), 1)
        if length % lanes:  # the last block reaches beyond the row, where anything may stand
            slope, offset = (jnp.where(start + lane < length, x, 0) for x in (slope, offset))
        distance = 1
        while distance < lanes:
            inside = lane < lanes - distance if reverse else lane >= distance
            turn = lanes - distance if reverse else distance
            before = jnp.where(inside, pltpu.roll(offset, turn, 1), 0)
            offset = offset + slope * before
            slope = slope * jnp.where(inside, pltpu.roll(slope, turn, 1), 1)
            distance *= 2
        result = offset + slope * state_ref[...]
        state_ref[...] = result[:, :1] if reverse else result[:, -1:]
        out_ref[...] = result if keep_state else jnp.where(counted, result, 0)

    tile = pl.BlockSpec((rows, lanes), lambda row, step: (row, block(step)))
    number = pl.BlockSpec((1, 1), lambda row, step: (0, 0))
    inputs = [values, discount] if code is None else [values, discount, code]
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(num_rows, rows), num_blocks),
        in_specs=[tile, tile if discount.shape == values.shape else number, tile][: len(inputs)],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct(values.shape, jnp.float32),
        scratch_shapes=[pltpu.VMEM((rows, 1), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="discounted_scan",
    )(*inputs)


def _pallas_gpu(
    values: Array, discount: Array, code: Code, *, reverse: bool, keep_state: bool, interpret: bool = False
) -> Array:
    num_rows, length = values.shape
    chunk = min(pl.next_power_of_2(length), GPU_CHUNK)
    num_chunks = pl.cdiv(length, chunk)
    per_entry = discount.shape == values.shape

    def kernel(values_ref, discount_ref, *refs):
        out_ref = refs[-1]

        def body(step, state):
            start = (num_chunks - 1 - step if reverse else step) * chunk
            inside = start + jnp.arange(chunk) < length
            place = pl.ds(start, chunk)

            def read(ref):
                return plgpu.load(ref.at[place], mask=inside, other=0)

            factor = read(discount_ref) if per_entry else discount_ref[0, 0]
            slope, offset, counted = _affine(read(values_ref), factor, None if code is None else read(refs[0]))
            # Beyond the row an entry counts as the identity, so that the state that leaves the chunk is right.
            slope, offset = jnp.where(inside, slope, 1), jnp.where(inside, offset, 0)
            result = slope * _entering_states(slope, offset, state, reverse) + offset
            plgpu.store(out_ref.at[place], result if keep_state else jnp.where(counted, result, 0), mask=inside)
            last = jnp.arange(chunk) == (0 if reverse else chunk - 1)
            return jnp.sum(jnp.where(last, result, 0))

        jax.lax.fori_loop(0, num_chunks, body, jnp.float32(0))

    row = pl.BlockSpec((None, length), lambda index: (index, 0))
    number = pl.BlockSpec((1, 1), lambda index: (0, 0))
    inputs = [values, discount] if code is None else [values, discount, code]
    return pl.pallas_call(
        kernel,
        grid=(num_rows,),
        in_specs=[row, row if per_entry else number, row][: len(inputs)],
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct(values.shape, jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="discounted_scan",
    )(*inputs)


def _entering_states(slope: Float[Array, "K"], offset: Float[Array, "K"], state: Array, reverse: bool) -> Array:
    """The state that enters each of K (a power of two) entries: neighbors are merged into one map, the states of half
    as many maps found, and each taken through the first of its pair. Only pairs are split and joined, which is all that
    Triton can do inside a block."""
    if len(slope) == 1:
        return jnp.broadcast_to(state, (1,))
    slopes, offsets = (jnp.unstack(x.reshape(-1, 2), axis=1) for x in (slope, offset))
    first, second = (1, 0) if reverse else (0, 1)
    merged = offsets[second] + slopes[second] * offsets[first]
    entering = _entering_states(slopes[0] * slopes[1], merged, state, reverse)
    between = slopes[first] * entering + offsets[first]
    return jnp.stack((between, entering) if reverse else (entering, between), axis=1).reshape(-1)
