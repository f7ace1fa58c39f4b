"""A policy as a tool: what another model, or the same one in another role, says to a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxrl_llm.models.chat import Message
from jaxrl_llm.tools.tool import Tool


def policy_tool(
    name: str,
    description: str,
    chat: Callable[[list[Message]], Any],
    *,
    system: str = "",
    argument: str = "request",
    argument_description: str = "What is asked of it. It sees nothing else, so say all that matters.",
) -> Tool:
    """A sub-agent: each call is a new conversation of one request and its reply, which is the tool's result.

    Args:
      name, description: of the tool; the description says what the sub-agent is good at.
      chat: `chat(messages) -> str`, plain (and then safe to call from several threads) or async, such as that of a
        `sampling.PolicyServer` or a client of a model served elsewhere. It raises `ToolError` for what the caller
        should read.
      system: the sub-agent's system message; it may have a role that the caller knows nothing of.
      argument, argument_description: of the tool's only argument.

    Raises:
      ValueError: what `Tool` refuses.
    """

    def call(**arguments: str) -> Any:
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        return chat([*messages, {"role": "user", "content": arguments[argument]}])

    properties = {argument: {"type": "string", "description": argument_description}}
    parameters = {"type": "object", "properties": properties, "required": [argument], "additionalProperties": False}
    return Tool(name=name, description=description, parameters=parameters, call=call)
