"""Tools from functions, their calls and their documentation."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any, Literal

import pytest

from jaxrl_llm.tools import Tool, ToolError, call_tool, call_tool_async, check_tools, render_tools, tool


@tool
def look_up(word: str, limit: int = 3, order: Literal["new", "old"] = "new", tags: list[str] | None = None) -> str:
    """Looks a word up
    in a book.

    Args:
      word: what to look for,
        as it is spelt.
      limit (int): how many entries.

    Returns:
      Text.
    """
    return f"{word} {limit} {order} {tags}"


@tool(name="fail", description="Fails.")
def failing(how: str) -> str:
    if how == "tool":
        raise ToolError("no such page")
    if how == "keyboard":
        raise KeyboardInterrupt
    if how == "number":
        return 3  # type: ignore[return-value]
    if how == "surrogate":
        return "half \ud83d"
    raise RuntimeError("broken")


@tool
async def wait_for(seconds: float) -> str:
    """Waits."""
    await asyncio.sleep(seconds)
    return f"waited in {threading.current_thread().name}"


TOOLS = [look_up, failing, wait_for]


def test_schema_comes_from_hints_and_docstring() -> None:
    assert look_up.description == "Looks a word up in a book."
    assert look_up.parameters == {
        "type": "object",
        "properties": {
            "word": {"type": "string", "description": "what to look for, as it is spelt."},
            "limit": {"type": "integer", "description": "how many entries.", "default": 3},
            "order": {"enum": ["new", "old"], "default": "new"},
            "tags": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}], "default": None},
        },
        "required": ["word"],
        "additionalProperties": False,
    }


def test_call() -> None:
    assert call_tool(TOOLS, "look_up", {"word": "a"}) == ("a 3 new None", None)
    assert call_tool(TOOLS, "look_up", {"word": "a", "limit": 1, "tags": ["b"]}) == ("a 1 new ['b']", None)
    assert call_tool(TOOLS, "wait_for", {"seconds": 0}).error is None


@pytest.mark.parametrize(
    ("name", "arguments", "error", "text"),
    [
        ("lookup", {}, "unknown_tool", "Did you mean look_up? Tools: look_up, fail, wait_for"),
        (None, {}, "unknown_tool", "no tool 'None'"),
        ("look_up", {}, "bad_arguments", "'word' is a required property. Expected: look_up(word: string, limit"),
        ("look_up", {"word": 1}, "bad_arguments", "word: 1 is not of type 'string'"),
        ("look_up", {"word": "a", "limit": True}, "bad_arguments", "limit: True is not of type 'integer'"),
        ("look_up", {"word": "a", "other": 1}, "bad_arguments", "'other' was unexpected"),
        ("look_up", {"word": ["x" * 10**6]}, "bad_arguments", "is not of type 'string'"),
        ("look_up", ["a"], "bad_arguments", "must be a JSON object, got list"),
        ("fail", {"how": "tool"}, "failed", "Error: no such page"),
        ("fail", {"how": "other"}, "failed", "fail failed: RuntimeError: broken"),
        ("fail", {"how": "number"}, "not_text", "fail returned int"),
        ("fail", {"how": "surrogate"}, None, "half ?"),
    ],
)
def test_what_a_policy_does_wrong_is_a_result(name: Any, arguments: Any, error: str | None, text: str) -> None:
    result = call_tool(TOOLS, name, arguments)
    assert result.error == error and text in result.text
    assert len(result.text) < 1000
    assert asyncio.run(call_tool_async(TOOLS, name, arguments)) == result


def test_interrupts_pass() -> None:
    with pytest.raises(KeyboardInterrupt):
        call_tool(TOOLS, "fail", {"how": "keyboard"})


def test_async_calls_run_side_by_side() -> None:
    """Plain tools in threads, async ones in the loop: all of these meet at one barrier."""
    barrier = threading.Barrier(3)

    @tool
    def meet() -> str:
        """Waits for the others."""
        barrier.wait(10)
        return threading.current_thread().name

    async def run() -> list:
        calls = [call_tool_async([meet], "meet", {}) for _ in range(3)]
        return await asyncio.gather(*calls, call_tool_async(TOOLS, "wait_for", {"seconds": 0.01}))

    *plain, waited = asyncio.run(run())
    assert len({result.text for result in plain}) == 3 and waited.text == "waited in MainThread"

    async def blocking() -> None:
        call_tool(TOOLS, "wait_for", {"seconds": 0})

    with pytest.raises(RuntimeError, match="await call_tool_async"):
        asyncio.run(blocking())


def test_rendered_documentation() -> None:
    hermes = render_tools([look_up], "hermes").splitlines()
    assert (hermes[0], hermes[2]) == ("<tools>", "</tools>")
    function = {"name": "look_up", "description": look_up.description, "parameters": look_up.parameters}
    assert json.loads(hermes[1]) == {"type": "function", "function": function}
    react = render_tools(TOOLS, "react").splitlines()
    assert react[0].startswith('look_up: Looks a word up in a book. Parameters: {"type": "object"')
    assert react[-1] == "Tool names: look_up, fail, wait_for"
    assert render_tools([look_up], "plain") == (
        'look_up(word: string, limit: integer = 3, order: "new" | "old" = "new", '
        "tags: array of string | null = null)\n"
        "  Looks a word up in a book.\n"
        "  word: what to look for, as it is spelt.\n"
        "  limit: how many entries.\n"
    )
    with pytest.raises(ValueError, match="style 'xml'"):
        render_tools(TOOLS, "xml")  # type: ignore[arg-type]


def no_hint(word) -> str:  # type: ignore[no-untyped-def]
    """Text."""
    return word


def many(*words: str) -> str:
    """Text."""
    return words[0]


def odd_hint(word: set[str]) -> str:
    """Text."""
    return str(word)


def no_text(word: str) -> str:
    return word


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_hint, "no type hint"),
        (many, "passed by name"),
        (odd_hint, "no JSON value"),
        (no_text, "description is empty"),
    ],
)
def test_functions_that_make_no_tool(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tool(function)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "look up"}, "'look up': expected 1 to 64"),
        ({"description": " "}, "description is empty"),
        ({"parameters": {"type": "array"}}, "'type': 'object'"),
        ({"parameters": {"type": "object", "properties": {"a": {"type": "text"}}}}, "no JSON schema"),
        ({"parameters": {"type": "object", "default": {1, 2}}}, "must be JSON"),
        ({"parameters": {"type": "object", "properties": {"a": {"$ref": "http://x/y"}}}}, "refer to 'http://x/y'"),
        ({"call": "x"}, "must be a function"),
    ],
)
def test_tools_are_checked_when_made(changed: dict, message: str) -> None:
    values = {"name": "a", "description": "Text.", "parameters": {"type": "object"}, "call": str} | changed
    with pytest.raises(ValueError, match=message):
        Tool(**values)


def test_names_are_unique() -> None:
    for use in (check_tools, lambda tools: render_tools(tools, "plain"), lambda tools: call_tool(tools, "fail", {})):
        with pytest.raises(ValueError, match="two tools are named 'fail'"):
            use([failing, failing])


def test_arguments_nested_too_deeply() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    anything = Tool("a", "Text.", {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {
        "a": {"type": ["array", "string"], "items": {"$ref": "#/$defs/a"}}}}, lambda a: "text")  # fmt: skip
    assert call_tool([anything], "a", {"a": deep}).error == "bad_arguments"
