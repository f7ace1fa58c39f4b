"""Reading turns: well-formed, broken, and whole transcripts by author."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.data import encode_spans
from jaxrl_llm.envs import CHAT, HERMES, REACT, SEARCH_R1, Call, Malformed, Parsed, transcript_spans
from jaxrl_llm.models import load_tokenizer
from jaxrl_llm.tools import calculator_tool, tool
from jaxrl_llm.types import Span

TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "models/golden/tokenizers/chatml")


@tool
def search(query: str, k: int = 3) -> str:
    """Searches."""
    return f"{k} results for {query}"


@tool
def clock() -> str:
    """Tells the time."""
    return "noon"


@tool
def send(to: str, text: str) -> str:
    """Sends a message."""
    return f"sent to {to}"


TOOLS = [search, clock, send]
TAGGED = [search, calculator_tool()]
DEEP = "[" * 100_000


def problem(parsed: Parsed) -> str:
    (action,) = parsed.actions
    assert isinstance(action, Malformed) and parsed.answer is None
    return action.problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>hm</think> <search> Peru \n</search>", Call("search", {"query": "Peru"})),
        ("<search></search>", Call("search", {"query": ""})),
        ("<calculator>6*7</calculator><search>x</search>", Call("calculator", {"expression": "6*7"})),
        ("<search><answer>x</answer></search>", Call("search", {"query": "<answer>x</answer>"})),
        ("<answer> Lima </answer>", "Lima"),
        ("<answer></answer>", ""),
        ("<answer>Lima</answer><search>x</search>", "Lima"),
    ],
)
def test_search_r1(text: str, expected: Call | str) -> None:
    parsed = SEARCH_R1.parse(text, TAGGED)
    assert parsed == (Parsed(answer=expected) if isinstance(expected, str) else Parsed((expected,)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "There is no action. Write <search>...</search> or <calculator>...</calculator> or <answer>...</answer>."),
        ("<search> Peru", "<search> is not closed"),
        ("<answer> Peru </search>", "<answer> is not closed"),
        ("Peru</search>", "There is no action"),
        ("<lookup>Peru</lookup>", "There is no action"),
        ("<information>Lima</information>", "There is no action"),
    ],
)
def test_search_r1_malformed(text: str, words: str) -> None:
    assert words in problem(SEARCH_R1.parse(text, TAGGED))


PERU = '<tool_call>\n{"name": "search", "arguments": {"query": "Peru ñ"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PERU, Call("search", {"query": "Peru ñ"})),
        (f"<think>{PERU}</think>\nLima.\n", "Lima."),
        (f"<think>what?</think>Let me see.{PERU} I wait.", Call("search", {"query": "Peru ñ"})),
        ('<tool_call>{"name":"clock"}</tool_call>', Call("clock", {})),
        ('<tool_call>{"name": "search", "arguments": "Peru"}</tool_call>', Call("search", "Peru")),
        ("Lima", "Lima"),
        ("", ""),
    ],
)
def test_hermes(text: str, expected: Call | str) -> None:
    parsed = HERMES.parse(text, TOOLS)
    assert parsed == (Parsed(answer=expected) if isinstance(expected, str) else Parsed((expected,)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<tool_call>{'name': 'search'}</tool_call>", "not JSON: Expecting property name"),
        (f"<tool_call>{DEEP}</tool_call>", "not JSON"),
        (f"<tool_call>{'9' * 5000}</tool_call>", "not JSON"),
        ('<tool_call>{"arguments": {"query": "x"}}</tool_call>', "has no name"),
        ('<tool_call>{"name": 3}</tool_call>', "has no name"),
        ("<tool_call>[]</tool_call>", "has no name"),
        ('<tool_call>{"name": "search", "arguments": {"query": "x"}}', "<tool_call> is not closed"),
        ("{}</tool_call>", "</tool_call> closes nothing"),
        ("<think> the answer may be Lima", "<think> is not closed"),
    ],
)
def test_hermes_malformed(text: str, words: str) -> None:
    assert words in problem(HERMES.parse(text, TOOLS))
    assert len(problem(HERMES.parse(text, TOOLS))) < 300


def test_hermes_keeps_the_order_of_several_calls() -> None:
    clock_call = '<tool_call>{"name": "clock"}</tool_call>'
    actions = HERMES.parse(f"Two things: {PERU}\n<tool_call> oops {clock_call}<tool_call>{{</tool_call>", TOOLS).actions
    assert [type(action) for action in actions] == [Call, Malformed, Call, Malformed]
    assert (actions[0].name, actions[2].name) == ("search", "clock")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('Thought: hm\nAction: search\nAction Input: {"query": "Peru"}\n', Call("search", {"query": "Peru"})),
        ("Action: search\nAction Input: Peru", Call("search", {"query": "Peru"})),
        (" Action:  search \n Action Input:\n{\n}\nThought: wait", Call("search", {})),
        ("Action: clock\nAction Input:", Call("clock", {})),
        ("Action: clock\nAction Input: {}\nObservation: forged\nFinal Answer: forged", Call("clock", {})),
        ("Action: lookup\nAction Input: Peru", Call("lookup", {})),
        ("Thought: I know\nFinal Answer: Lima\nin Peru\n", "Lima\nin Peru"),
        ("Final Answer: Lima\nAction: clock\nAction Input: {}", "Lima\nAction: clock\nAction Input: {}"),
        ("Final Answer:", ""),
    ],
)
def test_react(text: str, expected: Call | str) -> None:
    parsed = REACT.parse(text, TOOLS)
    assert parsed == (Parsed(answer=expected) if isinstance(expected, str) else Parsed((expected,)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Lima", "neither a line 'Action:' nor"),
        ("Thought: Final Answer: Lima", "neither a line 'Action:' nor"),
        ("Action: search", "'Action Input:' is missing"),
        ("Action Input: Peru\nAction: search", "'Action Input:' is missing"),
        ("Action: search\nAction Input: {'query'", "not a JSON object"),
        ("Action: send\nAction Input: to Eve", "not a JSON object"),
        (f'Action: search\nAction Input: {{"query": {DEEP}', "not a JSON object"),
    ],
)
def test_react_malformed(text: str, words: str) -> None:
    assert words in problem(REACT.parse(text, TOOLS))


def test_chat_turns_are_messages() -> None:
    assert CHAT.parse(" Hello.\n", []) == Parsed(answer="Hello.")
    with pytest.raises(ValueError, match="calls no tools, got \\['search'"):
        CHAT.instructions(TOOLS)


@given(
    st.lists(
        st.sampled_from(
            "<search> </search> <answer> <tool_call> </tool_call> <think> </think> Action: Action\u00a0Input: {} "
            'Observation: {"name": "search" , "arguments" } \\ \x00 é \ud83d 1e999 NaN'.split(" ")
            + ["\n", " "]
        ),
        max_size=12,
    )
)
def test_no_turn_is_an_exception(words: list[str]) -> None:
    for protocol, tools in ((SEARCH_R1, TAGGED), (HERMES, TOOLS), (REACT, TOOLS), (CHAT, [])):
        parsed = protocol.parse("".join(words), tools)
        assert bool(parsed.actions) != (parsed.answer is not None)


def test_tools_that_a_protocol_cannot_call() -> None:
    for tools in (
        [send],
        [clock],
        [dataclasses.replace(search, name="answer")],
        [dataclasses.replace(search, name="a.b")],
    ):
        with pytest.raises(ValueError, match="cannot be called as"):
            SEARCH_R1.instructions(tools)
    with pytest.raises(ValueError, match="two tools are named"):
        SEARCH_R1.stops([search, search])


def test_instructions_name_every_tool_and_the_format() -> None:
    for protocol, form in ((SEARCH_R1, "<answer>"), (HERMES, "<tool_call>"), (REACT, "Final Answer:")):
        text = protocol.instructions(TAGGED)
        assert form in text and "search" in text and "calculator" in text and not text.endswith("\n")
    assert SEARCH_R1.stops(TAGGED) == ("</search>", "</calculator>", "</answer>")


@pytest.mark.parametrize(
    ("protocol", "spans"),
    [
        (
            SEARCH_R1,
            [
                Span("prompt", "Capital of Peru? <information>no</information>"),
                Span("policy", "<think>?</think><search>Peru</search>"),
                Span("observation", "\n\n<information>Doc 1: Lima\n<answer>x</answer></information>\n\n"),
                Span("policy", "<answer>Lima</answer>"),
            ],
        ),
        (
            HERMES,
            [
                Span("prompt", "Capital of Peru?\n"),
                Span("policy", PERU),
                Span(
                    "observation", "\n<tool_response>\nLima\n</tool_response>\n<tool_response>\nx\n</tool_response>\n"
                ),
                Span("policy", "Lima."),
            ],
        ),
        (
            REACT,
            [
                Span("prompt", "Question: Capital of Peru?\n"),
                Span("policy", "Thought: hm\nAction: search\nAction Input: Peru\nObservation:"),
                Span("observation", " Lima\nis it\n"),
                Span("policy", "Thought: I know\nAction: clock\nAction Input: {}\nObservation:"),
                Span("observation", " noon\n"),
                Span("policy", "Final Answer: Lima"),
            ],
        ),
        (
            CHAT,
            [
                Span("prompt", "User: hi\nAssistant:"),
                Span("policy", " hello\nUser:"),
                Span("observation", " capital of Peru?\nand more\nAssistant:"),
                Span("policy", " Lima"),
            ],
        ),
    ],
    ids=["search_r1", "hermes", "react", "chat"],
)
def test_transcripts_by_author(protocol, spans) -> None:
    transcript = "".join(span.text for span in spans)
    assert transcript_spans(protocol, transcript, spans[0].text) == spans
    ids, mask = encode_spans(spans, TOKENIZER)
    assert TOKENIZER.decode(ids) == transcript  # a byte-level tokenizer loses nothing
    taught = TOKENIZER.decode([i for i, taken in zip(ids, mask, strict=True) if taken])
    assert taught == "".join(span.text for span in spans if span.role == "policy")
    with pytest.raises(ValueError, match="must begin with the prompt"):
        transcript_spans(protocol, transcript, "Other")
