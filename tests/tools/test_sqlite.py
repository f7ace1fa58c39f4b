"""SQLite as a tool: exact values, nothing written, nothing without end."""

import hashlib
import os
import sqlite3
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxrl_llm.tools import ToolError, call_tool
from jaxrl_llm.tools.sqlite import Database, open_database, query, schema_text, sqlite_tool, table_text

NUMBERS = "WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r)"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("database") / "books.db"
    connection = sqlite3.connect(path)
    connection.executescript(
        """
        CREATE TABLE book (id INTEGER PRIMARY KEY, title TEXT, price REAL, cover BLOB);
        INSERT INTO book VALUES (1, 'A', 0.1, x'00ff'), (2, NULL, 1e100, NULL);
        INSERT INTO book VALUES (3, 'two' || char(10) || 'lines', 2, '');
        CREATE INDEX by_title ON book (title);
        CREATE VIEW cheap AS SELECT id FROM book WHERE price < 1;
        """
    )
    connection.close()
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["file", "copy"])
def database(path: Path, request: pytest.FixtureRequest) -> Database:
    return open_database(path, copy=request.param)


@pytest.fixture(scope="module", autouse=True)
def unchanged(path: Path):
    before = hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns
    yield
    assert (hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns) == before
    assert os.listdir(path.parent) == [path.name]


def test_values_are_exact(database: Database) -> None:
    assert query(database, "SELECT * FROM book").rows == [
        (1, "A", 0.1, b"\x00\xff"),
        (2, None, 1e100, None),
        (3, "two\nlines", 2.0, ""),
    ]
    assert call_tool([sqlite_tool(database)], "sql", {"query": "SELECT * FROM book"}).text == (
        "id | title | price | cover\n1 | A | 0.1 | <blob of 2 bytes>\n2 | NULL | 1e+100 | NULL\n"
        "3 | two\\nlines | 2.0 | "
    )
    assert query(database, "PRAGMA table_info(book)").rows[1][1] == "title"


def test_rows_and_cells_are_capped(database: Database) -> None:
    result = query(database, f"{NUMBERS} SELECT i FROM r LIMIT 1000", max_rows=2)
    assert result == (("i",), [(1,), (2,)], 998, True)
    assert table_text(result) == "i\n1\n2\n(998 more rows)"
    assert table_text(query(database, "SELECT id FROM book WHERE 0")) == "id\n(no rows)"
    long = query(database, "SELECT replace(hex(zeroblob(500)), '0', 'x') AS long")
    assert table_text(long, max_cell_characters=5) == "long\nxxxxx <995 more characters>"


def test_time_is_limited(database: Database) -> None:
    start = time.monotonic()
    with pytest.raises(ToolError, match=r"more than 0\.2 s"):
        query(database, f"{NUMBERS} SELECT count(*) FROM r", seconds=0.2)
    endless = query(database, f"{NUMBERS} SELECT i FROM r", seconds=0.2, max_rows=1)
    assert not endless.counted and "at least" in table_text(endless)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("INSERT INTO book VALUES (4, 'B', 1, NULL)", "only read"),
        ("WITH a AS (SELECT 1) INSERT INTO book SELECT 4, 'B', 1, NULL", "only read"),
        ("UPDATE book SET price = 0", "only read"),
        ("DELETE FROM book", "only read"),
        ("DROP TABLE book", "only read"),
        ("CREATE TEMP TABLE t (a)", "only read"),
        ("ATTACH 'other.db' AS other", "only read"),
        ("VACUUM INTO 'other.db'", "only read"),
        ("VACUUM", "only read"),
        ("REINDEX by_title", "only read"),
        ("PRAGMA journal_mode = WAL", "only read"),
        ("PRAGMA user_version = 4", "only read"),
        ("PRAGMA writable_schema = 1", "only read"),
        ("BEGIN IMMEDIATE", "only read"),
        ("SELECT load_extension('x')", "only read"),
        ("SELECT fts3_tokenizer('simple')", "only read"),
        ("SELECT 1; SELECT 2", "several statements"),
        ("SELECT * FROM nowhere", "no such table: nowhere"),
        ("SELEC", "syntax error"),
        ("SELECT randomblob(1000000000)", "too big"),
        ("SELECT 1 \x00", "null character"),
        ("SELECT \ud800", "surrogates"),
        ("SELECT ?", "binding"),
    ],
)
def test_refused(database: Database, sql: str, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        query(database, sql)


def test_copy_outlives_its_file(tmp_path: Path, path: Path) -> None:
    other = tmp_path / "other.db"
    other.write_bytes(path.read_bytes())
    copied = open_database(other, copy=True)
    other.unlink()
    assert query(copied, "SELECT count(*) FROM book").rows == [(3,)]


def test_unsettled_journal_is_read(tmp_path: Path) -> None:
    """What a writer has committed to its write-ahead log, and not yet to the file, is part of the answer."""
    writer = sqlite3.connect(tmp_path / "log.db")
    writer.executescript("PRAGMA journal_mode = WAL; CREATE TABLE t (a); INSERT INTO t VALUES (7);")
    assert query(open_database(tmp_path / "log.db"), "SELECT a FROM t").rows == [(7,)]
    writer.close()


def test_schema(database: Database) -> None:
    text = schema_text(database, sample_rows=1)
    assert text.startswith("CREATE TABLE book (id INTEGER PRIMARY KEY, title TEXT, price REAL, cover BLOB);\n")
    assert "/* first rows of book:\nid | title | price | cover\n1 | A | 0.1 | <blob of 2 bytes>\n" in text
    assert text.endswith("CREATE VIEW cheap AS SELECT id FROM book WHERE price < 1;")
    assert schema_text(database) in sqlite_tool(database).description


def test_bad_input(tmp_path: Path, database: Database) -> None:
    (tmp_path / "text").write_text("no database, but as long as a header of one would be" * 3)
    with pytest.raises(ValueError, match="cannot be read as an SQLite database"):
        open_database(tmp_path / "text")
    with pytest.raises(ValueError, match="is no file"):
        open_database(tmp_path / "none")
    with pytest.raises(ValueError, match="max_rows is 0"):
        query(database, "SELECT 1", max_rows=0)
    with pytest.raises(ValueError, match="positive"):
        sqlite_tool(database, seconds=0)


_WORDS = (
    "SELECT INSERT UPDATE DELETE REPLACE INTO FROM book cheap SET WHERE VALUES (1,'x',1,1) title price = 1 * ; "
    "PRAGMA journal_mode ATTACH 'x' AS VACUUM BEGIN COMMIT CREATE DROP TABLE TRIGGER VIEW t (a) ALTER ADD RENAME TO "
    "WITH EXPLAIN ANALYZE REINDEX SAVEPOINT RELEASE RETURNING"
).split()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.sampled_from(_WORDS), max_size=8))
def test_no_statement_changes_the_file(words: list[str], path: Path) -> None:
    """The module's fixture compares the file; here, that nothing but ToolError is raised."""
    try:
        query(Database(path), " ".join(words), seconds=1.0)
    except ToolError:
        pass
