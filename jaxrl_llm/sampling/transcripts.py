"""Finished rollouts as text that says who wrote what."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from jaxrl_llm.models.tokenizer import Tokenizer
from jaxrl_llm.types import Rollout, Span


def rollout_spans(sampled: Rollout, row: int, tokenizer: Tokenizer) -> list[Span]:
    """The prompt, the policy's turns and the observations of one sequence, in order. Decoded span by span, for looking
    at and for rewards of text; training never encodes it again."""
    length, prompt_length = int(sampled.lengths[row]), int(sampled.prompt_lengths[row])
    tokens, mask = np.asarray(sampled.tokens[row][:length]), np.asarray(sampled.mask[row][:length])
    turns = np.asarray(sampled.turn_ids[row][:length])
    spans = [Span("prompt", tokenizer.decode(tokens[:prompt_length]))]
    start = prompt_length
    for end in range(prompt_length + 1, length + 1):
        if end == length or mask[end] != mask[start] or turns[end] != turns[start]:
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
    """Writes `transcripts` as JSON lines."""
    lines = [json.dumps(line, ensure_ascii=False) for line in transcripts(sampled, tokenizer, **columns)]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
