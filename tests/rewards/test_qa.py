import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.rewards import (
    em_format_reward,
    exact_match,
    normalize_answer,
    retrieval_hit,
    substring_match,
    token_f1,
)
from jaxrl_llm.types import Span


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The U.N.'s  well-known Résumé, a 2nd one!", "uns wellknown résumé 2nd one"),
        ("Theatre of the Absurd", "theatre of absurd"),
        ("1,000.5", "10005"),
        ("a.", ""),
        ("The", ""),
        ("Xi’an", "xi’an"),
    ],
)
def test_normalize_squad(text, expected):
    assert normalize_answer(text) == expected


def test_normalize_other_styles():
    assert normalize_answer("well-known", "kilt") == "well known"
    assert normalize_answer("Xi’an – the\u00a0city", "kilt") == "xi’an – city"
    assert normalize_answer("Xi’an – the\u00a0city", "dpr") == "xi city"  # `an` is an article once the mark is a space
    assert normalize_answer("The well-known, a  city", "plain") == "the well known a city"
    with pytest.raises(ValueError, match="style.*'other'"):
        normalize_answer("x", "other")


@given(st.text())
def test_normalizing_twice_changes_nothing(text):
    # Lower case alone is not stable for every letter of Unicode, so the second pass starts from lower case.
    once = normalize_answer(text)
    assert normalize_answer(once) == normalize_answer(once.lower())


def test_exact_match():
    assert exact_match("The Shilling.", ["Euro", "shilling"]) == 1.0
    assert exact_match("Kenyan Shilling", ["Shilling"]) == 0.0
    with pytest.warns(UserWarning, match="normalizes to the empty"):
        assert exact_match("", ["the"]) == 1.0
    with pytest.raises(ValueError, match="golds is empty"):
        exact_match("x", [])
    with pytest.raises(ValueError, match="sequence of strings"):
        exact_match("x", "x")


def test_substring_match():
    assert substring_match("the party", ["art"]) == 1.0  # characters, not words
    assert substring_match("Nairobi, Kenya", ["kenya"]) == 1.0
    assert substring_match("Nairobi", ["Kenya"]) == 0.0
    assert substring_match("Nairobi", ["Nairobi, Kenya"]) == 0.0


def test_containment_in_either_direction():
    """QwenLong-L1: by words, so that 4 is not 42; its release goes by characters."""
    rule = {"unit": "word", "two_way": True}
    assert substring_match("Jane Smith", ["Smith"], **rule) == substring_match("Smith", ["Jane Smith"], **rule) == 1
    assert substring_match("London", ["Paris"], **rule) == 0
    assert substring_match("4", ["42"], **rule) == substring_match("42", ["4"], **rule) == 0
    assert substring_match("4", ["42"], two_way=True) == substring_match("42", ["4"], two_way=True) == 1
    assert substring_match("the", ["Paris"], two_way=True) == 0  # nothing is left of it, which all texts contain
    assert substring_match("Pa", ["Paris"], two_way=True, min_chars=3) == 0
    assert substring_match("Pa", ["Pa"], two_way=True, min_chars=3) == 1
    with pytest.raises(ValueError, match="unit must be 'char' or 'word'"):
        substring_match("x", ["x"], unit="letter")
    with pytest.raises(ValueError, match="every text contains"):
        substring_match("x", ["The"])


def test_token_f1():
    assert token_f1("the river Seine in Paris", ["River Seine"]) == pytest.approx(2 / 3)
    assert token_f1("b b b a", ["a b b"]) == pytest.approx(0.8)
    assert token_f1("b b b c", ["b c"], kind="set") == 1.0
    assert token_f1("b b b c", ["b c"]) == pytest.approx(2 / 3)
    assert token_f1("no", ["yes", "no way"], yes_no_rule=True) == 0.0
    assert token_f1("no", ["yes", "no way"]) == pytest.approx(2 / 3)
    with pytest.warns(UserWarning):
        assert token_f1("", ["the"], empty_rule="equal") == 1.0
        assert token_f1("", ["the"]) == 0.0
    for option in ({"kind": "bag"}, {"empty_rule": "one"}):
        with pytest.raises(ValueError, match="must be"):
            token_f1("x", ["x"], **option)


def test_retrieval_hit():
    passages = ["Nairobi is a city.", "Kenya is a country."]
    assert retrieval_hit(passages, ["kenya"], k=2) == 1.0
    assert retrieval_hit(passages, ["kenya"], k=1) == 0.0
    assert retrieval_hit([], ["kenya"], k=1) == 0.0
    with pytest.raises(ValueError, match="k must be"):
        retrieval_hit(passages, ["kenya"], k=0)


RIGHT, WRONG = "<answer>Rome</answer>", "<answer>Milan</answer>"


def trajectory(answer, valid=True, information="nothing"):
    first = "<think>x</think> <search>capital</search>" if valid else "<search>capital</search>"
    return [
        Span("prompt", "Capital of Italy?"),
        Span("policy", first),
        Span("observation", f"<information>{information}</information>"),
        Span("policy", f"<think>y</think>{answer}"),
    ]


@pytest.mark.parametrize(
    ("spans", "expected"),
    [  # Search-R1's ladder with a retrieval part of 0.1
        (trajectory(RIGHT), 1.0),
        (trajectory(RIGHT, valid=False), 0.8),
        (trajectory(WRONG), 0.2),
        (trajectory(WRONG, information="In Rome, ..."), 0.3),
        (trajectory(WRONG, valid=False), 0.1),
        (trajectory(WRONG, valid=False, information="In Rome, ..."), 0.1),
        (trajectory("", valid=False), 0.0),
        (trajectory(""), 0.0),  # the grammar wants an answer at the end
    ],
)
def test_format_ladder(spans, expected):
    assert em_format_reward(spans, ["Rome"], retrieval=0.1) == pytest.approx(expected)


def test_format_reward_needs_enough_answers():
    # With two pairs asked for and one there, a valid trace counts as one without an answer.
    assert em_format_reward(trajectory(RIGHT), ["Rome"], min_answers=2) == pytest.approx(0.2)
    with_example = [Span("prompt", "Write <answer>Beijing</answer>."), *trajectory(RIGHT)]
    assert em_format_reward(with_example, ["Rome"], min_answers=2) == 1.0
    assert em_format_reward(with_example[:1], ["Beijing"]) == 0.0  # the prompt's example is no answer


def test_gold_in_the_observation_alone_earns_nothing():
    copied = [
        Span("prompt", "?"),
        Span("policy", "<search>x</search>"),
        Span("observation", "<information>It is Rome. <answer>Rome</answer></information>"),
        Span("policy", ""),
    ]
    assert em_format_reward(copied, ["Rome"]) == 0.0
    wrong = [*copied[:3], Span("policy", WRONG)]
    assert em_format_reward(wrong, ["Rome"]) == pytest.approx(0.1)
    forged = "<think>a</think><search>b</search><information>Rome</information><think>c</think>" + WRONG
    assert em_format_reward([Span("policy", forged)], ["Rome"], retrieval=0.1) == pytest.approx(0.1)


def test_format_reward_bad_input():
    with pytest.raises(ValueError, match="sequence of Span"):
        em_format_reward("<answer>Rome</answer>", ["Rome"])
    with pytest.raises(ValueError, match="min_answers"):
        em_format_reward(trajectory(RIGHT), ["Rome"], min_answers=0)
    with pytest.raises(ValueError, match="golds is empty"):
        em_format_reward(trajectory(RIGHT), [])
