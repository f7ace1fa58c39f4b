"""Records: rows of a data set, as plain dicts of one shape per kind.

| kind | columns of a row that is read | a record |
| --- | --- | --- |
| `language_modeling` | `text`, or `messages` | the same |
| `prompt_only` | `prompt` | the same |
| `prompt_completion` | `prompt`, `completion` | the same |
| `preference` | `prompt` (may be left out), `chosen`, `rejected` | `prompt`, `chosen`, `rejected` |
| `unpaired_preference` | `prompt`, `completion`, `label` | the same |
| `stepwise_supervision` | `prompt`, `completions`, `labels` (one per step) | the same |
| `listwise_preference` | `prompt`, `completions`, `scores` or `ranking` | `prompt`, `completions`, `scores` |
| `question_answer` | `prompt` or `question`, `answers` or `answer` | `prompt`, `answers` |
| `retrieval` | `query`, `positive`, `negatives` or `negative` or neither | `query`, `positive`, `negatives` |
| `retrieval` by id | `query`, `positive_id`, `negative_ids` or not | `query`, `positive_id`, `negative_ids` |
| `corpus` | `id` or `_id`, `text`, `title` or not | `id`, `title`, `text` |

The first six are the formats of TRL (huggingface.co/docs/trl/dataset_formats). `prompt`, `completion`, `chosen` and
`rejected` are all texts, or all lists of messages (`role`, `content`, and `tool_calls` if there are any); a row of
messages may have `tools`, a list of JSON schemas or the JSON text of one. `ranking` holds the indices of the
completions from best to worst, as in `ops.plackett_luce_loss`; a completion's score is then the number of completions
behind it. Ids become texts. Further columns are kept as they are.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

from jaxrl_llm.data.columns import (
    ANY_TEXT,
    COMPLETIONS,
    ID,
    IDS,
    LABEL,
    LABELS,
    MESSAGES,
    RANKING,
    SCORES,
    TEXT,
    TEXT_OR_MESSAGES,
    TEXTS,
    TOOLS,
    Column,
    Row,
)


class BadRow(ValueError):
    """A row is not what its kind asks for.

    Attributes:
      reason: what is wrong, in words that are the same for every row with this fault.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason + detail)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Records(Sequence[Row]):
    """Rows of one kind, and what was left out on the way to them.

    Attributes:
      kind: a key of `KINDS`.
      rows: the records, each a dict of the kind's canonical shape.
      skipped: number of rows left out, by reason.
    """

    kind: str
    rows: Sequence[Row]
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self.rows[index]

    def select(self, indices: Iterable[int], reason: str | None = None) -> Records:
        """The rows at `indices`, in that order. With a `reason`, the difference in number is counted as left out."""
        rows = [self.rows[index] for index in indices]
        left_out = {reason: self.skipped.get(reason, 0) + len(self) - len(rows)} if reason is not None else {}
        return Records(self.kind, rows, {**self.skipped, **left_out})


class Kind(NamedTuple):
    """What a row must have, and how it becomes a record."""

    columns: Mapping[str, Column]
    required: tuple[tuple[str, ...], ...]  # one column of each group must be there; of several the first is taken
    finish: Callable[[Row], Row] = dict  # checks between columns, and the canonical shape


