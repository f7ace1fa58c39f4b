"""Questions of a user's own, from a CSV or JSON Lines file."""

from __future__ import annotations

import os
from pathlib import Path

from jaxrl_llm.data.columns import Row
from jaxrl_llm.data.readers import file_rows
from jaxrl_llm.data.records import BadRow
from jaxrl_llm.data.worlds.geography import Question


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """Reads questions from a `.csv` file with a header, or a `.jsonl` file with one object a line.

    Columns: `question`; `answer` (one) or `answers` (a list of strings; in CSV one string with `|` between them); and,
    if wanted, `hops` (a whole number, 1 if left out). Other columns are ignored; `relation` and `path` stay empty.

    Raises:
      ValueError: no such file, another kind of file, no rows, a missing column, an empty question or answer, or a bad
        value; the message names row (counted from 1, the header not among them) and column.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{path}: questions are read from a .csv or .jsonl file, got {path.suffix or 'no suffix'!r}")
    questions = []
    for number, row in enumerate(file_rows(path), start=1):
        if isinstance(row, BadRow):
            raise ValueError(f"{path}, row {number}: {row}")
        if path.suffix == ".csv" and row.get("answers") is not None:
            row["answers"] = row["answers"].split("|")
        questions.append(_question(row, f"{path}, row {number}"))
    if not questions:
        raise ValueError(f"{path}: there are no questions in it; expected at least one row")
    return questions


def _question(row: Row, where: str) -> Question:
    columns = sorted(key for key in row if isinstance(key, str))
    question = row.get("question")
    if question is None:
        raise ValueError(f"{where}: column 'question' is missing; found columns {columns}")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: column 'question' must be a text that is not empty, got {question!r}")
    column = "answers" if row.get("answers") is not None else "answer"
    answers = row.get(column)
    if answers is None:
        raise ValueError(f"{where}: column 'answer' (or 'answers') is missing; found columns {columns}")
    answers = answers if isinstance(answers, list) else [answers]
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise ValueError(f"{where}: column {column!r} must hold texts that are not empty, got {row[column]!r}")
    hops = row.get("hops")
    try:
        number = 1 if hops in (None, "") else int(hops)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ValueError(f"{where}: column 'hops' must be a whole number from 1 on, got {hops!r}")
    return Question(question.strip(), tuple(answer.strip() for answer in answers), number, "", (), ())
