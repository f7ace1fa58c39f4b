"""Rotary positions, and how families stretch them over longer contexts than they were first trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
LAYER_TYPES = ("full_attention", "sliding_attention")


class Rope(NamedTuple):
    """How fast the pairs of dimensions of a head turn with the position.

    Every kind of stretching divides the frequencies `theta ** (-i / pairs)` by numbers that are known beforehand.

    Attributes:
      theta: base of the frequencies.
      divisors: of the frequencies, one for each pair; empty: all 1.
      long_divisors: those that LongRoPE wants beyond the context it was first trained on; empty: as `divisors`.
      scale: factor on rotated queries and keys (YaRN, LongRoPE).
      rotary_dim: how many leading dimensions of a head turn; None: all.
    """

    theta: float = 10_000.0
    divisors: tuple[float, ...] = ()
    long_divisors: tuple[float, ...] = ()
    scale: float = 1.0
    rotary_dim: int | None = None


def rotate(x: Float[Array, "B T H D"], positions: Int[Array, "B T"], rope: Rope) -> Float[Array, "B T H D"]:
    """Rotary position embedding on the two halves of the last axis (Su et al. 2021), angles in float32.

    Dimensions behind `rope.rotary_dim` stay as they are.
    """
    if rope.rotary_dim is not None and rope.rotary_dim < x.shape[-1]:
        turned = rotate(x[..., : rope.rotary_dim], positions, rope)
        return jnp.concatenate([turned, x[..., rope.rotary_dim :]], -1)
    half = x.shape[-1] // 2
    frequencies = rope.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if rope.divisors:
        frequencies = frequencies / jnp.asarray(rope.divisors, jnp.float32)
    angles = positions[..., None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.scale != 1.0:
        cos, sin = rope.scale * cos, rope.scale * sin
    left, right = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)


def read_rope(hf: Mapping[str, Any], head_dim: int, layer_type: str = "full_attention") -> Rope:
    """Rotary positions from a config.json, old (`rope_theta`, `rope_scaling`) or new (`rope_parameters`).

    `layer_type` picks among the settings where there are some for each type of layer.

    Raises:
      ValueError: the type is not supported, or one of its numbers is missing.
    """
    settings = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if any(name in settings for name in LAYER_TYPES):
        settings = settings.get(layer_type) or {}
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"config.json: rope type {kind!r} is not supported; supported are {list(ROPE_TYPES)}")
    theta = settings.get("rope_theta") or hf["rope_theta"]
    dim = int(head_dim * (settings.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0))
    rope = Rope(theta, rotary_dim=None if dim == head_dim else dim)
    if kind == "default":
        return rope
    reached = hf.get("max_position_embeddings")
    original = hf.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings", reached)
    factor = settings.get("factor")
    if factor is None and kind in ("yarn", "longrope") and original:
        factor = (reached or original) / original
    try:
        if factor is None:
            raise KeyError("factor")
        if kind == "linear":
            return rope._replace(divisors=(float(factor),) * (dim // 2))
        if original is None:
            raise KeyError("original_max_position_embeddings")
        if kind == "llama3":
            low, high = settings["low_freq_factor"], settings["high_freq_factor"]
            divisors = llama3_divisors(
                dim, theta, factor=factor, low_frequency=low, high_frequency=high, original_length=original
            )
            return rope._replace(divisors=divisors)
        if kind == "yarn":
            return _yarn(rope, dim, factor, original, settings)
        scale = settings.get("attention_factor")
        return rope._replace(
            divisors=tuple(map(float, settings["short_factor"])),
            long_divisors=tuple(map(float, settings["long_factor"])),
            scale=longrope_scale(factor, original) if scale is None else scale,
        )
    except KeyError as error:
        raise ValueError(f"config.json: rope type {kind!r} needs {error}, which is not among {settings}") from None


def _yarn(rope: Rope, dim: int, factor: float, original: int, settings: Mapping[str, Any]) -> Rope:
    divisors = yarn_divisors(
        dim,
        rope.theta,
        factor=factor,
        original_length=original,
        beta_fast=settings.get("beta_fast") or 32.0,
        beta_slow=settings.get("beta_slow") or 1.0,
        truncate=settings.get("truncate", True),
    )
    scale = settings.get("attention_factor")
    if scale is None:
        numerator, denominator = settings.get("mscale"), settings.get("mscale_all_dim")
        scale = yarn_scale(factor)
        if numerator and denominator:
            scale = yarn_scale(factor, numerator) / yarn_scale(factor, denominator)
    return rope._replace(divisors=divisors, scale=scale)


def llama3_divisors(
    dim: int, theta: float, *, factor: float, low_frequency: float, high_frequency: float, original_length: int
) -> tuple[float, ...]:
    """Divisors of Llama 3.1 (Grattafiori et al. 2024), one for each of the `dim / 2` pairs.

    A pair that turns at least `high_frequency` times within `original_length` tokens keeps its frequency, one that
    turns less than `low_frequency` times has it divided by `factor`, and in between the frequency is interpolated.
    """
    turns = original_length * _frequencies(dim, theta) / (2 * math.pi)
    return _blend(factor, np.clip((turns - low_frequency) / (high_frequency - low_frequency), 0, 1))


def yarn_divisors(
    dim: int,
    theta: float,
    *,
    factor: float,
    original_length: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> tuple[float, ...]:
    """Divisors of YaRN (Peng et al. 2023), one for each of the `dim / 2` pairs.

    Pairs that turn more than `beta_fast` times within `original_length` tokens keep their frequency, those that turn
    less than `beta_slow` times have it divided by `factor`; between the two (rounded outward to whole pairs with
    `truncate`) the frequency is interpolated by the pair's number.
    """

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original_length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2) - low) / max(high - low, 0.001)
    return _blend(factor, 1 - np.clip(ramp, 0, 1))


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """Factor on queries and keys that YaRN recommends: `1 + 0.1 * mscale * ln(factor)`, 1 without stretching."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def longrope_scale(factor: float, original_length: int) -> float:
    """Factor on queries and keys of LongRoPE (Ding et al. 2024): `sqrt(1 + ln(factor) / ln(original_length))`."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_length))


def _frequencies(dim: int, theta: float) -> Float[np.ndarray, "pairs"]:
    return theta ** (-np.arange(0, dim, 2) / dim)


def _blend(factor: float, kept: Float[np.ndarray, "pairs"]) -> tuple[float, ...]:
    """Divisors that leave a share `kept` of a frequency as it is and divide the rest by `factor`."""
    return tuple((1 / ((1 - kept) / factor + kept)).tolist())
