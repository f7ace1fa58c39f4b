"""How a policy and its tools write to each other in one text: four protocols, as data and functions.

    SEARCH_R1   <search>query</search> is answered with <information>..</information>; <answer>..</answer> ends
    HERMES      <tool_call>{"name": .., "arguments": {..}}</tool_call>, any number of them in a turn, are answered with
                <tool_response>..</tool_response>; a turn without calls is an answer
    REACT       Thought, Action, Action Input, Observation; Final Answer ends
    CHAT        no tools: every turn is a message

`dataclasses.replace` makes variants, with other instructions or another frame around results. `envs.tool_env` plays
episodes in a protocol. Whatever a policy writes can be parsed: what is broken becomes `Malformed`, never an exception.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from jaxrl_llm.rewards.parse import parse_action
from jaxrl_llm.tools.tool import Tool, check_tools, render_tools
from jaxrl_llm.types import Span


class Call(NamedTuple):
    """A call as the policy wrote it: whether there is such a tool, and whether the arguments fit, is checked later."""

    name: str
    arguments: Any


class Malformed(NamedTuple):
    """An attempt at a call that cannot be read, and what is wrong with it."""

    problem: str


class Parsed(NamedTuple):
    """What a turn says: some actions, in their order, or an answer."""

    actions: tuple[Call | Malformed, ...] = ()
    answer: str | None = None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How texts become prompts, turns become calls, and results become observations.

    Attributes:
      parse: `(turn, tools) -> Parsed`. The turn comes without the token that ended it.
      instructions: `tools -> str`, the part of the prompt that describes tools and format. Raises a ValueError for
        tools that the protocol cannot call.
      stops: `tools -> texts` that end a turn, beside the tokenizer's end-of-turn tokens.
      question: the last part of a prompt without a chat template, `{}` being the task.
      opening: what an observation begins with, unless the turn already ends with it.
      result, correction, reply: how the result of a call, the message about a malformed one and the words of a user are
        written, `{}` being the text. Several stand on lines of their own.
      closing: what an observation ends with.
      observed: regular expression of the observations in a finished transcript.
      quoted: regular expression of what would read as the protocol's own words in the text of a tool; a space is put
        behind the first character of each match.
      inline: with a chat template, whether observations stand inside the assistant's turn, as long as the policy does
        not end it, or are messages between its turns.
      role: with a chat template, whose messages these are. "tool" also presents the tools as the template does, in
        place of `instructions`, if it knows of tools.
    """

    parse: Callable[[str, Sequence[Tool]], Parsed]
    instructions: Callable[[Sequence[Tool]], str]
    stops: Callable[[Sequence[Tool]], tuple[str, ...]] = lambda tools: ()
    question: str = "Question: {}\n"
    opening: str = "\n"
    result: str = "{}"
    correction: str = "{}"
    reply: str = "{}"
    closing: str = "\n"
    observed: str = r"(?!)"
    quoted: str = r"(?!)"
    inline: bool = False
    role: Literal["tool", "user"] = "user"


def transcript_spans(protocol: Protocol, transcript: str, prompt: str = "") -> list[Span]:
    """Who wrote what in a finished transcript without a chat template, for training on demonstrations: the spans
    joined are the transcript. Those of an episode that was played are in its `Trajectory`, those of messages in
    `models.encode_chat`.

    Args:
      prompt: what the transcript begins with; all behind it is the policy's or an observation.

    Raises:
      ValueError: the transcript does not begin with the prompt.
    """
    if not transcript.startswith(prompt):
        raise ValueError(f"the transcript must begin with the prompt {prompt!r:.80}, got {transcript!r:.80}")
    spans = [Span("prompt", prompt)]
    place = len(prompt)
    for match in re.compile(protocol.observed, re.DOTALL).finditer(transcript, len(prompt)):
        spans += [Span("policy", transcript[place : match.start()]), Span("observation", match[0])]
        place = match.end()
    spans.append(Span("policy", transcript[place:]))
    return [span for span in spans if span.text]


