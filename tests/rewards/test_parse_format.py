import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.rewards import TagGrammar, extract_tag, extract_tags, parse_action, tag_trace_ok


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<search> Kenya </search>", ("search", "Kenya")),
        ("<think>x</think><answer>a\nb</answer>", ("answer", "a\nb")),
        ("<search>Kenya", ("invalid", "")),
        ("Kenya</search>", ("invalid", "")),
        ("</search><search>", ("invalid", "")),
        ("", ("invalid", "")),
        ("<answer>x</answer><search>y</search>", ("answer", "x")),
        ("<search>y</search><answer>x</answer>", ("search", "y")),
        ("<search>a <answer>b</answer>", ("answer", "b")),  # the search is not closed
        ("<search>a <answer>b</answer></search>", ("search", "a <answer>b</answer>")),
        ("<search>a<search>b</search></search>", ("search", "a<search>b")),
        ("<search></search>", ("search", "")),
    ],
)
def test_parse_action(text, expected):
    assert parse_action(text) == expected


def test_parse_action_other_tags():
    assert parse_action("<call>f()</call>", tags=("call",)) == ("call", "f()")


def test_extract_tag():
    text = "<answer>a</answer> <answer> b </answer> <answer>c"
    assert extract_tags(text, "answer") == ["a", "b"]
    assert extract_tag(text, "answer") == "b"
    assert extract_tag(text, "answer", which="first") == "a"
    assert extract_tag(text, "search") is None
    with pytest.raises(ValueError, match="angle brackets"):
        extract_tag(text, "<answer>")
    with pytest.raises(ValueError, match="which"):
        extract_tag(text, "answer", which="middle")


SEARCH = "<think>a</think><search>b</search><information>c</information>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>b</answer>", True),
        (f" {SEARCH}\n<think>d</think> <answer>e</answer>\n", True),
        (SEARCH * 3 + "<think>d</think><answer>e</answer>", True),
        (SEARCH + "<answer>e</answer>", False),
        ("<answer>b</answer>", False),
        ("<think>a</think>", False),
        ("<think>a</think>b<answer>c</answer>", False),
        ("<think>a</think><answer>b</answer>c", False),
        ("<think>a</think><answer>b</answer><answer>b</answer>", False),
        ("<think>a<think>b</think></think><answer>c</answer>", False),
        ("<think>a</think><answer>b", False),
        ("<think>a</answer><answer>b</think>", False),
        ("</think><think>a</think><answer>b</answer>", False),
        ("<think>a < b <i>x</i></think><answer>b</answer>", True),  # other tags are text
        ("", False),
    ],
)
def test_tag_trace_ok(text, expected):
    assert tag_trace_ok(text) is expected


def test_own_grammar():
    thoughtless = TagGrammar(
        {
            "start": frozenset({"search", "answer"}),
            "search": frozenset({"information"}),
            "information": frozenset({"search", "answer"}),
            "answer": frozenset({"end"}),
        }
    )
    assert tag_trace_ok("<search>a</search><information>b</information><answer>c</answer>", thoughtless)
    assert not tag_trace_ok("<think>x</think><answer>c</answer>", thoughtless)
    with pytest.raises(ValueError, match="start"):
        TagGrammar({"think": frozenset({"end"})})
    with pytest.raises(ValueError, match="'call'"):
        TagGrammar({"start": frozenset({"call"})})


@given(st.lists(st.sampled_from(["<search>", "</search>", "<answer>", "</answer>", "<think>", "</think>", "x", " "])))
def test_broken_tags_never_raise(pieces):
    text = "".join(pieces)
    action, content = parse_action(text)
    assert action == "invalid" or f"<{action}>" in text and content in text
    if tag_trace_ok(text):
        assert action == "answer"
