"""Chunks of chains of tokens: rules that a base model knows, new rules, and noise.

Each token has two that may follow it by the known rules and two by the new ones. A chunk has a share of new transitions
and a share of noise (any token), so its perplexity under a model of the known rules says what it holds.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

TOKENS = 24
KNOWN, NEW, NOISE = range(3)  # kinds of chunks in a pool


def make_chunks(
    rng: np.random.Generator, new: Float[np.ndarray, "N"], noise: Float[np.ndarray, "N"], *, length: int = 16
) -> Int[np.ndarray, "N length"]:
    """Random chunks of those shares.

    Raises:
      ValueError: a share outside [0, 1], or `length` below 2.
    """
    if length < 2 or min(new.min(), noise.min()) < 0 or max(new.max(), noise.max()) > 1:
        raise ValueError(f"shares must lie in [0, 1] and length={length} be at least 2")
    rules = np.random.default_rng(0)  # the same rules everywhere
    followers = np.stack([rules.permutation(TOKENS) for _ in range(4)], axis=1).reshape(TOKENS, 2, 2)
    tokens = rng.integers(TOKENS, size=(len(new), length)).astype(np.int32)
    for place in range(1, length):
        kind = (rng.random(len(new)) < new).astype(int)
        follower = followers[tokens[:, place - 1], kind, rng.integers(2, size=len(new))]
        tokens[:, place] = np.where(rng.random(len(new)) < noise, tokens[:, place], follower)
    return tokens


def make_pool(rng: np.random.Generator, number: int, *, length: int = 16) -> dict[str, np.ndarray]:
    """Chunks of a new domain as they are found: `tokens` int32[number, length] and `kind` int32[number]. A third each
    is known, new rules (a share of 0.2 to 0.8), both with up to 0.2 of noise, and noise (from 0.5 on)."""
    kind = rng.integers(3, size=number).astype(np.int32)
    new = np.where(kind == NEW, rng.uniform(0.2, 0.8, number), 0.0)
    noise = np.where(kind == NOISE, rng.uniform(0.5, 1.0, number), rng.uniform(0.0, 0.2, number))
    return {"tokens": make_chunks(rng, new, noise, length=length), "kind": kind}


def demonstrate_known(rng: np.random.Generator, number: int, *, length: int = 16) -> dict[str, np.ndarray]:
    """What a base model is trained on: chunks by the known rules with a tenth of noise: `tokens`, `mask` (all but the
    first token), `lengths`."""
    tokens = make_chunks(rng, np.zeros(number), np.full(number, 0.1), length=length)
    mask = np.broadcast_to(np.arange(length) > 0, tokens.shape).copy()
    return {"tokens": tokens, "mask": mask, "lengths": np.full(number, length, np.int32)}
