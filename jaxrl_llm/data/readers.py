"""Data sets from files and from the Hugging Face hub, row by row.

Parquet and Arrow files and hub ids are read through `datasets`. Text files are read here, each value as it stands:
`datasets` 5.2 infers types, so that `{"answer": "1"}` becomes a number where another row has one, and a CSV cell `007`
becomes 7.0, `NA` nothing; and it knows no row numbers for what is wrong.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxrl_llm.data.columns import Row
from jaxrl_llm.data.records import BadRow, Records, record

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
BOOKKEEPING = ("dataset_info.json", "dataset_dict.json", "state.json")  # of a folder that `datasets` has written


def read_records(
    source: str | os.PathLike[str],
    kind: str,
    *,
    split: str | None = None,
    config: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    convert: Callable[[Row], Row] | None = None,
    on_bad: Literal["raise", "skip"] = "raise",
) -> Records:
    """Reads all records of a data set into memory.

    Args:
      source: a file (`.jsonl`, `.json` with a list of objects, `.csv` with a header, `.parquet`, `.arrow`), a folder
        or a glob of files of one of these types, or a hub id such as `openai/gsm8k`.
      kind: a key of `KINDS`, see `jaxrl_llm.data.records`.
      split: of a folder or a hub id, `train` if left out. In a folder, files belong to the split that a word of their
        path names (`train-00000.parquet`, `test/a.jsonl`); if none names one, all of them are `train`.
      config: name of the hub data set's configuration, if it has several.
      columns: the data set's name of a column by the kind's name, where they differ; None: not to be read.
      convert: makes of a row as it is read one with the kind's columns, where renaming them is not enough. A
        LookupError, TypeError or ValueError of it means that the row is bad.
      on_bad: raise at the first bad row, or leave bad rows out, counted by reason in `Records.skipped` and told in a
        RuntimeWarning.

    Raises:
      ValueError: a bad row (file, row counted from 1, column, what was expected, what was found); nothing to read at
        `source`; a hub id that cannot be reached; no good row.
    """
    if on_bad not in ("raise", "skip"):
        raise ValueError(f"on_bad must be 'raise' or 'skip', got {on_bad!r}")
    skipped: Counter[str] | None = Counter() if on_bad == "skip" else None
    rows = list(_records(_sources(source, split, config, stream=False), kind, columns, convert, skipped))
    if not rows:
        reasons = f"; rows left out: {dict(skipped)}" if skipped else ""
        raise ValueError(f"{source}: there are no records in it; expected at least one row of {kind}{reasons}")
    if skipped:
        warnings.warn(
            f"{source}: {skipped.total()} of {skipped.total() + len(rows)} rows left out: "
            + "; ".join(f"{reason} ({count})" for reason, count in skipped.most_common()),
            RuntimeWarning,
            stacklevel=2,
        )
    return Records(kind, rows, dict(skipped or {}))


def iterate_records(
    source: str | os.PathLike[str],
    kind: str,
    *,
    split: str | None = None,
    config: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    convert: Callable[[Row], Row] | None = None,
    skipped: Counter[str] | None = None,
) -> Iterator[Row]:
    """`read_records` one record at a time, in constant memory, for data sets that do not fit; a hub id is streamed.
    A `.json` file is read as a whole nevertheless.

    Args:
      skipped: bad rows are left out and counted here, by reason; without it they raise.
    """
    return _records(_sources(source, split, config, stream=True), kind, columns, convert, skipped)


def file_rows(path: str | os.PathLike[str]) -> Iterator[Row | BadRow]:
    """The rows of one file as they stand in it, None or "" (CSV) where there is no value; a BadRow in place of what is
    no row at all.

    Raises:
      ValueError: no such file, another type of file, or a damaged one.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise ValueError(f"{path}: expected a file of type {', '.join(READERS)}, got {path.suffix or 'no suffix'!r}")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; give the path of a file of type {', '.join(READERS)}")
    try:
        yield from READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert the file") from None


def _records(
    sources: Iterable[tuple[str, bool, Iterable[Row | BadRow]]],
    kind: str,
    columns: Mapping[str, str | None] | None,
    convert: Callable[[Row], Row] | None,
    skipped: Counter[str] | None,
) -> Iterator[Row]:
    for name, cells, rows in sources:
        for number, row in enumerate(rows, start=1):
            try:
                if isinstance(row, BadRow):
                    raise row
                yield record(row if convert is None else _converted(row, convert), kind, columns=columns, cells=cells)
            except BadRow as error:
                if skipped is None:
                    raise ValueError(f"{name}, row {number}: {error}") from None
                skipped[error.reason] += 1


def _converted(row: Row, convert: Callable[[Row], Row]) -> Row:
    try:
        return convert(row)
    except (LookupError, TypeError, ValueError) as error:
        raise BadRow(f"convert fails with {type(error).__name__}", f": {error}; columns are {sorted(row)}") from error


