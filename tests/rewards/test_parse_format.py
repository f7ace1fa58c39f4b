import itertools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.rewards import (
    SELF_SEARCH_BLOCKS,
    TagGrammar,
    extract_boxed,
    extract_tag,
    extract_tags,
    parse_action,
    self_search_format_reward,
    self_search_format_reward_ids,
    tag_trace_ok,
)


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


def test_extract_boxed():
    assert extract_boxed(r"so \boxed{ 3 } or \boxed {\frac{1}{2}}.") == ["3", r"\frac{1}{2}"]
    assert extract_boxed(r"\boxed{a \boxed{b} c} \boxed{d}") == [r"a \boxed{b} c", "d"]
    assert extract_boxed(r"} \boxed{a \boxed{b}") == ["b"]  # the first is never closed
    assert extract_boxed(r"boxed{a} \boxed 3") == []


def trace(*tags):
    return "\n".join(f"<{tag}> {tag[0]} </{tag}>" for tag in tags)


T, S, INFO, A = SELF_SEARCH_BLOCKS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (trace(T, S, INFO, T, A), 1.0),
        (trace(T, A), 0.5),
        (trace(T, S, INFO, A), 0.25),
        (trace(T, S, INFO, T, S, INFO, T, A), 1.0),
        (trace(T, T, S, INFO, T, A), 2 / 3),
        (trace(*[T] * 8, A), 1 / 8),
        (trace(*[T] * 9, A), 0.0),
        (trace(T, S, T, A), 0.0),  # a search without information
        (trace(T, INFO, T, A), 0.0),
        (trace(S, INFO, T, A), 0.0),
        (trace(T, S, INFO, T), 0.0),
        (trace(A), 0.0),
        ("", 0.0),
        (trace(T, A) + "!", 0.0),
        (trace(T, "tool", A), 0.0),
        ("<think>is 1 < x > 0 ?</think><answer>yes</answer>", 0.5),
        ("<think> </think><answer>yes</answer>", 0.0),
        ("<think>a</think><search>b\nc</search><information>d</information><answer>e</answer>", 0.0),
        ("<think>a</think><search>Query</search><information>d</information><answer>e</answer>", 0.0),
        ("<think>a</think><search>b</search><information>d<answer>e</answer>", 0.0),
    ],
)
def test_self_search_format(text, expected):
    assert self_search_format_reward(text) == pytest.approx(expected)


def test_self_search_format_of_numbers_is_that_of_text():
    """All traces of up to four blocks, and three long ones."""
    rows = [row for n in range(5) for row in itertools.product(range(4), repeat=n)]
    rows += [(0, 1, 2, 0, 1, 2, 0, 3), (0,) * 8 + (3,), (0,) * 9 + (3,)]
    blocks = jnp.array([[*row, *[1] * (10 - len(row))] for row in rows])  # padding that would be a search
    scores = jax.jit(self_search_format_reward_ids)(blocks, jnp.array([len(row) for row in rows]))
    expected = [self_search_format_reward(trace(*(SELF_SEARCH_BLOCKS[kind] for kind in row))) for row in rows]
    assert scores.tolist() == pytest.approx(expected)
    assert sum(score > 0 for score in expected) == 6
    assert self_search_format_reward_ids(jnp.array([[0, 7, 3]]), jnp.array([3])) == 0
