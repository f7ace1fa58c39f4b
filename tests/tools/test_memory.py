"""The key-value memory and its tools."""

import json

import pytest

from jaxrl_llm.tools import ToolError, call_tool
from jaxrl_llm.tools.memory import KeyValueMemory, memory_tools


def test_tools_over_one_memory() -> None:
    tools = memory_tools(KeyValueMemory())

    def call(name: str, **arguments: str) -> tuple[str, str | None]:
        return call_tool(tools, f"memory_{name}", arguments)

    assert call("list") == ("the memory is empty", None)
    assert call("write", key="capital", value="Paris") == ("written", None)
    assert call("write", key="capital", value="Paris, France") == ("replaced", None)
    assert call("write", key="river", value="Seine") == ("written", None)
    assert call("read", key="capital") == ("Paris, France", None)
    assert call("search", text="FRANCE") == ("capital", None)
    assert call("search", text="x") == ("nothing found", None)
    assert call("list") == ("capital (13 characters)\nriver (5 characters)", None)
    assert call("delete", key="capital") == ("deleted", None)
    assert call("read", key="capital") == ("Error: no entry 'capital'; keys: river", "failed")
    assert call("delete", key="capital")[1] == "failed"
    assert call("read")[1] == "bad_arguments"


def test_limits() -> None:
    memory = KeyValueMemory(max_entries=2, max_key_characters=3, max_value_characters=4)
    memory.write("a", "1234")
    memory.write("b", "")
    for key, value, message in [
        ("c", "x", "full: 2 entries"),
        ("", "x", "1 to 3 characters"),
        ("abcd", "x", "has 4"),
        ("a", "12345", "has 5"),
    ]:
        with pytest.raises(ToolError, match=message):
            memory.write(key, value)
    assert memory.entries == {"a": "1234", "b": ""}
    memory.delete("b")
    memory.write("c", "x")


def test_round_trip_and_bad_input() -> None:
    memory = KeyValueMemory(max_entries=3)
    memory.write("a", "b")
    again = KeyValueMemory.from_dict(json.loads(json.dumps(memory.to_dict())))
    assert again == memory
    again.write("c", "d")
    assert list(memory.entries) == ["a"]  # episodes share nothing
    with pytest.raises(ValueError, match="has the fields"):
        KeyValueMemory.from_dict({"entries": {}})
    with pytest.raises(ValueError, match="max_entries is 0"):
        KeyValueMemory(max_entries=0)
    with pytest.raises(ValueError, match="do not fit: the memory is full"):
        KeyValueMemory(max_entries=1, entries={"a": "", "b": ""})
