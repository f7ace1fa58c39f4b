"""Drawing a token from logits: temperature, filters, and the inverse of the CDF at one uniform number a row.

The CDF is summed over blocks of tokens first, then inside the block where it passes the uniform number, so that a draw
needs no random number per token (as Gumbel noise does) and no sorted row. Thresholds of the filters come from
`sampling_search`.

| | a row of logits | looked at in blocks of |
| --- | --- | --- |
| CPU | rows in groups that fit a cache: a core's where a filter searches, else the one the cores share | 128 |
| TPU | read once into VMEM, 8 or 16 rows at a time | up to 2048 |
| GPU | a program per row, read from memory once and then from the L2 cache | up to 4096, on Hopper 2048 |
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from jaxrl_kernels import sampling_hopper, sampling_pallas
from jaxrl_kernels.dispatch import choose
from jaxrl_kernels.sampling_search import CACHED, Filters, by_rows, filtered_logits, row_threshold

BLOCK = 128
SHARED = 2**21  # logits (8 MiB) that the cores of a CPU pass over together where there is nothing to search for
Drawn = tuple[Int[Array, "N"], Float[Array, "N"]]


def filter_logits(
    logits: Float[Array, "N V"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    keep: Int[Array, "N"] | None = None,
) -> Float[Array, "N V"]:
    """Logits over `temperature`, minus infinity where a filter excludes the token. Float32.

    The order is top-k, then top-p among what is left, then min-p relative to the largest probability. Ties at a
    threshold are kept. `keep` names a token per row that is never excluded: a token that was sampled stays in the
    support when it is scored again, although rounding may move it across the threshold.

    Raises:
      ValueError: shapes, types, or options out of range.
    """
    filters = _check(logits, temperature, top_k, top_p, min_p)
    if temperature == 0:
        raise ValueError("temperature must be positive to give logits, got 0; for the largest one take argmax")
    scaled = _scaled(logits, filters)
    filtered = filtered_logits(scaled, filters) if scaled.size else scaled
    if keep is not None:
        filtered = jnp.where(jnp.arange(logits.shape[-1]) == keep[:, None], scaled, filtered)
    return filtered


def sample_tokens(
    logits: Float[Array, "N V"],
    key: Key[Array, ""] | Key[Array, "N"] | UInt32[Array, "K"] | UInt32[Array, "N K"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    greedy: bool = False,
    implementation: str | None = None,
) -> tuple[Int[Array, "N"], Float[Array, "N"]]:
    """Draws a token a row from the distribution of `filter_logits`, renormalized.

    Row i takes one uniform number from its key and the first token at which the CDF, in the order of token ids, exceeds
    it: the same key and logits give the same token, whatever stands in other rows. Computed in float32, so within the
    rounding of a sum two implementations may disagree on a uniform number that falls on the border of two tokens. A
    token of probability zero is never drawn. Not differentiable: no gradient flows to the logits.

    Args:
      logits: [N, V]. Minus infinity bans a token.
      key: one jax.random key, which is split into N, or N keys; typed, or raw as uint32.
      temperature: logits are divided by it. At 0 the distribution is its limit, all of it on the largest logit (the
        first of equal ones).
      top_k: the number of largest logits that are kept, None for all.
      top_p: of those, the smallest set whose probability reaches it is kept.
      min_p: of those, tokens with less than this share of the largest probability are dropped.
      greedy: take the largest logit (the first of equal ones) in place of a draw; the log-prob is still that of the
        distribution that the other options describe. The key is not used.
      implementation: None, "xla", "reference", "pallas_tpu", "pallas_gpu", "mosaic_gpu" (Hopper), or, for tests,
        "interpret_tpu", "interpret_gpu", "interpret_mosaic"; see `dispatch.choose`.

    Returns:
      tokens [N] int32 and logprobs [N] float32 in nats, the log-prob each token was drawn with (0 at temperature 0). A
      row without a distribution, because a logit is NaN or plus infinity or all are minus infinity, gives token -1 and
      log-prob NaN.

    Raises:
      ValueError: shapes, types, options out of range, an implementation that is unknown or cannot run here.
    """
    filters = _check(logits, temperature, top_k, top_p, min_p, greedy)
    keys = _row_keys(key, logits.shape[0])
    if logits.shape[0] == 0:
        return jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.float32)
    uniform = jnp.zeros(logits.shape[0]) if greedy or temperature == 0 else jax.vmap(jax.random.uniform)(keys)
    return draw(jax.lax.stop_gradient(logits), uniform, filters, implementation)


@functools.partial(jax.jit, static_argnames=("filters", "implementation"))
def draw(
    logits: Float[Array, "N V"], uniform: Float[Array, "N"], filters: Filters, implementation: str | None = None
) -> tuple[Int[Array, "N"], Float[Array, "N"]]:
    """`sample_tokens` at given uniform numbers in [0, 1), for checked options."""
    if filters.temperature == 0:
        # A limit that no quotient reaches. Any temperature has the same largest logit and the same rows without one.
        filters = Filters(greedy=True)
        tokens, logprobs = draw(logits, uniform, filters, implementation)
        return tokens, jnp.where(tokens < 0, logprobs, 0)
    versions: dict[str, Any] = {
        "cpu": _xla,
        "tpu": sampling_pallas.on_tpu,
        "gpu": sampling_pallas.on_gpu,
        "reference": _reference,
        "interpret_tpu": functools.partial(sampling_pallas.on_tpu, interpret=True),
        "interpret_gpu": functools.partial(sampling_pallas.on_gpu, interpret=True),
        "hopper": sampling_hopper.on_hopper,
        "interpret_mosaic": functools.partial(sampling_hopper.on_hopper, interpret=True),
    }
    versions = {name: functools.partial(version, filters=filters) for name, version in versions.items()}
    if refusal := sampling_pallas.refusal_of_tpu(logits):
        versions.update(tpu=refusal, interpret_tpu=refusal)
    return choose(implementation, **versions)(logits, uniform)


def _check(logits: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any, greedy: bool = False) -> Filters:
    """The options, without those that keep everything."""
    if logits.ndim != 2 or logits.shape[1] == 0 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            f"logits must be floating point of shape [N, V], V at least 1, got {logits.dtype} {list(logits.shape)}"
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or positive and finite, got {temperature}; 0 takes the largest logit")
    if top_k is not None and (int(top_k) != top_k or top_k < 1):
        raise ValueError(f"top_k must be a whole number of at least 1, or None to keep all, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}; 1 keeps all")
    if not 0 <= min_p < 1:
        raise ValueError(f"min_p must lie in [0, 1), got {min_p}; 0 keeps all")
    top_k = None if top_k is None or top_k >= logits.shape[1] else int(top_k)
    return Filters(float(temperature), top_k, float(top_p), float(min_p), greedy)


def _row_keys(key: Any, num_rows: int) -> Any:
    """A key per row."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed:
        words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
        if key.dtype != jnp.uint32 or key.shape[-1:] != words:
            raise ValueError(
                f"key must be a jax.random key, or raw as uint32 with a last axis of {words[0]}, got {key.dtype} "
                f"{list(key.shape)}"
            )
    shape = key.shape if typed else key.shape[:-1]
    if shape == ():
        return jax.random.split(key, num_rows)
    if shape != (num_rows,):
        raise ValueError(f"key must be one key or a key for each of the {num_rows} rows, got keys of shape {shape}")
    return key


