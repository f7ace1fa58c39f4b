"""Episodes longer than a context: when a summary is due, what the next context is, and the pieces of an episode.

The policy is told to summarize once its context is nearly full, and goes on from the prompt and the summary alone. Each
piece is an ordinary sequence that fits the window; the contexts between are deterministic, so that the log-prob of an
episode is the sum of its pieces' (Scaling LLM Multi-turn RL with End-to-end Summarization-based Context Management,
2025, arXiv 2510.06727).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeVar

from jaxtyping import Array, Bool, Int

from jaxrl_llm.sampling.score import as_rollout

Length = TypeVar("Length", int, Int[Array, "..."])


class Event(NamedTuple):
    """What one author wrote: the policy its turns and summaries, the environment the observations."""

    role: Literal["policy", "summary", "observation"]
    tokens: Sequence[int]


class Piece(NamedTuple):
    """One context of an episode: its tokens, which of them the policy wrote, and whether it ends with a summary."""

    tokens: list[int]
    mask: list[bool]
    is_summary: bool


def should_summarize(context_len: Length, *, window: int, reserve: int) -> bool | Bool[Array, "..."]:
    """Whether fewer than `reserve` tokens of the window are left: `context_len + reserve > window`.

    `reserve` has room for what comes before the next look at this, and for the summary with its instruction.
    """
    return context_len + reserve > window


def reset_context(
    prompt_tokens: Int[Array, "B L"],
    prompt_lengths: Int[Array, "B"],
    summary_tokens: Int[Array, "B M"],
    summary_lengths: Int[Array, "B"],
) -> tuple[Int[Array, "B L+M"], Int[Array, "B"]]:
    """The next context, the prompt and behind it the summary, and its length. All are padded on the right."""
    joined = as_rollout(prompt_tokens, prompt_lengths, summary_tokens, summary_lengths)
    return joined.tokens, joined.lengths


def split_on_summary(
    prompt: Sequence[int], events: Iterable[Event], *, window: int, reserve: int, max_summaries: int
) -> list[Piece]:
    """The pieces of an episode that is known as a whole, at most `max_summaries + 1`.

    What comes behind the summary of the last piece that there may be is left out: such an episode is not finished.

    Raises:
      ValueError: a window without room for the prompt and the reserve, or a piece that does not fit into it.
    """
    if window <= len(prompt) + reserve:
        raise ValueError(
            f"window={window} must be larger than the prompt of {len(prompt)} tokens and reserve={reserve} together"
        )
    pieces = [Piece(list(prompt), [False] * len(prompt), False)]
    summary: Sequence[int] = ()
    for role, tokens in events:
        if pieces[-1].is_summary:
            if len(pieces) > max_summaries:
                break
            context = [*prompt, *summary]
            pieces.append(Piece(context, [False] * len(context), False))
        piece = pieces[-1]
        mask = [*piece.mask, *[role != "observation"] * len(tokens)]
        pieces[-1] = Piece([*piece.tokens, *tokens], mask, role == "summary")
        summary = tokens
        if len(mask) > window:
            raise ValueError(
                f"piece {len(pieces) - 1} has {len(mask)} tokens, more than window={window}: summarize earlier"
            )
    return pieces
