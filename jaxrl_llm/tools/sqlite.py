"""Questions to an SQLite database: reading only, with limits of time and size."""

from __future__ import annotations

import dataclasses
import sqlite3
import time
from pathlib import Path
from typing import Any, NamedTuple

from jaxrl_llm.tools.tool import Tool, ToolError

# PRAGMAs that tell of the schema and change nothing.
_READING_PRAGMAS = frozenset(
    {"table_info", "table_xinfo", "table_list", "index_list", "index_info", "index_xinfo", "foreign_key_list"}
)
_ALLOWED = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE})
# A single step of SQLite does not look at the clock, so its values and patterns are bounded too.
_BOUNDS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1_000_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 200,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
# Functions that load code, or that take the address of some.
_REFUSED_FUNCTIONS = frozenset({"load_extension", "fts3_tokenizer"})
_STEPS_BETWEEN_CLOCKS = 1000


@dataclasses.dataclass(frozen=True)
class Database:
    """An SQLite database that is only read; every query has a connection of its own, so threads may share it.

    Attributes:
      path: its file.
      content: None, or the copy of the file from which queries are answered.
    """

    path: Path
    content: bytes | None = None


class QueryResult(NamedTuple):
    """Rows of a query.

    Attributes:
      columns: names.
      rows: the first rows; a value is None, int, float, str or bytes.
      rows_left_out: how many more there are.
      counted: false if time ran out while the rows left out were counted: there are at least as many.
    """

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    rows_left_out: int
    counted: bool