def _sources(
    source: str | os.PathLike[str], split: str | None, config: str | None, stream: bool
) -> Iterator[tuple[str, bool, Iterable[Row | BadRow]]]:
    """Name, whether values are CSV cells, and rows of every file of `source`, or of the hub data set."""
    text = os.path.expanduser(os.fspath(source))
    if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", text) and not os.path.exists(text) and Path(text).suffix not in READERS:
        split = split or "train"
        yield f"{text} ({split})", False, _hub_rows(text, split, config, stream)
        return
    if config is not None:
        raise ValueError(f"config={config!r} is for data sets of the hub, {text} is a path; leave it out")
    for path in _files(text, split):
        yield str(path), path.suffix == ".csv", file_rows(path)


def _files(text: str, split: str | None) -> list[Path]:
    if os.path.isdir(text):
        return _folder_files(Path(text), split)
    if split is not None:
        raise ValueError(f"{text}: split={split!r} is for folders and hub ids; name the file or files of that split")
    if not glob.has_magic(text) or os.path.exists(text):
        return [Path(text)]
    paths = [Path(found) for found in sorted(glob.glob(text, recursive=True)) if Path(found).is_file()]
    if not paths:
        raise ValueError(f"{text}: no file matches")
    return _of_one_type(paths, text)


def _folder_files(folder: Path, split: str | None) -> list[Path]:
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in READERS
        and path.name not in BOOKKEEPING
        and not path.name.startswith("cache-")  # what `datasets` computed from the data set
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not paths:
        raise ValueError(f"{folder}: there is no file of type {', '.join(READERS)} in this folder")

    def words(path: Path) -> set[str]:
        return set(re.split(r"[^a-z0-9]+", str(path.relative_to(folder)).lower()))

    wanted = split or "train"
    chosen = [path for path in paths if words(path) & set(SPLIT_NAMES.get(wanted, (wanted.lower(),)))]
    if not chosen:
        known = {word for names in SPLIT_NAMES.values() for word in names}
        if wanted != "train" or any(words(path) & known for path in paths):
            found = ", ".join(str(path.relative_to(folder)) for path in paths[:5])
            raise ValueError(f"{folder}: no file of split {wanted!r} among {found}; name the split, a file or a glob")
        chosen = paths
    return _of_one_type(chosen, str(folder))


def _of_one_type(paths: list[Path], where: str) -> list[Path]:
    if len(types := {path.suffix for path in paths}) > 1:
        raise ValueError(
            f"{where}: files of several types ({', '.join(sorted(types))}); choose by a glob, as in '*.csv'"
        )
    return paths


def _csv_rows(path: Path) -> Iterator[Row | BadRow]:
    csv.field_size_limit(2**31 - 1)  # a passage may be longer than the 131,072 characters that are the default
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            surplus = row.pop(None, None)
            yield row if surplus is None else BadRow("more cells than the header has columns", f": {surplus!r:.80}")


def _jsonl_rows(path: Path) -> Iterator[Row | BadRow]:
    with path.open(encoding="utf-8-sig") as file:
        for line in filter(str.strip, file):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                yield BadRow("not a JSON object", f": {error}")
                continue
            yield row if isinstance(row, dict) else _no_object(row)


def _json_rows(path: Path) -> Iterator[Row | BadRow]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}; a file with one object a line must end in .jsonl") from None
    if not isinstance(rows, list):
        raise ValueError(
            f"{path}: expected a list of objects, got {type(rows).__name__}; name the file .jsonl if it is"
        )
    yield from (row if isinstance(row, dict) else _no_object(row) for row in rows)


def _no_object(row: Any) -> BadRow:
    return BadRow("expected a JSON object", f", got {json.dumps(row)[:40]!r}")


def _typed_rows(path: Path) -> Iterator[Row]:
    import datasets

    try:
        yield from _without_nulls(
            datasets.load_dataset(path.suffix[1:], data_files=[str(path)], split="train", streaming=True)
        )
    except Exception as error:  # pyarrow's and datasets' own, of many types
        raise ValueError(f"{path}: not a readable {path.suffix} file ({type(error).__name__}: {error})") from error


def _hub_rows(name: str, split: str, config: str | None, stream: bool) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_dataset(name, config, split=split, streaming=stream)
    except Exception as error:  # of the network, of the hub and of the data set, of many types
        raise ValueError(
            f"{name!r} is no file or folder here and cannot be read from the Hugging Face hub "
            f"({type(error).__name__}: {str(error)[:300]}). Without network, fetch the data set on another machine and "
            f"give the path of its file or folder ({', '.join(READERS)})"
        ) from error
    yield from _without_nulls(data)


def _without_nulls(rows: Iterable[Row]) -> Iterator[Row]:
    """Arrow gives each of several objects the keys of all, null where it had none: takes them out of nested objects."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        return [clean(item) for item in value] if isinstance(value, list) else value

    for row in rows:
        yield {name: clean(value) for name, value in row.items()}


READERS = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _typed_rows,
    ".arrow": _typed_rows,
}
