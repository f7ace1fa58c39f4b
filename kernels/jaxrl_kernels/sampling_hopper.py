"""`sample_tokens` in Pallas through Mosaic GPU for Hopper: a warpgroup per row, which does what `sampling_pallas` says
in pieces of up to 2048 logits. They are read anew in each pass, after the first one from the L2 cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jaxrl_kernels.sampling_pallas import draw
from jaxrl_kernels.sampling_search import Filters
from jaxrl_kernels.tiles_hopper import launch, read

PIECE = 2048
LINE = 512  # four for each thread of a warpgroup, which it reads at once


def on_hopper(
    logits: Float[Array, "N V"], uniform: Float[Array, "N"], *, filters: Filters, interpret: bool = False
) -> tuple[Int[Array, "N"], Float[Array, "N"]]:
    """A warpgroup per row."""
    num_rows, vocab = logits.shape
    if vocab < LINE:
        logits = jnp.pad(logits, ((0, 0), (0, LINE - vocab)), constant_values=-jnp.inf)
        vocab = LINE
    width = min(PIECE, vocab // LINE * LINE)
    num_pieces = pl.cdiv(vocab, width)
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=1 if vocab % 4 else 4)

    def kernel(logits, uniform, token, logprob):
        row = jax.lax.axis_index("row")

        def first_of(j):  # the last piece is moved back, so that it is whole
            return jnp.minimum(j * width, vocab - width)

        def scaled(j):
            piece = read(logits.at[row, pl.ds(first_of(j), width)], interpret, layout)
            piece = piece.astype(jnp.float32) / filters.temperature
            if vocab % width == 0:
                return piece
            fresh = jax.lax.broadcasted_iota(jnp.int32, (width,), 0) >= j * width - first_of(j)
            return jnp.where(fresh, piece, -jnp.inf)

        def weigh(peak):
            return lambda j: jnp.exp(scaled(j) - peak)

        token[row], logprob[row] = draw(scaled, weigh, num_pieces, (width,), uniform[row], filters, first_of)

    return launch(
        kernel,
        out_type=[jax.ShapeDtypeStruct((num_rows,), dtype) for dtype in (jnp.int32, jnp.float32)],
        grid=(num_rows,),
        grid_names=("row",),
        num_threads=1,
        semantics=plgpu.LoweringSemantics.Warpgroup,
        interpret=interpret,
    )(logits, uniform)
