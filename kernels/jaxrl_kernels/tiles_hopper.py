"""What kernels for Hopper GPUs share (Pallas through Mosaic GPU): products by wgmma, the layouts that it asks for, and
the pipeline between the warpgroup that copies and those that compute.

The interpreter of Mosaic GPU kernels knows warpgroups, copies and barriers, but in JAX 0.10 neither layouts nor
products with an operand in registers. So under it (`interpret`) a product here is a plain one of the same tiles. What
it proves is everything but where numbers lie in registers and shared memory, which the lowering for CUDA checks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jaxrl_kernels.tiles import dot

Tile = Any  # an array in registers, or a reference to shared memory
ROWS = 64  # of a warpgroup's tile
TILE, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA.reduce(1)
# Layouts in registers: of a tile, of a row (an entry for each of its columns), and of a column.

# JAX 0.10 asks for an index beside the reference that is loaded, 0.11 warns of one.
INDEX: tuple[Any, ...] = () if hasattr(plgpu, "InterpretGPUParams") else ((),)


def launch(
    kernel: Callable[..., None],
    *,
    interpret: bool,
    approx_math: bool = True,
    semantics: Any = plgpu.LoweringSemantics.Lane,
    **options: Any,
) -> Callable[..., Any]:
    """`plgpu.kernel`, whose warpgroups ask for their index as "warpgroup"; with `interpret` on a CPU, for tests.
    Under the semantics of warpgroups Mosaic finds the layouts itself."""
    parameters = plgpu.CompilerParams(approx_math=approx_math, lowering_semantics=semantics)
    interpreter = _interpreter() if interpret else False
    function = getattr(kernel, "func", kernel)  # of a partial
    name = f"{function.__module__.rpartition('.')[2]}_{function.__name__.strip('_')}"  # in profiles
    options |= {"thread_name": "warpgroup", "kernel_name": name}
    return plgpu.kernel(kernel, compiler_params=parameters, interpret=interpreter, **options)


def shared(*shape: int, dtype: Any) -> Any:
    """Shared memory for tiles, as wgmma reads them: in pieces of 8 rows by 128 swizzled bytes."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)))


def full(shape: tuple[int, ...], value: float, layout: Any, interpret: bool) -> Float[Array, "..."]:
    """A tile, row or column of one float32 number."""
    array = jnp.full(shape, value, jnp.float32)
    return array if interpret else plgpu.layout_cast(array, layout)


def places(shape: tuple[int, int], interpret: bool) -> Int[Array, "M N"]:
    """A tile of each number's column."""
    if interpret:
        return jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=TILE)


def load(reference: Any, layout: Any, interpret: bool) -> Array:
    """A row or column from shared memory."""
    return reference[...] if interpret else plgpu.layout_cast(reference[...], layout)


def read(reference: Any, interpret: bool, layout: Any = None) -> Array:
    """Numbers from the GPU's memory or a line from shared memory, where Mosaic may find their layout."""
    return reference[...] if interpret else plgpu.load(reference, *INDEX, layout=layout, optimized=False)


def products(
    *pairs: tuple[Tile, Tile],
    interpret: bool,
    transposed: bool = True,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[Float[Array, "M N"]]:
    """`x y'` in float32 of each pair of x [M, D] and y [N, D], or `x y` of y [D, N], in shared memory.

    `meanwhile` runs as they are made.
    """
    axis = 0 if transposed else 1  # of y's rows or columns that a product has
    if interpret:
        meanwhile()
        return [dot(_value(x), y[...], 1, 1 - axis) for x, y in pairs]

    def multiply(*totals):
        for total, (x, y) in zip(totals, pairs, strict=True):
            plgpu.wgmma(total, x, y.transpose((1, 0)) if transposed else y)
        meanwhile()
        return [total[...] for total in totals]

    return pl.run_scoped(multiply, *(plgpu.ACC((x.shape[0], y.shape[axis]), jnp.float32) for x, y in pairs))


def add_products(*terms: tuple[Float[Array, "M D"], Tile, Tile], interpret: bool) -> tuple[Float[Array, "M D"], ...]:
    """`total + x y` of each (total, x [M, N], y [N, D]), y in shared memory."""
    if interpret:
        return tuple(total + dot(_value(x), y[...], 1, 0) for total, x, y in terms)

    def multiply(totals):
        for total, (_, x, y) in zip(totals, terms, strict=True):
            plgpu.wgmma(total, x, y)

    return pl.run_state(multiply)(tuple(plgpu.ACC.init(total) for total, *_ in terms))


def spread(line: Array, shape: tuple[int, ...], axis: int) -> Array:
    """A column (axis 0) or a row (axis 1) over a whole tile."""
    return jax.lax.broadcast_in_dim(line, shape, [axis])


def produce(steps: Any, stages: int, *streams: tuple[Callable[[Any, Any], None], Any]) -> None:
    """The work of the warpgroup that copies: for each step and stream, into slot `step % stages`, once that is free.

    A stream is a function `copy(step, slot)` and the barriers by which the others free its slots.
    """

    def step(number, _):
        slot = jax.lax.rem(number, stages)
        for copy, free in streams:
            pl.when(number >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            copy(number, slot)

    def finish(number, _):  # nobody may leave a barrier behind whose last phase was not seen
        for _, free in streams:
            plgpu.barrier_wait(free.at[jax.lax.rem(number, stages)])

    jax.lax.fori_loop(0, steps, step, None)
    jax.lax.fori_loop(jnp.maximum(steps - stages, 0), steps, finish, None)


def _interpreter() -> Any:
    """Also looks for accesses to shared memory that nothing orders."""
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams(detect_races=True)
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public since JAX 0.11 only

    return InterpretGPUParams(detect_races=True)


def _value(x: Tile) -> Array:
    return x if isinstance(x, jax.Array) else x[...]
