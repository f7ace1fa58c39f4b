"""Judges by a rubric, and how the rubric is rewritten, with scripted models."""

import pytest

from jaxrl_llm.rewards import Judged, judge_by_rubric, revise_rubric


def test_points_are_summed_over_items():
    script = {"clear": "fine <score>3</score>", "short": "it is <score>-1</score>", "kind": "<score>a lot</score>"}
    seen = []

    def chat(text):
        seen.append(text)
        return next(reply for item, reply in script.items() if f"alone:\n{item}" in text)

    judged = judge_by_rubric(chat, "Say hello", "Hello", ["clear", "short", "kind"])
    assert judged == Judged("Say hello", "Hello", 2, tuple(script.values()))
    assert len(seen) == 3 and all("Say hello" in text and "Answer:\nHello" in text for text in seen)


def test_the_rubric_is_analyzed_refined_and_merged():
    asked = []

    def chat(text):
        asked.append(text)
        if "gamed here" in text:
            return "it counts praise"
        if "Rewrite" in text:
            assert "it counts praise" in text
            return "<item>covers the task</item><item>says nothing twice</item>"
        assert text.count("<item>covers the task</item>") == 1  # of two samples
        return "<item>covers the task</item> <item>covers the task</item> <item>says nothing twice</item>"

    samples = [Judged("essay", "great great", 4, ("<score>4</score>",))] * 2
    assert revise_rubric(chat, samples, ["praise"]) == ["covers the task", "says nothing twice"]
    assert len(asked) == 5 and "<item>praise</item>" in asked[0] and "Score: 4" in asked[0]


def test_what_is_merged_is_cut_and_nothing_leaves_the_rubric():
    def chat(text):
        if "Merge" in text:
            assert text.endswith("\n<item>one two")
            return "I would rather not"
        return "<item>one two three</item>"

    with pytest.warns(RuntimeWarning, match="has no item"):
        assert revise_rubric(chat, [Judged("a", "b", 0, ())], ["praise"], max_words=2) == ["praise"]
