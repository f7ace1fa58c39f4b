"""A sub-agent behind a tool; with a policy of this library, see tests/sampling/test_server.py."""

from __future__ import annotations

import pytest

from jaxrl_llm.tools import ToolError, call_tool, policy_tool


def test_a_call_is_a_new_conversation() -> None:
    heard = []

    def chat(messages: list) -> str:
        heard.append(messages)
        return f"reply {len(heard)}"

    expert = policy_tool("expert", "Knows much.", chat, system="Be brief.")
    assert [call_tool([expert], "expert", {"request": text}).text for text in "ab"] == ["reply 1", "reply 2"]
    system = {"role": "system", "content": "Be brief."}
    assert heard == [[system, {"role": "user", "content": text}] for text in "ab"]
    assert call_tool([expert], "expert", {"query": "a"}).error == "bad_arguments" and len(heard) == 2


def test_async_and_broken_chats() -> None:
    async def elsewhere(messages: list) -> str:
        return str(messages)

    other = policy_tool("other", "Elsewhere.", elsewhere, argument="question")
    assert call_tool([other], "other", {"question": "x"}) == ("[{'role': 'user', 'content': 'x'}]", None)

    def busy(messages: list) -> str:
        raise ToolError("come back later")

    assert call_tool([policy_tool("busy", "Busy.", busy)], "busy", {"request": "x"}).text == "Error: come back later"
    silent = policy_tool("silent", "Says nothing.", lambda messages: None)
    assert call_tool([silent], "silent", {"request": "x"}).error == "not_text"
    with pytest.raises(ValueError, match="tool name 'two words'"):
        policy_tool("two words", "Named badly.", busy)
