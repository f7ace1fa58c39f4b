"""The calculator: exact, bounded, and never an exception other than ToolError."""

import math
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.tools import ToolError, call_tool
from jaxrl_llm.tools.calculator import calculator_tool, evaluate, number_text


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("3 * (17 + 4) / 2", "31.5"),
        ("1/3 + 1/3 + 1/3", "1"),
        ("0.1 + 0.2", "0.3"),
        ("2^10 − 3×8÷4", "1018"),
        ("10**20 + 1", "100000000000000000001"),
        ("-7 // 2", "-4"),
        ("2 ** -2", "0.25"),
        ("sqrt(10**40)", str(10**20)),
        ("factorial(20) / factorial(18)", "380"),
        ("comb(52, 5)", "2598960"),
        ("round(2 / 3, 2)", "0.67"),
        ("gcd(12, 18) + lcm(4, 6)", "18"),
        ("log(e ** 2) + cos(pi)", "1"),
        ("1e3", "1000"),
    ],
)
def test_values(expression: str, expected: str) -> None:
    assert call_tool([calculator_tool()], "calculator", {"expression": expression}) == (expected, None)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "no arithmetic expression"),
        ("1/0", "division by zero"),
        ("1,234 * 2", "write 1234"),
        ("9**9**9", "power is too large"),
        ("(10**2000) * (10**2000)", "too large"),
        ("factorial(10**9)", "0 to 900"),
        ("2.0**5000", "too large"),
        ("1e308 * 10", "no finite number"),
        ("(-8) ** (1/3)", "no real value"),
        ("sqrt(-1)", "math domain error"),
        ("x + 1", "unknown name 'x'; known are pi"),
        ("f(1)", "unknown function 'f'; known are sin"),
        ("'a' * 10**9", "str is no number"),
        ("True + 1", "bool is no number"),
        ("__import__('os').system('id')", "called by their name"),
        ("pi.__class__", "Attribute is no arithmetic"),
        ("[1] * 10", "List is no arithmetic"),
        ("1 << 10**9", "operator LShift"),
        ("round(1/3, 10**9)", "-100 to 100 digits"),
        ("(" * 400 + "1" + ")" * 400, "no arithmetic expression"),
        ("-" * 400 + "1", "nested"),
        ("1" * 2000, "2000 characters"),
        ("min()", "cannot be calculated"),
        ("(1/3) ** 2500", "close to zero"),
    ],
)
def test_errors(expression: str, message: str) -> None:
    start = time.process_time()  # processor time, which other processes do not lengthen
    result = call_tool([calculator_tool()], "calculator", {"expression": expression})
    assert result.error == "failed" and message in result.text, result
    assert time.process_time() - start < 1.0


_TOKENS = st.sampled_from(
    "0 1 2 9 10 0.5 1e300 999999999999 + - * / // % ** ^ ( ) , . pi e sqrt( factorial( round( comb( pow( log( "
    "'a' [ ] x = < lambda if else : 1j True None \x00 \ud800 \n # ÷".split(" ")
)


@settings(max_examples=300)
@given(st.lists(_TOKENS, max_size=20).map("".join) | st.text(max_size=40))
def test_nothing_but_numbers_and_tool_errors(expression: str) -> None:
    start = time.process_time()
    try:
        value = evaluate(expression)
        text = number_text(value)
    except ToolError:
        return
    finally:
        assert time.process_time() - start < 2.0
    assert isinstance(value, int | float | Fraction) and not isinstance(value, bool)
    assert math.isfinite(float(text)) or isinstance(value, int)


@settings(max_examples=50, deadline=None)
@given(st.integers(-(10**30), 10**30), st.integers(-(10**30), 10**30), st.integers(1, 10**6))
def test_whole_numbers_and_quotients_are_exact(a: int, b: int, c: int) -> None:
    assert evaluate(f"({a}) * ({b}) + ({a}) / {c}") == a * b + Fraction(a, c)
