"""Mathematical answers: equal forms, other values, GSM8K's own, and expressions that never come to an end."""

import concurrent.futures
import json
import math
from pathlib import Path

import pytest

from jaxrl_llm.rewards import boxed_containment_reward, math_equal

PROBLEMS = Path(__file__).parents[2] / "jaxrl_llm" / "data" / "gsm8k" / "test.jsonl"


@pytest.mark.parametrize(
    "pred, gold, equal",
    [
        ("72.", "72", True),
        ("$1,080", "1080", True),
        ("-5", "−5", True),
        (r"The total is \boxed{\frac{1}{2}}, I think of 3.", "0.5", True),
        ("50%", "1/2", True),
        ("1 + x^2", "x^2+1", True),
        ("x = 3", "3", True),
        (r"\{2, 1\}", "{1,2}", True),
        ("3 1/2", "3.5", True),
        ("3 1/2", "2", False),
        ("18 dollars", "18", True),
        ("She sold 48 clips and then 24, so the answer is 72 clips.", "72", True),
        ("2 + 2 = 4\n#### 4\nand no more", "4", True),
        ("0.333", "1/3", False),
        ("71", "72", False),
        ("I do not know", "72", False),
        ("", "0", False),
    ],
)
def test_math_equal(pred, gold, equal):
    assert math_equal(pred, ["999", gold]) == float(equal)


def test_worked_answers_of_gsm8k():
    """Every worked solution is right by its own answer and wrong by another; all 8,792 rows were tried by hand."""
    for line in PROBLEMS.read_text().splitlines():
        solution = json.loads(line)["answer"]
        gold = solution.rpartition("####")[2].strip()
        assert math_equal(solution, [gold]) == 1
        assert math_equal(rf"So we get \boxed{{{gold}}}.", [gold.replace(",", "")]) == 1
        assert math_equal(solution, [str(int(gold.replace(",", "")) + 1)]) == 0


def test_what_never_ends_is_given_up_and_threads_may_ask():
    """The tower takes all its processor time, in one multiplication; whoever waits behind it is served afterwards."""
    jobs = [("9^{9^{9^9}}", "3"), ("4", "4"), (r"\boxed{1/4}", "0.25"), ("5", "4")]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda job: math_equal(job[0], [job[1]], cpu_seconds=1), jobs))
    assert math.isnan(results[0]) and results[1:] == [1, 1, 0]


def test_golds_must_be_mathematics():
    with pytest.raises(ValueError, match="gold answer '' cannot be read as mathematics; compare text with exact_match"):
        math_equal("3", ["3", ""])
    with pytest.raises(ValueError, match="golds is empty"):
        math_equal("3", [])
    with pytest.raises(ValueError, match="cpu_seconds must be at least 1"):
        math_equal("3", ["3"], cpu_seconds=0)


def test_boxed_containment():
    """LoongRL's five, and each bound from both sides."""
    assert boxed_containment_reward(r"The answer is \boxed{Paris}", ["Paris"]) == 1
    assert boxed_containment_reward(r"\boxed{the city of Paris, France}", ["Paris"]) == 1
    assert boxed_containment_reward(r"\boxed{Paris} or \boxed{Paris}", ["Paris"]) == 0
    assert boxed_containment_reward(r"\boxed{Paris}" + "x" * 41, ["Paris"]) == 0
    assert boxed_containment_reward(r"\boxed{Par}", ["Paris"], two_way=False) == 0
    assert boxed_containment_reward(r"\boxed{Par}", ["Paris"]) == 1
    assert boxed_containment_reward(r"\boxed{Pa}", ["Paris"]) == 0  # too short to count as a part of the gold
    assert boxed_containment_reward(r"\boxed{Pa}", ["Rome", "PA!"]) == 1  # but equal
    assert boxed_containment_reward(r"\boxed{Paris}" + "x" * 31 + "  ", ["Paris"]) == 1
    assert boxed_containment_reward(r"\boxed{Paris}" + "x" * 32, ["Paris"]) == 0
    assert boxed_containment_reward(r"\boxed{" + "Paris" + "x" * 128 + "}", ["Paris"]) == 1
    assert boxed_containment_reward(r"\boxed{" + "Paris" + "x" * 129 + "}", ["Paris"]) == 0
    assert boxed_containment_reward(r"\boxed{\text{Paris}}", ["Paris"]) == 1
    assert boxed_containment_reward(r"\boxed{\text{Paris}, {France}}", ["Paris"]) == 0
    assert boxed_containment_reward(r"\boxed{}", ["Paris"]) == boxed_containment_reward("Paris", ["Paris"]) == 0
    assert boxed_containment_reward(r"\boxed{Par", ["Paris"]) == 0
    assert boxed_containment_reward(r"\boxed{well-known}", ["Well known"]) == 1
    with pytest.raises(ValueError, match="normalizes to the empty string"):
        boxed_containment_reward(r"\boxed{Paris}", ["!"])