def text_argument(tool: Tool) -> str | None:
    """The argument that plain text is passed as: the only required one, or the only one; None if there is no such."""
    names = tool.parameters.get("required") or list(tool.parameters.get("properties", {}))
    return names[0] if len(names) == 1 else None


def _tags(tools: Sequence[Tool]) -> dict[str, str]:
    """The argument that stands between the tags of each tool."""
    arguments = {}
    for name, tool in check_tools(tools).items():
        argument = text_argument(tool)
        if argument is None or not re.fullmatch(r"[A-Za-z][\w-]*", name) or name == "answer":
            raise ValueError(
                f"tool {name!r} cannot be called as <{name}>text</{name}>: it needs a name of letters, digits, _ and - "
                "other than 'answer', and exactly one required argument"
            )
        arguments[name] = argument
    return arguments


def _parse_tags(text: str, tools: Sequence[Tool]) -> Parsed:
    arguments = _tags(tools)
    tag, content = parse_action(text, (*arguments, "answer"))
    if tag == "answer":
        return Parsed(answer=content)
    if tag != "invalid":
        return Parsed((Call(tag, {arguments[tag]: content}),))
    opened = next((name for name in (*arguments, "answer") if f"<{name}>" in text), None)
    problem = f"<{opened}> is not closed." if opened else "There is no action."
    choices = " or ".join(f"<{name}>...</{name}>" for name in (*arguments, "answer"))
    return Parsed((Malformed(f"{problem} Write {choices}."),))


def _instruct_tags(tools: Sequence[Tool]) -> str:
    lines = [f"<{name}>{argument}</{name}>: {check_tools(tools)[name].description}" for name, argument in
             _tags(tools).items()]  # fmt: skip
    return "\n".join([
        "Answer the question. Whenever you receive something new, first reason about it between <think> and </think>. "
        "Then do one of the following:",
        *lines,
        "<answer>final answer</answer>: ends the conversation; write the answer alone, without an explanation.",
        "What you ask for is returned between <information> and </information>. Ask as often as you need.",
    ])  # fmt: skip


SEARCH_R1 = Protocol(
    parse=_parse_tags,
    instructions=_instruct_tags,
    stops=lambda tools: tuple(f"</{name}>" for name in (*_tags(tools), "answer")),
    opening="\n\n",
    result="<information>{}</information>",
    correction="My last action was not valid. {} Let me try again.",
    reply="Question: {}",
    closing="\n\n",
    observed=r"\n*<information>.*?</information>\n*",
    quoted=r"</?information>",
    inline=True,
)
"""The tags of Search-R1 (Jin et al. 2025, arXiv 2503.09516), for any tools with one text argument: each is called by
its name as the tag. The first closed pair of a turn is its action."""


