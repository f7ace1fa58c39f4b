"""`fused_policy_loss` in Pallas through Mosaic GPU for Hopper: a warpgroup per row, 512 tokens at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Literal
from jaxtyping import Array, Float

from jaxrl_kernels.policy_loss_math import STATISTICS, Inputs, Terms, in_lanes, merge, one_pass
from jaxrl_kernels.tiles_hopper import launch, read

CHUNK = 512  # tokens, four for each thread, which it reads at once


def row_statistics(
    logprobs: Float[Array, "B T"], inputs: Inputs, *, terms: Terms, interpret: bool = False
) -> tuple[Float[Array, "B S"], Float[Array, "B T"]]:
    """Statistics of the rows and the derivative of each token's objective in its log-prob."""
    num_rows, length = logprobs.shape
    num_chunks = pl.cdiv(length, CHUNK)
    wide = num_chunks * CHUNK
    layout = plgpu.Layout.WG_STRIDED((CHUNK,), vec_size=4)

    def padded(x):  # with entries that the mask hides
        return x if x is None or x.shape[1] == wide else jnp.pad(x, ((0, 0), (0, wide - length)))

    by_token: Any = inputs
    by_token = by_token._replace(mask=inputs.mask.astype(jnp.int8), kl_coefficient=None)
    arrays, form = jax.tree.flatten(jax.tree.map(padded, (logprobs, by_token)))

    def kernel(number, *refs):
        statistics, derivative = refs[-2:]
        row = jax.lax.axis_index("row")

        def body(step, sums):
            place = pl.ds(step * CHUNK, CHUNK)
            own, block = jax.tree.unflatten(form, [read(ref.at[row, place], interpret, layout) for ref in refs[:-2]])
            block = block._replace(kl_coefficient=number[0, 0])
            found, derivative[row, place] = _spelled_out(functools.partial(one_pass, terms=terms), own, block)
            return [merge(*pieces) for pieces in zip(STATISTICS, sums, found, strict=True)]

        start = [jnp.float32({"ratio_min": jnp.inf, "ratio_max": -jnp.inf}.get(name, 0)) for name in STATISTICS]
        statistics[row] = in_lanes(jax.lax.fori_loop(0, num_chunks, body, start), (128,))

    statistics, derivative = launch(
        kernel,
        out_type=[jax.ShapeDtypeStruct((num_rows, width), jnp.float32) for width in (128, wide)],
        grid=(num_rows,),
        grid_names=("row",),
        num_threads=1,
        approx_math=False,  # an approximate tanh has 11 bits
        semantics=plgpu.LoweringSemantics.Warpgroup,
        interpret=interpret,
    )(inputs.kl_coefficient, *arrays)
    return statistics[:, : len(STATISTICS)], derivative[:, :length]


def _spelled_out(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result without the primitives that JAX has for derivatives, which Mosaic does not lower: sums of
    tangents are plain sums, and what stops a gradient has done so."""
    with jax.disable_jit():  # one flat program
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    variables, leaves = closed.jaxpr.constvars + closed.jaxpr.invars, jax.tree.leaves(arguments)
    values = dict(zip(variables, [*closed.consts, *leaves], strict=True))

    def value(x: Any) -> Any:
        return x.val if isinstance(x, Literal) else values[x]

    plain: dict[str, Callable[..., Any]] = {"add_any": jax.lax.add, "stop_gradient": lambda x: x}
    for equation in closed.jaxpr.eqns:
        primitive = equation.primitive
        inputs = [value(x) for x in equation.invars]
        name, parameters = primitive.name, equation.params
        found = plain[name](*inputs) if name in plain else primitive.bind(*inputs, **parameters)
        values.update(zip(equation.outvars, found if primitive.multiple_results else [found], strict=True))
    return jax.tree.unflatten(jax.tree.structure(shapes), [value(x) for x in closed.jaxpr.outvars])