def _scaled(logits: Float[Array, "N V"], filters: Filters) -> Float[Array, "N V"]:
    return logits.astype(jnp.float32) / filters.temperature


def _settle(tokens: Int[Array, "N"], logprobs: Float[Array, "N"], valid: Bool[Array, "N"]) -> Drawn:
    """The outcome, unless the row has no distribution."""
    return jnp.where(valid, tokens, -1).astype(jnp.int32), jnp.where(valid, logprobs, jnp.nan)


def _reference(logits: Float[Array, "N V"], uniform: Float[Array, "N"], *, filters: Filters) -> Drawn:
    """The definition: sorted rows, and the CDF of a whole row."""
    scaled = filtered = _scaled(logits, filters)
    if filters.top_k is not None:
        filtered = jnp.where(filtered >= jnp.sort(filtered, axis=-1)[:, -filters.top_k, None], filtered, -jnp.inf)
    if filters.top_p < 1:
        descending = jnp.sort(filtered, axis=-1, descending=True)
        probs = jax.nn.softmax(descending, axis=-1)
        # the smallest set that reaches top_p: every token whose predecessors hold less than top_p
        needed = jnp.cumsum(probs, axis=-1) - probs < filters.top_p
        last = jnp.min(jnp.where(needed, descending, jnp.inf), axis=-1, keepdims=True)
        filtered = jnp.where(filtered >= last, filtered, -jnp.inf)
    probs = jax.nn.softmax(filtered, axis=-1)
    if filters.min_p > 0:
        probs = jnp.where(probs >= filters.min_p * jnp.max(probs, axis=-1, keepdims=True), probs, 0)
    ends = jnp.cumsum(probs, axis=-1)
    total = ends[:, -1:]
    token = jnp.argmax(scaled, axis=-1) if filters.greedy else _first_above(ends, uniform[:, None] * total, probs > 0)
    logprob = jnp.log(jnp.take_along_axis(probs, token[:, None], axis=1) / total)
    return _settle(token, logprob[:, 0], jnp.all(scaled < jnp.inf, axis=-1) & jnp.any(scaled > -jnp.inf, axis=-1))


