"""`sample_tokens` in Pallas for TPUs and, through Triton, for GPUs: one kernel over blocks of rows.

What happens to a block of rows is the same on both (`draw`): passes over the vocabulary in pieces, for the largest
logit, for each halving of a threshold, for the total weight, and for the piece in which the CDF passes the target. They
differ in where the pieces come from. A TPU holds the rows in VMEM, logits over temperature and their weights side by
side; a GPU reads the logits anew in each pass, from the L2 cache, and computes the weights again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from jaxrl_kernels.sampling_search import Filters, smallest, threshold
from jaxrl_kernels.tiles import VMEM_LIMIT

LANES = 128
TPU_PIECE, GPU_PIECE = 2048, 4096

Piece = Float[Array, "R C"]
Drawn = tuple[Int[Array, "N"], Float[Array, "N"]]


def refusal_of_tpu(logits: Float[Array, "N V"]) -> str | None:
    """Why the TPU kernel cannot serve these logits; None where it can."""
    rows, width, num_pieces = _tpu_blocks(logits)
    needed = rows * width * num_pieces * (2 * logits.dtype.itemsize + 8)  # two buffers of input, logits and weights
    if needed <= 0.9 * VMEM_LIMIT:
        return None
    return f"needs a vocabulary of which {rows} rows fit VMEM, got {logits.shape[1]} tokens"


def on_tpu(
    logits: Float[Array, "N V"], uniform: Float[Array, "N"], *, filters: Filters, interpret: Any = False
) -> tuple[Int[Array, "N"], Float[Array, "N"]]:
    """A block of whole rows at a time, read from memory once."""
    num_rows, vocab = logits.shape
    rows, width, num_pieces = _tpu_blocks(logits)

    def kernel(logits_ref, uniform_ref, token_ref, logprob_ref, scaled_ref, weights_ref):
        def place(j):
            return slice(None), pl.ds(pl.multiple_of(j * width, LANES), width)

        def scale(j, _):
            scaled_ref[place(j)] = _scale(logits_ref[place(j)], j, vocab, filters)

        def weigh(peak):
            def one(j, _):
                weights_ref[place(j)] = jnp.exp(scaled_ref[place(j)] - peak)

            jax.lax.fori_loop(0, num_pieces, one, None)
            return lambda j: weights_ref[place(j)]

        jax.lax.fori_loop(0, num_pieces, scale, None)
        # A reduction, so that it lies in the lanes as the totals do: compared with a column that was loaded as one,
        # they fail to compile ("Lane broadcast" is not implemented in Mosaic of libtpu 0.0.51).
        uniform = jnp.max(uniform_ref[...], axis=1, keepdims=True)
        drawn = draw(lambda j: scaled_ref[place(j)], weigh, num_pieces, (rows, width), uniform, filters)
        token_ref[...], logprob_ref[...] = drawn

    column = pl.BlockSpec((rows, 1), lambda i: (i, 0))
    token, logprob = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(num_rows, rows),),
        in_specs=[
            pl.BlockSpec((rows, width * num_pieces), lambda i: (i, 0)),
            pl.BlockSpec((rows, LANES), lambda i: (i, 0)),
        ],
        out_specs=[column, column],
        out_shape=_out_shape(num_rows),
        scratch_shapes=[pltpu.VMEM((rows, width * num_pieces), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT),
        interpret=interpret,
        name="sample_tokens",
    )(logits, jnp.broadcast_to(uniform[:, None], (num_rows, LANES)))
    return token[:, 0], logprob[:, 0]


def on_gpu(
    logits: Float[Array, "N V"], uniform: Float[Array, "N"], *, filters: Filters, interpret: bool = False
) -> tuple[Int[Array, "N"], Float[Array, "N"]]:
    """A program per row."""
    num_rows, vocab = logits.shape
    width = min(max(LANES, pl.next_power_of_2(vocab)), GPU_PIECE)

    def kernel(logits_ref, uniform_ref, token_ref, logprob_ref):
        def read(j):
            place = pl.ds(j * width, width)
            inside = (j * width + jnp.arange(width) < vocab)[None]
            piece = plgpu.load(logits_ref.at[:, place], mask=inside, other=0)
            return _scale(piece, j, vocab, filters)

        def weigh(peak):
            return lambda j: jnp.exp(read(j) - peak)

        drawn = draw(read, weigh, pl.cdiv(vocab, width), (1, width), uniform_ref[...], filters)
        token_ref[...], logprob_ref[...] = drawn

    number = pl.BlockSpec((1, 1), lambda i: (i, 0))
    token, logprob = pl.pallas_call(
        kernel,
        grid=(num_rows,),
        in_specs=[pl.BlockSpec((1, vocab), lambda i: (i, 0)), number],
        out_specs=[number, number],
        out_shape=_out_shape(num_rows),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="sample_tokens",
    )(logits, uniform[:, None])
    return token[:, 0], logprob[:, 0]


def _tpu_blocks(logits: Float[Array, "N V"]) -> tuple[int, int, int]:
    """Rows of a block (one tile of their type), and width and number of the pieces that they are looked at in."""
    num_rows, vocab = logits.shape
    num_pieces = pl.cdiv(vocab, TPU_PIECE)
    width = pl.cdiv(pl.cdiv(vocab, num_pieces), LANES) * LANES
    return min(num_rows, 32 // logits.dtype.itemsize), width, num_pieces


def _out_shape(num_rows: int) -> list[Any]:
    return [jax.ShapeDtypeStruct((num_rows, 1), jnp.int32), jax.ShapeDtypeStruct((num_rows, 1), jnp.float32)]


def _scale(logits: Array, j: Array, vocab: int, filters: Filters) -> Piece:
    """Logits over temperature of piece j; minus infinity beyond the vocabulary, where anything may stand."""
    scaled = logits.astype(jnp.float32) / filters.temperature
    return jnp.where(j * logits.shape[1] + _columns(logits.shape) < vocab, scaled, -jnp.inf)


def _columns(shape: tuple[int, ...]) -> Int[Array, "R C"]:
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def draw(
    read: Callable[[Array], Piece],
    weigh: Callable[[Array], Callable[[Array], Piece]],
    num_pieces: int,
    shape: tuple[int, ...],
    uniform: Float[Array, "R 1"],
    filters: Filters,
    first_of: Callable[[Array], Array] | None = None,
) -> tuple[Int[Array, "R 1"], Float[Array, "R 1"]]:
    """Tokens and log-probs of R rows, or of one where a piece has no axis of rows and a number of a row none either.

    Args:
      read: gives piece j of the logits over temperature, [R, C] or [C].
      weigh: gives, for the largest logit of each row, a function that gives piece j of `exp(logits - largest)`.
      shape: R and C, or C.
      first_of: gives the first token of piece j, `j * C` where there is none.
    """
    keep: dict[str, Any] = {"axis": -1, "keepdims": len(shape) == 2}
    first_of = first_of or (lambda j: j * shape[-1])

    def over_pieces(combine, of_piece, start, dtype):
        carry = jnp.full(shape, start, dtype)
        return jax.lax.fori_loop(0, num_pieces, lambda j, carry: combine(carry, of_piece(j)), carry)

    def total_of(of_piece, dtype):
        return jnp.sum(over_pieces(jnp.add, of_piece, 0, dtype), **keep)

    peak = jnp.max(over_pieces(jnp.maximum, read, -jnp.inf, jnp.float32), **keep)
    weights = weigh(peak)

    floor = threshold(
        peak,
        filters,
        count_above=lambda logit: total_of(lambda j: (read(j) > logit).astype(jnp.int32), jnp.int32),
        mass_above=lambda logit: total_of(lambda j: jnp.where(read(j) > logit, weights(j), 0.0), jnp.float32),
        mass_from=lambda logit: total_of(lambda j: jnp.where(read(j) >= logit, weights(j), 0.0), jnp.float32),
    )

    def kept(j):
        return jnp.where(read(j) < floor, 0.0, weights(j))

    def sum_of(piece):
        return jnp.sum(piece, **keep)

    nothing = jnp.zeros_like(peak)
    # Piece by piece, as it is added up below: the target must not exceed what is reached there.
    total = jax.lax.fori_loop(0, num_pieces, lambda j, total: total + sum_of(kept(j)), nothing)
    if filters.greedy:
        token, logprob = _first_largest(read, num_pieces, shape, peak, first_of, keep), -jnp.log(total)
    else:
        token, logprob = _invert(read, kept, sum_of, num_pieces, shape, uniform * total, first_of, keep)
        logprob = logprob - peak - jnp.log(total)
    # A logit that is NaN is never filtered out, and infinity minus infinity is NaN, as the total then is. (Whether a
    # maximum passes NaN on differs between platforms.)
    valid = total < jnp.inf
    return jnp.where(valid, token, -1), jnp.where(valid, logprob, jnp.nan)


def _first_largest(read, num_pieces, shape, peak, first_of, keep) -> Int[Array, "R 1"]:
    columns, none = _columns(shape), jnp.iinfo(jnp.int32).max

    def one(j, first):
        return jnp.minimum(first, jnp.where(read(j) == peak, first_of(j) + columns, none))

    first = jax.lax.fori_loop(0, num_pieces, one, jnp.full(shape, none, jnp.int32))
    return jnp.min(first, **keep)


def _invert(
    read, kept, sum_of, num_pieces, shape, target, first_of, keep
) -> tuple[Int[Array, "R 1"], Float[Array, "R 1"]]:
    """The first token with weight at which the sum of weights exceeds the target, the last one with weight if rounding
    leaves none; and its logit."""
    columns = _columns(shape)
    whole = jnp.zeros_like(target, jnp.int32)

    def locate(j, carry):
        end, found, piece, before, logits, weights = carry
        here = kept(j)
        size = sum_of(here)
        # Until it is found, the last piece with weight is held.
        take = (found == 0) & (size > 0)
        before = jnp.where(take, end, before)
        end = end + size
        return (
            end,
            jnp.where(take & (end > target), 1, found),
            jnp.where(take, j, piece),
            before,
            jnp.where(jnp.broadcast_to(take, shape), read(j), logits),
            jnp.where(jnp.broadcast_to(take, shape), here, weights),
        )

    zeros = jnp.zeros(shape, jnp.float32)
    start = jnp.zeros_like(target), whole, whole, jnp.zeros_like(target), zeros, zeros
    _, _, piece, before, logits, weights = jax.lax.fori_loop(0, num_pieces, locate, start)

    def exceeds(column):
        return before + sum_of(jnp.where(columns <= column, weights, 0.0)) > target

    # A column without weight adds nothing, so the first one that exceeds has weight.
    last = jnp.max(jnp.where(weights > 0, columns, 0), **keep)
    column = smallest(whole, last, exceeds, shape[-1].bit_length())
    return first_of(piece) + column, sum_of(jnp.where(columns == column, logits, 0.0))
