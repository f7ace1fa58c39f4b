"""What the versions of `fused_logprob` share: how products become logits, how their gradient follows, which block of
the head is which."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LOWEST = -1e30  # a peak before anything is seen: finite, as the difference of two infinities is no number


class Options(NamedTuple):
    """What a kernel is specialized on."""

    temperature: float
    softcap: float | None
    vocab_axis: int  # of the head: 0 where it is [V, D], 1 where it is [D, V]
    with_mean: bool  # whether anybody asks for the mean logit, which the entropy needs


def soft_cap(x: Float[Array, "*B"], cap: float) -> Float[Array, "*B"]:
    """`cap * tanh(x / cap)`: between plus and minus `cap`, and small numbers nearly as they are (Gemma 2)."""
    return cap * jnp.tanh(x / cap)


def logits_of(
    products: Float[Array, "*NV"], bias: Float[Array, "*NV"] | None, options: Options
) -> tuple[Float[Array, "*NV"], Float[Array, "*NV"] | float]:
    """Logits of the products `h . w`, and their derivative in the products."""
    products = products if bias is None else products + bias.astype(jnp.float32)
    if options.softcap is None:
        return products / options.temperature, 1 / options.temperature
    capped = jnp.tanh(products / options.softcap)
    logits = capped * (options.softcap / options.temperature)
    if bias is not None:  # a token that is ruled out stays so
        logits = jnp.where(bias == -jnp.inf, -jnp.inf, logits)
    return logits, (1 - capped * capped) / options.temperature


def logit_gradient(
    logits: Float[Array, "n v"],
    normalizer: Float[Array, "n 1"],
    mean: Float[Array, "n 1"] | None,
    to_normalizer: Float[Array, "n 1"],
    to_mean: Float[Array, "n 1"] | None,
) -> Float[Array, "n v"]:
    """What the cotangents of a row's normalizer `L` and mean logit `M` give its logits z: with `p = exp(z - L)` the
    derivative of L is p, that of M is `p * (1 + z - M)`."""
    weights = jnp.exp(logits - normalizer)
    if to_mean is None or mean is None:
        return weights * to_normalizer
    # a logit of minus infinity has no weight, and infinity times 0 is no number
    return jnp.where(weights > 0, weights * (to_normalizer + to_mean * (1 + logits - mean)), 0)


def slice_head(
    head: Float[Array, "*VD"], start: Int[Array, ""] | int, size: int, options: Options
) -> Float[Array, "*vD"]:
    """`size` entries of the vocabulary."""
    return jax.lax.dynamic_slice_in_dim(head, start, size, options.vocab_axis)


def start_of(block: Int[Array, ""], size: int, vocab: int) -> tuple[Int[Array, ""] | int, Int[Array, ""] | int]:
    """Where a block of the vocabulary starts, and how many of its columns an earlier block has already had.

    The last block of a vocabulary that does not divide is moved back, so that every block is whole.
    """
    if vocab == size:
        return 0, 0
    start = jnp.minimum(block * size, vocab - size)
    return start, block * size - start


def varying_like(x: Array, like: Array) -> Array:
    """The same numbers, typed under `shard_map` as differing between devices where `like` does."""
    missing = tuple(jax.typeof(like).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def shape_like(shape: tuple[int, ...], dtype: jnp.dtype, like: Array) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result that differs between devices where `like` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def pad_rows(x: Any, length: int) -> Any:
    """Zeros up to `length` rows; None stays None."""
    if x is None or x.shape[0] == length:
        return x
    return jnp.pad(x, [(0, length - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def join_parts(
    options: Options, normalizers: Float[Array, "P N"], means: Float[Array, "P N"], inside: Bool[Array, "N"]
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Normalizer and mean logit of a row from those of the parts of the vocabulary; any number where not `inside`,
    whatever stands there."""
    normalizers = jnp.where(inside, normalizers, 0)
    normalizer = jax.nn.logsumexp(normalizers, axis=0)
    if not options.with_mean:
        return normalizer, jnp.zeros_like(normalizer)
    share = jnp.exp(normalizers - normalizer)
    return normalizer, jnp.sum(jnp.where(share > 0, share * means, 0), axis=0)
