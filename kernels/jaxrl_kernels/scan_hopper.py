"""`discounted_scan` in Pallas through Mosaic GPU for Hopper: a warpgroup per row, 1024 entries at a time.

Every entry's map is merged with those of the next 1, 2, 4, ... entries, which it finds in shared memory; behind the
last entry stands as much of the identity. The state goes from chunk to chunk in a register.

```
 maps    [ 1024 entries of the chunk | identity ]      reverse: an entry at t reads t + 1, then t + 2, t + 4, ...
```
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int8

from jaxrl_kernels.tiles_hopper import launch, read

CHUNK = 1024


def discounted_scan(
    values: Float[Array, "B T"],
    discount: Float[Array, "B T"] | Float[Array, "1 1"],
    code: Int8[Array, "B T"] | None,
    *,
    affine: Callable[..., Any],
    reverse: bool,
    keep_state: bool,
    interpret: bool = False,
) -> Float[Array, "B T"]:
    """As `scan._pallas_gpu`; `affine` is `scan._affine`."""
    (num_rows, length), per_entry = values.shape, discount.shape == values.shape
    chunk = min(pl.cdiv(length, 128) * 128, CHUNK)
    num_chunks = pl.cdiv(length, chunk)
    here, beyond = (0, chunk) if reverse else (chunk, 0)
    # Entry by entry: vectors could not begin at odd places.
    layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=1)

    def kernel(values, discount, *refs, maps):
        row, out = jax.lax.axis_index("row"), refs[-1]
        maps[0, pl.ds(beyond, chunk)] = jnp.ones(chunk)
        maps[1, pl.ds(beyond, chunk)] = jnp.zeros(chunk)

        def load(ref):
            return read(ref, interpret, layout)

        def body(step, state):
            place = pl.ds((num_chunks - 1 - step if reverse else step) * chunk, chunk)
            factor = load(discount.at[row, place]) if per_entry else discount[0, 0]
            bits = None if code is None else load(refs[0].at[row, place])
            slope, offset, counted = affine(load(values.at[row, place]), factor, bits)
            distance = 1
            while distance < chunk:
                maps[0, pl.ds(here, chunk)], maps[1, pl.ds(here, chunk)] = slope, offset
                there = pl.ds(here + distance if reverse else here - distance, chunk)
                offset = offset + slope * load(maps.at[1, there])
                slope = slope * load(maps.at[0, there])
                distance *= 2
            result = offset + slope * state
            out[row, place] = result if keep_state or code is None else jnp.where(counted, result, 0.0)
            maps[0, pl.ds(here, chunk)] = result
            return maps[0, here + (0 if reverse else chunk - 1)]

        jax.lax.fori_loop(0, num_chunks, body, jnp.float32(0))

    # Entries beyond the row are 0 and so is the state that reaches it from there.
    arrays = [values, discount] if code is None else [values, discount, code]
    wide = num_chunks * chunk
    arrays = [jnp.pad(x, ((0, 0), (0, wide - length))) if x.shape == values.shape else x for x in arrays]
    out = launch(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_rows, wide), jnp.float32),
        grid=(num_rows,),
        grid_names=("row",),
        num_threads=1,
        scratch_types={"maps": plgpu.SMEM((2, 2 * chunk), jnp.float32)},
        semantics=plgpu.LoweringSemantics.Warpgroup,
        interpret=interpret,
    )(*arrays)
    return out[:, :length]