def record(
    row: Mapping[str, Any], kind: str, *, columns: Mapping[str, str | None] | None = None, cells: bool = False
) -> Row:
    """The record that a `row` holds.

    Args:
      row: values by column; None stands for a value that is not there.
      kind: a key of `KINDS`.
      columns: the row's name of a column by its name in `KINDS`, where they differ; None: not to be read.
      cells: the values are cells of a CSV file, an empty one stands for a value that is not there. Lists are JSON,
        lists of texts may have `|` between them instead, and a prompt or completion is always text.

    Raises:
      BadRow: a column is missing, a value is empty or of a wrong type, or two columns do not fit together.
      ValueError: no such kind, or `columns` names one that the kind does not have.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r} of records; choose one of {', '.join(KINDS)}")
    known, columns = KINDS[kind], columns or {}
    if unknown := sorted(columns.keys() - known.columns.keys()):
        raise ValueError(
            f"columns={dict(columns)!r} names {unknown[0]!r}, which {kind} does not have; "
            f"its columns are {', '.join(known.columns)}"
        )
    names = {name: columns.get(name, name) for name in known.columns}
    absent = (None, "") if cells else (None,)
    values = {name: row[own] for name, own in names.items() if own is not None and row.get(own) not in absent}
    others = {name: value for name, value in row.items() if name not in names and name not in names.values()}
    for group in known.required:
        found = [name for name in group if name in values]
        if not found:
            own = [repr(names[name]) for name in group if names[name] is not None]
            wanted = own[0] + (f" (or {', '.join(own[1:])})" if own[1:] else "")
            raise BadRow(f"column {wanted} is missing or empty", f"; found columns {sorted(map(str, row))}")
        others |= {name: values.pop(name) for name in found[1:]}
    for name, value in values.items():
        column = known.columns[name]
        try:
            values[name] = column.check(column.parse(value) if cells and isinstance(value, str) else value)
        except ValueError as error:
            raise BadRow(f"column {names[name]!r} must be {column.expected}", f", {error}") from None
    return others | known.finish(values)


def lookup_passages(triples: Records, corpus: Records) -> Records:
    """Retrieval records by id as records of texts: a passage is its title, where it has one, a line break, its text.

    Raises:
      ValueError: records of another kind, ids that two passages share, or an id that the corpus does not have.
    """
    if (triples.kind, corpus.kind) != ("retrieval", "corpus"):
        raise ValueError(f"expected records of retrieval and of corpus, got {triples.kind} and {corpus.kind}")
    passages = {row["id"]: f"{row['title']}\n{row['text']}" if row["title"] else row["text"] for row in corpus}
    if len(passages) < len(corpus):
        repeated = next(id for id, count in Counter(row["id"] for row in corpus).items() if count > 1)
        raise ValueError(f"{len(corpus) - len(passages)} passages have the id of another one, such as {repeated!r}")
    rows = []
    for number, row in enumerate(triples):
        if "positive_id" not in row:
            raise ValueError(f"record {number} (from 0) holds texts already; its columns are {sorted(row)}")
        ids = [row["positive_id"], *row["negative_ids"]]
        if unknown := [id for id in ids if id not in passages]:
            raise ValueError(f"record {number} (from 0) names {unknown[0]!r}, which is no id of the corpus")
        positive, *negatives = (passages[id] for id in ids)
        others = {name: value for name, value in row.items() if name not in ("positive_id", "negative_ids")}
        rows.append({**others, "positive": positive, "negatives": negatives})
    return Records("retrieval", rows, triples.skipped)


def _one_form(row: Row, *names: str) -> Row:
    """Checks that all of a row is text or all of it messages, and that an assistant begins each completion."""
    forms = {name: "text" if isinstance(row[name], str) else "messages" for name in names}
    if len(set(forms.values())) > 1:
        raise BadRow(
            f"columns {', '.join(map(repr, names))} must all be texts or all be messages",
            f", got {forms}; leave a column out with columns={{{names[0]!r}: None}} where that is meant",
        )
    for name in names[1:]:
        _assistant_begins(name, row[name])
    return row


def _assistant_begins(name: str, completion: str | list[Row]) -> None:
    if not isinstance(completion, str) and completion[0]["role"] != "assistant":
        raise BadRow(
            f"column {name!r} must begin with a message of the assistant",
            f", got role {completion[0]['role']!r}; where it repeats the prompt, leave the column 'prompt' out with "
            "columns={'prompt': None}",
        )


def _preference(row: Row) -> Row:
    if "prompt" not in row:
        chosen, rejected = row["chosen"], row["rejected"]
        if isinstance(chosen, str) != isinstance(rejected, str):
            return _one_form(row, "chosen", "rejected")
        length = (_shared_words if isinstance(chosen, str) else _shared_messages)(chosen, rejected)
        if chosen == rejected or not length:
            raise BadRow(
                "columns 'chosen' and 'rejected' must begin alike and end differently, where there is no 'prompt'",
                f", got {chosen!r:.60} and {rejected!r:.60}",
            )
        row |= {"prompt": chosen[:length], "chosen": chosen[length:], "rejected": rejected[length:]}
    return _one_form(row, "prompt", "chosen", "rejected")


def _shared_words(first: str, second: str) -> int:
    """Number of characters that two texts share at their beginning, in whole words; the space before what differs
    belongs to what differs, so that tokens which carry their space stay whole."""
    shared = _shared(first, second)
    if first[shared : shared + 1].isspace() and second[shared : shared + 1].isspace():
        return shared
    return max((i for i in range(shared) if first[i].isspace()), default=0)


def _shared_messages(first: list[Row], second: list[Row]) -> int:
    """Number of messages that two chats share at their beginning; each keeps one at least behind them."""
    return min(_shared(first, second), len(first) - 1, len(second) - 1)


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))


def _steps(row: Row) -> Row:
    _one_length(row, "completions", "labels")
    return row


def _one_length(row: Row, first: str, second: str) -> None:
    if len(row[first]) != len(row[second]):
        raise BadRow(
            f"columns {first!r} and {second!r} must be of one length", f", got {len(row[first])} and {len(row[second])}"
        )


def _listwise(row: Row) -> Row:
    if "ranking" in row:
        ranking = row.pop("ranking")
        if sorted(ranking) != list(range(len(row["completions"]))):
            raise BadRow(
                "column 'ranking' must hold each index of 'completions' once, counted from 0",
                f", got {ranking} for {len(row['completions'])} completions",
            )
        places = {index: place for place, index in enumerate(ranking)}
        row["scores"] = [float(len(ranking) - 1 - places[index]) for index in range(len(ranking))]
    _one_length(row, "completions", "scores")
    for completion in row["completions"]:
        if isinstance(completion, str) != isinstance(row["prompt"], str):
            raise BadRow("columns 'prompt' and 'completions' must all be texts or all be messages")
        _assistant_begins("completions", completion)
    return row


def _question_answer(row: Row) -> Row:
    if "question" in row:
        row["prompt"] = row.pop("question")
    if "answer" in row:
        row["answers"] = [row.pop("answer")]
    return row


def _retrieval(row: Row) -> Row:
    if "negative" in row:
        row["negatives"] = [row.pop("negative")] + row.get("negatives", [])
    by_id = "positive_id" in row
    wrong = "negatives" if by_id else "negative_ids"
    if wrong in row:
        raise BadRow(
            "positive and negatives must both be texts or both be ids", f", got {sorted(row.keys() - {'query'})}"
        )
    row.setdefault("negative_ids" if by_id else "negatives", [])
    return row


def _passage(row: Row) -> Row:
    if "_id" in row:
        row["id"] = row.pop("_id")
    return {"id": row["id"], "title": row.get("title", ""), "text": row["text"]}


KINDS: dict[str, Kind] = {
    "language_modeling": Kind({"text": TEXT, "messages": MESSAGES, "tools": TOOLS}, (("text", "messages"),)),
    "prompt_only": Kind({"prompt": TEXT_OR_MESSAGES, "tools": TOOLS}, (("prompt",),)),
    "prompt_completion": Kind(
        {"prompt": TEXT_OR_MESSAGES, "completion": TEXT_OR_MESSAGES, "tools": TOOLS},
        (("prompt",), ("completion",)),
        lambda row: _one_form(row, "prompt", "completion"),
    ),
    "preference": Kind(
        {"prompt": TEXT_OR_MESSAGES, "chosen": TEXT_OR_MESSAGES, "rejected": TEXT_OR_MESSAGES, "tools": TOOLS},
        (("chosen",), ("rejected",)),
        _preference,
    ),
    "unpaired_preference": Kind(
        {"prompt": TEXT_OR_MESSAGES, "completion": TEXT_OR_MESSAGES, "label": LABEL, "tools": TOOLS},
        (("prompt",), ("completion",), ("label",)),
        lambda row: _one_form(row, "prompt", "completion"),
    ),
    "stepwise_supervision": Kind(
        {"prompt": TEXT, "completions": TEXTS, "labels": LABELS}, (("prompt",), ("completions",), ("labels",)), _steps
    ),
    "listwise_preference": Kind(
        {
            "prompt": TEXT_OR_MESSAGES,
            "completions": COMPLETIONS,
            "scores": SCORES,
            "ranking": RANKING,
            "tools": TOOLS,
        },
        (("prompt",), ("completions",), ("scores", "ranking")),
        _listwise,
    ),
    "question_answer": Kind(
        {"prompt": TEXT_OR_MESSAGES, "question": TEXT_OR_MESSAGES, "answers": TEXTS, "answer": TEXT, "tools": TOOLS},
        (("prompt", "question"), ("answers", "answer")),
        _question_answer,
    ),
    "retrieval": Kind(
        {
            "query": TEXT,
            "positive": TEXT,
            "positive_id": ID,
            "negatives": TEXTS,
            "negative": TEXT,
            "negative_ids": IDS,
        },
        (("query",), ("positive", "positive_id")),
        _retrieval,
    ),
    "corpus": Kind({"id": ID, "_id": ID, "title": ANY_TEXT, "text": TEXT}, (("id", "_id"), ("text",)), _passage),
}
