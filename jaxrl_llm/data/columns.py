"""What the columns of a data set may hold: each type says in words what it expects, and checks a value."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

Row = dict[str, Any]


class Column(NamedTuple):
    """What a column may hold."""

    expected: str  # in words
    check: Callable[[Any], Any]  # the canonical value; raises ValueError with what it got
    parse: Callable[[str], Any] = str  # the value of a CSV cell


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"got {value!r:.80} ({type(value).__name__})")
    if not value.strip():
        raise ValueError(f"got {value!r:.80}")
    return value


def _any_text(value: Any) -> str:
    return value if isinstance(value, str) else _text(value)


def _list_of(check: Callable[[Any], Any], minimum: int = 1) -> Callable[[Any], list[Any]]:
    def check_list(value: Any) -> list[Any]:
        if not isinstance(value, list) or len(value) < minimum:
            raise ValueError(f"got {value!r:.80}")
        try:
            return [check(item) for item in value]
        except ValueError as error:
            raise ValueError(f"got {value!r:.80}: an item is wrong, {error}") from None

    return check_list


def _messages(value: Any) -> list[Row]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"got {value!r:.80}")
    return [_message(message, f"message {number} of {len(value)}") for number, message in enumerate(value, start=1)]


def _message(message: Any, where: str) -> Row:
    if not isinstance(message, dict):
        raise ValueError(f"got {message!r:.80} as {where}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(f"got no text under 'role' in {where}, whose keys are {sorted(message)}")
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"got {content!r:.80} under 'content' in {where}, where a text was expected")
    if role == "assistant" and not content.strip() and not message.get("tool_calls"):
        raise ValueError(f"got neither content nor tool calls in {where}, the assistant's")
    return {**message, "content": content}


def _text_or_messages(value: Any) -> str | list[Row]:
    return _messages(value) if isinstance(value, list) else _text(value)


def _label(value: Any) -> bool:
    if not isinstance(value, (bool, int)) or value not in (0, 1):
        raise ValueError(f"got {value!r:.80}")
    return bool(value)


def _score(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"got {value!r:.80}")
    return float(value)


def _index(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"got {value!r:.80}")
    return value


def _id(value: Any) -> str:
    return _text(value if isinstance(value, str) else str(_index(value)))


def _tools(value: Any) -> list[Row]:
    if isinstance(value, str):
        value = _json_cell(value)
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"got {value!r:.80}")
    return value


def _json_cell(cell: str) -> Any:
    try:
        return json.loads(cell)
    except json.JSONDecodeError:
        raise ValueError(f"got {cell!r:.80}, which is no JSON") from None


def _texts_cell(cell: str) -> Any:
    return _json_cell(cell) if cell.lstrip().startswith("[") else cell.split("|")


def _label_cell(cell: str) -> Any:
    return {"true": True, "1": True, "false": False, "0": False}.get(cell.strip().lower(), cell)


TEXT = Column("a text that is not empty", _text)
ANY_TEXT = Column("a text", _any_text)
TEXTS = Column("a list of texts that are not empty", _list_of(_text), _texts_cell)
MESSAGES = Column("a list of messages with 'role' and 'content'", _messages, _json_cell)
TEXT_OR_MESSAGES = Column("a text that is not empty or a list of messages with 'role' and 'content'", _text_or_messages)
COMPLETIONS = Column("a list of two or more texts or lists of messages", _list_of(_text_or_messages, 2), _texts_cell)
LABEL = Column("true or false (or 1 or 0)", _label, _label_cell)
LABELS = Column("a list of true and false (or of 1 and 0)", _list_of(_label), _json_cell)
SCORES = Column("a list of finite numbers", _list_of(_score), _json_cell)
RANKING = Column("a list of whole numbers, the completions from best to worst", _list_of(_index), _json_cell)
ID = Column("an id: a text that is not empty or a whole number", _id)
IDS = Column("a list of ids (texts that are not empty or whole numbers)", _list_of(_id, 0), _texts_cell)
TOOLS = Column("a list of JSON schemas of tools", _tools)
