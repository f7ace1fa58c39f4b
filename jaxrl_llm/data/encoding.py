"""From records to arrays of tokens, with a mask of the tokens that a loss may touch.

Text records: prompt and completion are encoded apart, as a completion is sampled behind an encoded prompt. Records of
messages go through the tokenizer's chat template, with their `tools`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrl_llm.data.columns import Row
from jaxrl_llm.data.records import Records
from jaxrl_llm.models.chat import encode_chat, render_chat
from jaxrl_llm.models.tokenizer import Tokenizer
from jaxrl_llm.types import Span

TooLong = Literal["raise", "drop", "left", "right"]
Marked = tuple[list[int], list[bool]]  # tokens, and which of them count


class Encoded(NamedTuple):
    """Sequences padded with 0 to a common length L, ready for `pack_sequences(*encoded[:3], ...)`.

    Attributes:
      tokens, mask: ids, and which of them the policy is to produce.
      lengths: number of tokens of each sequence.
      rows: index of the record that each sequence comes from; records left out for their length are not among them.
      num_truncated: how many sequences were cut.
    """

    tokens: Int[np.ndarray, "N L"]
    mask: Bool[np.ndarray, "N L"]
    lengths: Int[np.ndarray, "N"]
    rows: Int[np.ndarray, "N"]
    num_truncated: int


def tokenize_prompts(
    records: Records,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    too_long: Literal["raise", "drop", "left"] = "raise",
    begin_id: int | None = None,
) -> Encoded:
    """The `prompt` of each record, messages with the generation prompt behind them; nothing is in the mask.

    Args:
      max_length: L.
      too_long: of a prompt longer than L: raise, drop the record, or cut tokens off at the left.
      begin_id: put before a text, for models that expect it (`tokenizer.bos_id`); a chat template does so itself.

    Raises:
      ValueError: records without prompts, a prompt that is too long, or what `render_chat` raises.
    """
    _check_kind(records, *PROMPT_KINDS)
    begin = [] if begin_id is None else [begin_id]

    def encode(row: Row) -> list[int]:
        if isinstance(row["prompt"], str):
            return begin + tokenizer.encode(row["prompt"])
        return tokenizer.encode(
            render_chat(tokenizer, row["prompt"], tools=row.get("tools"), add_generation_prompt=True)
        )

    return _stack(([(ids, [False] * len(ids))] for ids in map(encode, records)), max_length, too_long, learn=False)


def tokenize_demonstrations(
    records: Records,
    tokenizer: Tokenizer,
    *,
    end_id: int | None,
    max_length: int,
    too_long: TooLong = "raise",
    begin_id: int | None = None,
) -> Encoded:
    """Demonstrations to imitate: records of `language_modeling` or `prompt_completion`.

    The mask holds the whole of a text; of messages, what the assistant produces, in every turn; with a prompt, what
    lies behind the prompt.

    Args:
      end_id: put behind a text or completion so that the model learns to stop, e.g. `tokenizer.eos_ids[0]`; None for
        nothing. Messages end as the chat template says.
      max_length: L.
      too_long: of a sequence longer than L: raise, drop the record, or cut tokens off at the left or right. A record
        of which then nothing is left to learn is dropped.
      begin_id: put before a text, for models that expect it (`tokenizer.bos_id`); a chat template does so itself.

    Raises:
      ValueError: records of another kind, a sequence that is too long, a record with nothing to learn, or what
        `encode_chat` raises.
    """
    _check_kind(records, "language_modeling", "prompt_completion")

    def encode(row: Row) -> Marked:
        if "completion" in row:
            return _completed(row, row["completion"], tokenizer, begin_id, end_id)
        if "messages" in row:
            return encode_chat(tokenizer, row["messages"], tools=row.get("tools"))
        return _text_pair("", row["text"], tokenizer, begin_id, end_id)

    return _stack(([encode(row)] for row in records), max_length, too_long)


def tokenize_preferences(
    records: Records,
    tokenizer: Tokenizer,
    *,
    end_id: int | None,
    max_length: int,
    too_long: TooLong = "raise",
    begin_id: int | None = None,
) -> tuple[Encoded, Encoded]:
    """Chosen and rejected sequences of `preference` records, row by row of the same record; a pair is dropped as a
    whole, and `num_truncated` is that of both. Arguments and errors as in `tokenize_demonstrations`."""
    _check_kind(records, "preference")
    pairs = (
        [_completed(row, row[name], tokenizer, begin_id, end_id) for name in ("chosen", "rejected")] for row in records
    )
    both = _stack(pairs, max_length, too_long)
    cut = both.num_truncated
    chosen, rejected = (
        Encoded(both.tokens[i::2], both.mask[i::2], both.lengths[i::2], both.rows[i::2], cut) for i in (0, 1)
    )
    return chosen, rejected


def tokenize_unpaired(
    records: Records,
    tokenizer: Tokenizer,
    *,
    end_id: int | None,
    max_length: int,
    too_long: TooLong = "raise",
    begin_id: int | None = None,
) -> tuple[Encoded, Bool[np.ndarray, "N"]]:
    """Sequences of `unpaired_preference` records, and whether each is a good one. Arguments and errors as in
    `tokenize_demonstrations`."""
    _check_kind(records, "unpaired_preference")
    sequences = ([_completed(row, row["completion"], tokenizer, begin_id, end_id)] for row in records)
    encoded = _stack(sequences, max_length, too_long)
    return encoded, np.array([records[row]["label"] for row in encoded.rows.tolist()], bool)


def tokenize_listwise(
    records: Records,
    tokenizer: Tokenizer,
    *,
    end_id: int | None,
    max_length: int,
    too_long: TooLong = "raise",
    begin_id: int | None = None,
) -> tuple[Encoded, Float[np.ndarray, "N"]]:
    """All completions of `listwise_preference` records, those of a record side by side (`Encoded.rows` groups them),
    and the score of each. A record is dropped as a whole. Arguments and errors as in `tokenize_demonstrations`."""
    _check_kind(records, "listwise_preference")
    groups = (
        [_completed(row, completion, tokenizer, begin_id, end_id) for completion in row["completions"]]
        for row in records
    )
    encoded = _stack(groups, max_length, too_long)
    kept = dict.fromkeys(encoded.rows.tolist())
    return encoded, np.array([score for row in kept for score in records[row]["scores"]], np.float32)


def tokenize_steps(
    records: Records,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    too_long: TooLong = "raise",
    separator: str = "\n",
    begin_id: int | None = None,
) -> tuple[Encoded, Bool[np.ndarray, "N L"]]:
    """Sequences of `stepwise_supervision` records for a process reward model. Each step is followed by `separator`,
    whose last token is in the mask.

    Returns:
      The sequences, and the labels of the steps at their places in the mask, false elsewhere.

    Raises:
      ValueError: as `tokenize_demonstrations`; or a separator without tokens.
    """
    _check_kind(records, "stepwise_supervision")
    between = tokenizer.encode(separator)
    if not between:
        raise ValueError(f"separator {separator!r} has no tokens; a step needs one that its label stands at")

    def encode(row: Row) -> tuple[Marked, list[bool]]:
        ids, _ = _text_pair(row["prompt"], "", tokenizer, begin_id, None)
        mask, labels = [False] * len(ids), [False] * len(ids)
        for step, good in zip(row["completions"], row["labels"], strict=True):
            added = tokenizer.encode(step) + between
            ids += added
            mask += [False] * (len(added) - 1) + [True]
            labels += [False] * (len(added) - 1) + [good]
        return (ids, mask), labels

    steps = [encode(row) for row in records]
    encoded = _stack(([marked] for marked, _ in steps), max_length, too_long)
    labels = np.zeros(encoded.mask.shape, bool)
    for place, row in enumerate(encoded.rows.tolist()):
        kept = _window(len(steps[row][1]), max_length, too_long)
        labels[place, : encoded.lengths[place]] = steps[row][1][kept]
    return encoded, labels


PROMPT_KINDS = (
    "prompt_only",
    "question_answer",
    "prompt_completion",
    "preference",
    "unpaired_preference",
    "stepwise_supervision",
    "listwise_preference",
)


def _check_kind(records: Records, *kinds: str) -> None:
    if records.kind not in kinds:
        raise ValueError(f"expected records of {' or '.join(kinds)}, got {records.kind}")


def _text_pair(prompt: str, completion: str, tokenizer: Tokenizer, begin: int | None, end: int | None) -> Marked:
    before = ([] if begin is None else [begin]) + tokenizer.encode(prompt)
    after = tokenizer.encode(completion) + ([] if end is None else [end])
    return before + after, [False] * len(before) + [True] * len(after)


def _completed(
    row: Row, completion: str | list[Row], tokenizer: Tokenizer, begin: int | None, end: int | None
) -> Marked:
    """A record's prompt and one completion, which alone is in the mask."""
    prompt: Any = row["prompt"]
    if isinstance(completion, str):
        return _text_pair(prompt, completion, tokenizer, begin, end)
    ids, mask = encode_chat(tokenizer, prompt + completion, tools=row.get("tools"))
    if any(message["role"] == "assistant" for message in prompt):
        earlier = np.sum(encode_chat(tokenizer, prompt, tools=row.get("tools"))[1])
        mask = (np.array(mask) & (np.cumsum(mask) > earlier)).tolist()
    return ids, mask


