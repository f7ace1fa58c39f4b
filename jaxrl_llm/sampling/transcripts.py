"""Finished rollouts as text that says who wrote what."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import ArrayLike

from jaxrl_llm.files import write_atomically
from jaxrl_llm.models.tokenizer import Tokenizer
from jaxrl_llm.types import Rollout, Span


def rollout_spans(sampled: Rollout, row: int, tokenizer: Tokenizer) -> list[Span]:
    """The prompt, the policy's turns and the observations of one sequence, in order. Decoded span by span, for looking
    at and for rewards of text; training never encodes it again."""
    length = int(sampled.lengths[row])
    tokens, mask, turns = (np.asarray(x[row])[:length] for x in (sampled.tokens, sampled.mask, sampled.turn_ids))
    return token_spans(tokens, mask, turns, int(sampled.prompt_lengths[row]), tokenizer)


def token_spans(
    tokens: Int[np.ndarray, "T"],
    mask: Bool[np.ndarray, "T"],
    turn_ids: Int[np.ndarray, "T"],
    prompt_length: int,
    tokenizer: Tokenizer,
) -> list[Span]:
    """The spans of the tokens of one sequence, which ends with them."""
    spans = [Span("prompt", tokenizer.decode(tokens[:prompt_length]))]
    start = prompt_length
    for end in range(prompt_length + 1, len(tokens) + 1):
        if end == len(tokens) or mask[end] != mask[start] or turn_ids[end] != turn_ids[start]:
            spans.append(Span("policy" if mask[start] else "observation", tokenizer.decode(tokens[start:end])))
            start = end
    return spans


def transcripts(sampled: Rollout, tokenizer: Tokenizer, **columns: ArrayLike) -> Iterator[dict[str, Any]]:
    """One JSON-ready dict per sequence: `reward`, `truncated`, `spans` (role and text), and a value of each of
    `columns`."""
    sampled = jax.device_get(sampled)
    for row in range(len(sampled.lengths)):
        spans = [span._asdict() for span in rollout_spans(sampled, row, tokenizer)]
        extra = {name: np.asarray(column)[row].item() for name, column in columns.items()}
        yield {
            "reward": float(sampled.rewards[row]) if sampled.scorable[row] else None,
            "truncated": bool(sampled.truncated[row]),
            **extra,
            "spans": spans,
        }


def write_transcripts(path: str | Path, sampled: Rollout, tokenizer: Tokenizer, **columns: ArrayLike) -> None:
    """Writes `transcripts` as JSON lines, in one go."""
    lines = [json.dumps(line, ensure_ascii=False) for line in transcripts(sampled, tokenizer, **columns)]
    write_atomically(path, "\n".join(lines) + "\n")
