"""`cache_write` in Pallas for TPUs: a step of the grid is a token, and changes one tile of keys and one of values.

The tiles come and go by the grid's own pipeline, while those of other tokens are changed. Tokens of one tile that
follow each other find it where the last one left it. A token that is dropped takes the tile of the token before.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxrl_kernels.tiles import VMEM_LIMIT

LANES, ROWS = 128, 16  # of a tile: places of keys, and places of values, which are 16 in two bytes


def refusal(k_pages: Float[Array, "P KV D page"]) -> str | None:
    """Why the kernel cannot serve a call, None where it can."""
    _, num_kv, width, page = k_pages.shape
    if page % LANES:
        return f"needs pages of a multiple of {LANES} places, got {page}"
    if (held := 8 * num_kv * width * LANES * k_pages.dtype.itemsize) > VMEM_LIMIT:  # two tiles, in and out, twice
        return f"needs tiles of {num_kv} heads of {width} that fit {VMEM_LIMIT} bytes of VMEM, got {held}"
    return None


def write(
    k_pages: Float[Array, "P KV D page"],
    v_pages: Float[Array, "P KV page D"],
    keys: Float[Array, "S T KV D"],
    values: Float[Array, "S T KV D"],
    pages: Int[Array, "S T"],
    places: Int[Array, "S T"],
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "P KV D page"], Float[Array, "P KV page D"]]:
    """The pages with the tokens; those of page -1 are dropped."""
    num_kv, width = k_pages.shape[1:3]
    pages, places = pages.reshape(-1), places.reshape(-1)
    there = pages >= 0
    # the last token up to each that is written, and the first of all for those before it; page 0 if there is none
    last = jnp.maximum(jax.lax.cummax(jnp.where(there, jnp.arange(len(pages)), -1)), jnp.argmax(there))
    there = there.astype(jnp.int32)
    tile_of = jnp.maximum(pages, 0)[last], jnp.where(jnp.any(there), places[last], 0)
    # Narrow heads would be padded to whole lanes; XLA lays such values out as keys, as `decode_attention_tpu` has it.
    turned = width % LANES != 0
    if turned:
        v_pages = v_pages.swapaxes(2, 3)

    def token(i, *_):
        return i, 0, 0

    def lanes(i, there, pages, places):
        return pages[i], 0, 0, jax.lax.div(places[i], LANES)

    def rows(i, there, pages, places):
        return pages[i], 0, jax.lax.div(places[i], ROWS), 0

    of_keys = pl.BlockSpec((None, num_kv, width, LANES), lanes)
    of_values = of_keys if turned else pl.BlockSpec((None, num_kv, ROWS, width), rows)
    new = pl.BlockSpec((None, num_kv, width), token)
    k_pages, v_pages = pl.pallas_call(
        functools.partial(_kernel, turned),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(len(pages),),
            in_specs=[new, new, of_keys, of_values],
            out_specs=[of_keys, of_values],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_pages, v_pages)],
        input_output_aliases={5: 0, 6: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT),
        interpret=interpret,
        name="cache_write",
    )(there, *tile_of, *(x.reshape(-1, num_kv, width) for x in (keys, values)), k_pages, v_pages)
    return k_pages, v_pages.swapaxes(2, 3) if turned else v_pages


def _kernel(turned, there, pages, places, keys, values, old_keys, old_values, new_keys, new_values):
    i = pl.program_id(0)
    before = jnp.maximum(i - 1, 0)
    for new, old, out, axis in ((keys, old_keys, new_keys, 2), (values, old_values, new_values, 2 if turned else 1)):
        size = out.shape[axis]
        tiles = [jax.lax.div(places[j], size) for j in (i, before)]

        @pl.when((i == 0) | (pages[i] != pages[before]) | (tiles[0] != tiles[1]))
        def _(old=old, out=out):
            out[...] = old[...]

        @pl.when(there[i] == 1)
        def _(new=new, out=out, axis=axis, size=size):
            here = jax.lax.broadcasted_iota(jnp.int32, out.shape, axis) == jax.lax.rem(places[i], size)
            # by way of float32, whose numbers have their own places: those of two bytes lie in pairs
            token = jnp.expand_dims(new[...].astype(jnp.float32), axis)
            out[...] = jnp.where(here, token, out[...].astype(jnp.float32)).astype(out.dtype)