def open_database(path: str | Path, *, copy: bool = False) -> Database:
    """The database in a file, which is never changed.

    Args:
      copy: answer from a copy in memory, whatever becomes of the file; every query copies it once more.

    Raises:
      ValueError: no such file, or no SQLite database.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise ValueError(f"{path} is no file; an SQLite database is expected")
    database = Database(path)
    connection = _connect(database)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
        return Database(path, connection.serialize()) if copy else database
    except sqlite3.Error as error:
        raise ValueError(f"{path} cannot be read as an SQLite database: {error}") from error
    finally:
        connection.close()


def _connect(database: Database) -> sqlite3.Connection:
    if database.content is not None:
        connection = sqlite3.connect(":memory:")
        connection.deserialize(database.content)
    else:
        # "immutable" keeps SQLite from making lock and index files beside a database; it would not see what a writer
        # has left in a journal.
        journals = [database.path.with_name(database.path.name + end) for end in ("-wal", "-journal")]
        unsettled = any(journal.exists() and journal.stat().st_size for journal in journals)
        uri = f"{database.path.as_uri()}?mode=ro" + ("" if unsettled else "&immutable=1")
        connection = sqlite3.connect(uri, uri=True, timeout=1.0)
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    return connection


def _authorize(action: int, first: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
    """Lets statements read tables, call functions, and ask for the schema."""
    if action in _ALLOWED:
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() not in _REFUSED_FUNCTIONS:
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_PRAGMA and (first or "").lower() in _READING_PRAGMAS:
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def query(database: Database, sql: str, *, seconds: float = 5.0, max_rows: int = 50) -> QueryResult:
    """Carries out one statement that reads.

    Args:
      seconds: it is interrupted after this time.
      max_rows: rows returned; more are counted.

    Raises:
      ToolError: SQLite's message, a statement that would write, several statements, or no time left.
      ValueError: `seconds` or `max_rows` is not positive.
    """
    if not seconds > 0 or max_rows < 1:
        raise ValueError(f"seconds is {seconds}, max_rows is {max_rows}; expected positive numbers")
    connection = _connect(database)
    deadline = time.monotonic() + seconds
    rows: list[tuple[Any, ...]] = []
    left_out = 0
    try:
        for bound, value in _BOUNDS.items():
            connection.setlimit(bound, value)
        connection.set_authorizer(_authorize)
        connection.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS_BETWEEN_CLOCKS)
        cursor = connection.execute(sql)
        columns = tuple(column[0] for column in cursor.description or ())
        for row in cursor:
            if len(rows) < max_rows:
                rows.append(row)
            else:
                left_out += 1
        return QueryResult(columns, rows, left_out, True)
    except sqlite3.DatabaseError as error:
        message = str(error)
        if message == "interrupted" and left_out:
            return QueryResult(columns, rows, left_out, False)
        if message == "interrupted":
            message = f"the query took more than {seconds:g} s and was interrupted"
        elif "authoriz" in message or "prohibited" in message:
            message = f"the database is only read, use SELECT ({message})"
        elif "one statement" in message:
            message = "several statements were given; send one at a time"
        raise ToolError(f"SQLite: {message}") from error
    except (sqlite3.Warning, ValueError, UnicodeError, OverflowError, MemoryError) as error:
        raise ToolError(f"SQLite: {error}") from error
    finally:
        connection.close()


def value_text(value: Any, max_characters: int = 200) -> str:
    """A value as it stands in a table: NULL, numbers with all their digits, blobs by their length, text on one line."""
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"<blob of {len(value)} bytes>"
    if not isinstance(value, str):
        return repr(value)
    cut = len(value) - max_characters
    text = value[:max_characters].replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{text} <{cut} more characters>" if cut > 0 else text


def table_text(result: QueryResult, *, max_cell_characters: int = 200) -> str:
    """The result as lines of cells with ` | ` between them, the names of the columns first, then what was left out."""
    if not result.columns:
        return "no result"
    lines = [" | ".join(value_text(name, max_cell_characters) for name in result.columns)]
    lines += [" | ".join(value_text(value, max_cell_characters) for value in row) for row in result.rows]
    if result.rows_left_out:
        least = "" if result.counted else "at least "
        lines.append(f"({least}{result.rows_left_out} more rows)")
    elif not result.rows:
        lines.append("(no rows)")
    return "\n".join(lines)


def schema_text(database: Database, *, sample_rows: int = 0) -> str:
    """The statements that made the tables and views, for a prompt; after each table up to `sample_rows` of its rows."""
    statements = "SELECT name, type, sql FROM sqlite_master WHERE type IN ('table', 'view') AND sql IS NOT NULL"
    parts = []
    for name, kind, sql in query(database, f"{statements} ORDER BY rowid", max_rows=10_000).rows:
        if name.startswith("sqlite_"):
            continue
        parts.append(f"{sql};")
        if sample_rows and kind == "table":
            quoted = name.replace('"', '""')
            rows = query(database, f'SELECT * FROM "{quoted}" LIMIT {int(sample_rows)}', max_rows=sample_rows)
            parts.append(f"/* first rows of {name}:\n{table_text(rows, max_cell_characters=60)}\n*/")
    return "\n".join(parts)


def sqlite_tool(
    database: Database,
    *,
    name: str = "sql",
    seconds: float = 5.0,
    max_rows: int = 50,
    max_cell_characters: int = 200,
    show_schema: bool = True,
) -> Tool:
    """A tool that answers one SQL statement with a small table.

    Args:
      show_schema: put the schema into the tool's description.

    Raises:
      ValueError: a limit that is not positive.
    """
    if not seconds > 0 or max_rows < 1 or max_cell_characters < 1:
        raise ValueError("seconds, max_rows and max_cell_characters must be positive")

    def sql(query_text: str) -> str:
        result = query(database, query_text, seconds=seconds, max_rows=max_rows)
        return table_text(result, max_cell_characters=max_cell_characters)

    description = f"Carries out one SQLite statement that reads (SELECT) and returns up to {max_rows} rows."
    if show_schema:
        description += f" Schema:\n{schema_text(database)}"
    parameters = {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "One SQLite SELECT statement."}},
        "required": ["query"],
        "additionalProperties": False,
    }
    return Tool(name, description, parameters, lambda query: sql(query))