_BLOCK = re.compile(r"<tool_call>(.*?)(</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)


def _parse_hermes(text: str, tools: Sequence[Tool]) -> Parsed:
    text = text.rpartition("</think>")[2]  # what is only thought of is not called
    if "<think>" in text:
        return Parsed((Malformed("<think> is not closed."),))
    blocks = _BLOCK.findall(text)
    if blocks:
        unclosed = Malformed("<tool_call> is not closed. Write <tool_call>, the JSON object, and </tool_call>.")
        return Parsed(tuple(_json_call(content) if closed else unclosed for content, closed in blocks))
    if "</tool_call>" in text:
        return Parsed((Malformed("</tool_call> closes nothing. Write <tool_call> before the JSON object."),))
    return Parsed(answer=text.strip())


def _json_call(content: str) -> Call | Malformed:
    form = 'Write {"name": "...", "arguments": {...}}.'
    try:
        call = json.loads(content)
    except (ValueError, RecursionError) as error:  # the second for what is nested too deeply
        return Malformed(f"The call is not JSON: {error}. {form}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return Malformed(f"The call has no name. {form}")
    return Call(call["name"], call.get("arguments", {}))


def _instruct_hermes(tools: Sequence[Tool]) -> str:
    return (
        "You may call one or more of these functions to help with the question. Their signatures, as JSON:\n"
        + render_tools(tools, "hermes")
        + 'Write each call as a JSON object between tags: <tool_call>\n{"name": "...", "arguments": {...}}\n'
        "</tool_call>\nThe results come between <tool_response> tags. A message without a call is your final answer."
    )


HERMES = Protocol(
    parse=_parse_hermes,
    instructions=_instruct_hermes,
    result="<tool_response>\n{}\n</tool_response>",
    correction="<tool_response>\n{}\n</tool_response>",
    observed=r"(?:\n*<tool_response>.*?</tool_response>\n*)+",
    quoted=r"</?tool_response>",
    role="tool",
)
"""The calls that Hermes and Qwen models are trained on, as JSON between tags. All calls of a turn are carried out, one
after the other. Reasoning up to `</think>` is not looked at."""


_REACT_LABELS = r"(?:Thought|Action|Action Input|Observation|Final Answer):"
_FINAL = re.compile(r"^[ \t]*Final Answer:(.*)", re.MULTILINE | re.DOTALL)
_ACTION = re.compile(r"^[ \t]*Action:[ \t]*(.*?)[ \t]*$", re.MULTILINE)
_INPUT = re.compile(rf"^[ \t]*Action Input:(.*?)(?=^[ \t]*{_REACT_LABELS}|\Z)", re.MULTILINE | re.DOTALL)


def _parse_react(text: str, tools: Sequence[Tool]) -> Parsed:
    final, action = _FINAL.search(text), _ACTION.search(text)
    if final and not (action and action.start() < final.start()):
        return Parsed(answer=final[1].strip())
    if not action:
        return Parsed((Malformed("There is neither a line 'Action:' nor a line 'Final Answer:'."),))
    given = _INPUT.search(text, action.end())
    if not given:
        return Parsed((Malformed("The line 'Action Input:' is missing behind 'Action:'."),))
    tool, content = check_tools(tools).get(action[1]), given[1].strip()
    if tool is None:
        return Parsed((Call(action[1], {}),))  # refused as an unknown tool, whatever its input
    argument = text_argument(tool)
    if argument is not None and not content.startswith("{"):
        return Parsed((Call(tool.name, {argument: content}),))
    try:
        return Parsed((Call(tool.name, json.loads(content or "{}")),))
    except (ValueError, RecursionError) as error:
        return Parsed((Malformed(f"'Action Input:' is not a JSON object: {error}."),))


def _instruct_react(tools: Sequence[Tool]) -> str:
    return (
        "Answer the question with the help of these tools:\n"
        + render_tools(tools, "react")
        + "Write in this form:\nThought: what to do next\nAction: the name of a tool\n"
        "Action Input: its arguments as a JSON object\nObservation: what the tool returned, written for you\n"
        "(any number of these four lines)\nThought: I know the answer\nFinal Answer: the answer"
    )


REACT = Protocol(
    parse=_parse_react,
    instructions=_instruct_react,
    stops=lambda tools: ("\nObservation:",),
    opening="\nObservation:",
    result=" {}",
    correction=" {}",
    reply="\nQuestion: {}",
    observed=rf"(?<=\nObservation:).*?(?:\n(?={_REACT_LABELS})|\Z)",
    quoted=rf"\n(?={_REACT_LABELS})",
    inline=True,
)
"""ReAct (Yao et al. 2023, arXiv 2210.03629) in the form with a line for the input. An input that is no JSON object is
passed as the text argument of a tool that has just one. What comes first in a turn, action or answer, counts."""


def _instruct_chat(tools: Sequence[Tool]) -> str:
    if tools:
        raise ValueError(f"the chat protocol calls no tools, got {list(check_tools(tools))}; use HERMES for them")
    return ""


CHAT = Protocol(
    parse=lambda text, tools: Parsed(answer=text.strip()),
    instructions=_instruct_chat,
    stops=lambda tools: ("\nUser:",),
    question="User: {}\nAssistant:",
    opening="\nUser:",
    result=" {}",
    reply=" {}",
    closing="\nAssistant:",
    observed=r"(?<=\nUser:).*?\nAssistant:",
    quoted=r"\n(?=(?:User|Assistant):)",
)
"""Messages of a user and the policy in turn."""