def encode_spans(spans: Sequence[Span], tokenizer: Tokenizer) -> Marked:
    """A transcript by author, as `envs.transcript_spans` makes it: its tokens, and which are the policy's. Each span is
    encoded by itself, as prompts and observations are while sampling."""
    ids: list[int] = []
    mask: list[bool] = []
    for span in spans:
        part = tokenizer.encode(span.text)
        ids += part
        mask += [span.role == "policy"] * len(part)
    return ids, mask


def _window(length: int, max_length: int, too_long: str) -> slice:
    """Which tokens of a sequence are kept."""
    return slice(max(length - max_length, 0), length) if too_long == "left" else slice(0, max_length)


def _stack(groups: Iterable[Sequence[Marked]], max_length: int, too_long: str, learn: bool = True) -> Encoded:
    """All sequences of all groups, a group per record, that fit or are made to fit; a group is kept or dropped whole.
    With `learn`, each must have a token in its mask behind its first, which nothing predicts."""
    if too_long not in ("raise", "drop", "left", "right"):
        raise ValueError(f"too_long must be 'raise', 'drop', 'left' or 'right', got {too_long!r}")
    kept: list[Marked] = []
    rows: list[int] = []
    num_truncated = 0
    for row, group in enumerate(groups):
        longest = max(len(ids) for ids, _ in group)
        if longest > max_length and too_long == "raise":
            raise ValueError(
                f"record {row} (from 0) has {longest} tokens, max_length is {max_length}; raise max_length, or choose "
                "what becomes of such records by too_long='drop', 'left' or 'right'"
            )
        if learn and not all(any(mask[1:]) for _, mask in group):
            raise ValueError(
                f"record {row} (from 0) has nothing to learn: no token behind its first is in the mask; leave it out, "
                "as by filter_records"
            )
        windows = [_window(len(ids), max_length, too_long) for ids, _ in group]
        cut = [(ids[window], mask[window]) for (ids, mask), window in zip(group, windows, strict=True)]
        if longest > max_length and (too_long == "drop" or learn and not all(any(mask[1:]) for _, mask in cut)):
            continue
        kept += cut
        rows += [row] * len(group)
        num_truncated += sum(len(ids) > max_length for ids, _ in group)
    encoded = Encoded(
        np.zeros((len(kept), max_length), np.int32),
        np.zeros((len(kept), max_length), bool),
        np.array([len(ids) for ids, _ in kept], np.int32),
        np.array(rows, np.int32),
        num_truncated,
    )
    for place, (ids, mask) in enumerate(kept):
        encoded.tokens[place, : len(ids)] = ids
        encoded.mask[place, : len(ids)] = mask
    return encoded
