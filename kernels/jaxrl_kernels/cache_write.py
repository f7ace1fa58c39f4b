"""New keys and values into a cache of pages, in place: all that a decode step changes of it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_kernels import cache_write_tpu
from jaxrl_kernels.dispatch import choose

Pages = tuple[Float[Array, "P KV D page"], Float[Array, "P KV page D"]]


def cache_write(
    k_pages: Float[Array, "P KV D page"],
    v_pages: Float[Array, "P KV page D"],
    keys: Float[Array, "S T KV D"],
    values: Float[Array, "S T KV D"],
    pages: Int[Array, "S T"],
    places: Int[Array, "S T"],
    *,
    implementation: str | None = None,
) -> Pages:
    """The pages with the key and the value of each token at a place of a page, in the layout of `decode_attention`.

    Differentiable. No two tokens are written to one place, unless they are the same there.

    Args:
      k_pages, v_pages: donate them, or carry them through a loop, and they are changed in place. On a TPU that wants
        pages of a multiple of 128 places; XLA's own scatter would first turn the whole cache into another layout, and
        back for the attention behind it.
      keys, values: T new tokens of each of S slots, rounded to the pages' type. On a TPU those that follow each other
        in a page are best written together.
      pages, places: where they go. A token whose page or place is not there (negative, or behind the end) is dropped.
      implementation: None (the platform decides, when the program is lowered), "xla", "pallas_tpu", or for tests
        "interpret_tpu".

    Raises:
      ValueError: an implementation that is unknown or cannot serve this call.
    """
    size = k_pages.shape[3]
    there = (pages >= 0) & (pages < k_pages.shape[0]) & (places >= 0) & (places < size)
    pages, places = jnp.where(there, pages, -1).astype(jnp.int32), jnp.where(there, places, size).astype(jnp.int32)
    keys, values = keys.astype(k_pages.dtype), values.astype(v_pages.dtype)
    return _write_once(implementation, k_pages, v_pages, keys, values, pages, places)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _write(implementation, k_pages, v_pages, keys, values, pages, places):
    refusal = cache_write_tpu.refusal(k_pages)
    interpreted = functools.partial(cache_write_tpu.write, interpret=True)
    write = choose(
        implementation, cpu=_scatter, tpu=refusal or cache_write_tpu.write, interpret_tpu=refusal or interpreted
    )
    return write(k_pages, v_pages, keys, values, pages, places)


@_write.defjvp
def _differentiate(implementation, primals, tangents):
    """The derivative of the scatter."""
    where = primals[4:]
    _, moved = jax.jvp(lambda *arrays: _scatter(*arrays, *where), primals[:4], tangents[:4])
    return _write(implementation, *primals), moved


def _scatter(k_pages, v_pages, keys, values, pages, places):
    """A token that is dropped has a place behind the end."""
    return (
        k_pages.at[pages, :, :, places].set(keys, mode="drop"),
        v_pages.at[pages, :, places].set(values, mode="drop"),
    )


# Traced once for each shape, not for each layer of a model that calls it.
_write_once = jax.jit(_write, static_argnums=0)