def _xla(logits: Float[Array, "N V"], uniform: Float[Array, "N"], *, filters: Filters) -> Drawn:
    """A search passes over a row so often that few are taken at a time; without one, a pass is worth all cores."""
    rows = max(1, (CACHED if filters.search else SHARED) // logits.shape[1])
    return by_rows(functools.partial(_xla_rows, filters=filters), rows)(logits, uniform)


def _xla_rows(logits: Float[Array, "N V"], uniform: Float[Array, "N"], *, filters: Filters) -> Drawn:
    num_rows, vocab = logits.shape
    scaled = _scaled(logits, filters)
    peak = jnp.max(scaled, axis=-1, keepdims=True)
    if filters.search or filters.min_p > 0:
        scaled = jnp.where(scaled < row_threshold(scaled, filters), -jnp.inf, scaled)
    weights = jnp.exp(scaled - peak)
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % BLOCK))).reshape(num_rows, -1, BLOCK)
    block_sums = jnp.sum(blocks, axis=-1)
    block_ends = jnp.cumsum(block_sums, axis=-1)
    total = block_ends[:, -1:]
    # A logit that is NaN is never filtered out, and infinity minus infinity is NaN, as the total then is. (The maximum
    # tells nothing: XLA's on a CPU may or may not pass NaN on.)
    valid = total[:, 0] < jnp.inf
    if filters.greedy:
        return _settle(jnp.argmax(scaled, axis=-1), -jnp.log(total[:, 0]), valid)
    target = uniform[:, None] * total
    block = _first_above(block_ends, target, block_sums > 0)
    chosen = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    before = jnp.take_along_axis(block_ends - block_sums, block[:, None], axis=1)
    token = block * BLOCK + _first_above(before + jnp.cumsum(chosen, axis=-1), target, chosen > 0)
    logprob = jnp.take_along_axis(scaled, token[:, None], axis=1) - peak - jnp.log(total)
    return _settle(token, logprob[:, 0], valid)


def _first_above(ends: Float[Array, "N M"], target: Float[Array, "N 1"], possible) -> Int[Array, "N"]:
    """First possible entry whose cumulative weight exceeds the target; the last possible one if rounding leaves
    none."""
    above = (ends > target) & possible
    last = ends.shape[-1] - 1 - jnp.argmax(possible[:, ::-1], axis=-1)
    return jnp.where(jnp.any(above, axis=-1), jnp.argmax(above, axis=-1), last).astype(jnp.int32)
