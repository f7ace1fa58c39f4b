"""Arithmetic for policies: exact for whole numbers and fractions, and bounded in time and memory."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import simpleeval

from jaxrl_llm.tools.tool import Tool, ToolError, tool

_MAX_CHARACTERS = 1000
_MAX_BITS = 8192  # of a whole number: 2466 decimal digits
_MAX_DEPTH = 100
_MAX_FACTORIAL = 900  # whose result still has fewer than _MAX_BITS bits
# What people and models write for operators.
_SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**"})


def _bits(value: Any) -> int:
    if isinstance(value, Fraction):
        return value.numerator.bit_length() + value.denominator.bit_length()
    return value.bit_length() if isinstance(value, int) else 0


def _number(value: Any) -> Any:
    """`value` as a whole number if it is one, else as an exact fraction or a float."""
    if isinstance(value, Fraction) and value.denominator == 1:
        value = value.numerator
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
        raise ToolError(f"{type(value).__name__} is no number")
    if _bits(value) > _MAX_BITS:
        raise ToolError(f"the number is too large: exact results have at most {_MAX_BITS} bits")
    return value


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of numbers, with a number as its result."""
    return lambda *values: _number(function(*map(_number, values)))


def _divide(a: Any, b: Any) -> Any:
    return a / b if isinstance(a, float) or isinstance(b, float) else Fraction(a) / Fraction(b)


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(exponent, int) and not isinstance(base, float):
        if abs(exponent) * max(_bits(base), 1) > 2 * _MAX_BITS and abs(base) != 1 and base != 0:
            raise ToolError(f"the power is too large: exact results have at most {_MAX_BITS} bits")
        return Fraction(base) ** exponent
    result = float(base) ** float(exponent)
    if isinstance(result, complex):
        raise ToolError("a negative number to a power that is no whole number has no real value")
    return result


def _whole(value: Any, name: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int):
        raise ToolError(f"{name} takes whole numbers, got {value}")
    return value


def _factorial(n: Any) -> int:
    n = _whole(n, "factorial")
    if not 0 <= n <= _MAX_FACTORIAL:
        raise ToolError(f"factorial takes whole numbers from 0 to {_MAX_FACTORIAL}")
    return math.factorial(n)


def _choices(function: Callable[[int, int], int], name: str) -> Callable[[Any, Any], int]:
    def choose(n: Any, k: Any) -> int:
        n, k = _whole(n, name), _whole(k, name)
        if not (0 <= n <= 10_000 and 0 <= k <= _MAX_FACTORIAL):
            raise ToolError(f"{name}(n, k) takes n from 0 to 10000 and k from 0 to {_MAX_FACTORIAL}")
        return function(n, k)

    return choose


def _square_root(value: Any) -> Any:
    """Exact for squares of whole numbers."""
    if isinstance(value, int) and value >= 0 and math.isqrt(value) ** 2 == value:
        return math.isqrt(value)
    return math.sqrt(value)


def _round(value: Any, digits: Any = 0) -> Any:
    digits = _whole(digits, "round")
    if abs(digits) > 100:
        raise ToolError("round takes from -100 to 100 digits")
    return round(value, digits) if digits else round(value)


def _of_whole(function: Callable[..., int], name: str) -> Callable[..., int]:
    return lambda *values: function(*(_whole(value, name) for value in values))


_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divide,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(math, name) for name in ("sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh")},
    **{name: getattr(math, name) for name in ("tanh", "exp", "log", "log2", "log10", "floor", "ceil", "hypot")},
    **{name: getattr(math, name) for name in ("degrees", "radians")},
    **{"abs": abs, "min": min, "max": max, "round": _round, "sqrt": _square_root, "pow": _power, "ln": math.log},
    **{"factorial": _factorial, "comb": _choices(math.comb, "comb"), "perm": _choices(math.perm, "perm")},
    **{"gcd": _of_whole(math.gcd, "gcd"), "lcm": _of_whole(math.lcm, "lcm")},
}
_NAMES = {"pi": math.pi, "e": math.e, "tau": math.tau}
_NODES = (ast.Expression, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Call, ast.Name, ast.Load)


def evaluate(expression: str) -> int | float | Fraction:
    """Value of an arithmetic expression: whole numbers and their quotients exact, all else in floats.

    `^` is a power, as `**` is; `pi`, `e`, `tau` and the usual functions are known.

    Raises:
      ToolError: what is wrong with it, in words for the policy; nothing else, whatever the text.
    """
    text = expression.translate(_SPELLINGS).strip()
    if len(text) > _MAX_CHARACTERS:
        raise ToolError(f"the expression has {len(text)} characters; at most {_MAX_CHARACTERS} are read")
    try:
        tree = ast.parse(text, mode="eval")
        _check_tree(tree, 0)
        evaluator = simpleeval.SimpleEval(
            operators={kind: _checked(function) for kind, function in _OPERATORS.items()},
            functions={name: _checked(function) for name, function in _FUNCTIONS.items()},
            names=_NAMES,
        )
        value = _number(evaluator.eval(text, previously_parsed=tree.body))
    except ToolError:
        raise
    except SyntaxError as error:
        raise ToolError(f"no arithmetic expression: {error.msg}") from error
    except ZeroDivisionError as error:
        raise ToolError("division by zero") from error
    except OverflowError as error:
        raise ToolError("the result is too large") from error
    except simpleeval.NameNotDefined as error:
        raise ToolError(f"unknown name {error.name!r}; known are {', '.join(_NAMES)}") from error
    except simpleeval.FunctionNotDefined as error:
        raise ToolError(f"unknown function {error.func_name!r}; known are {', '.join(_FUNCTIONS)}") from error
    except (ValueError, TypeError, simpleeval.InvalidExpression, RecursionError, MemoryError) as error:
        raise ToolError(f"cannot be calculated: {error}") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise ToolError(f"the result is {value}, no finite number")
    return value


def _check_tree(node: ast.AST, depth: int) -> None:
    """Leaves numbers, operators, names and calls by name; simpleeval would take strings, comparisons and more."""
    if depth > _MAX_DEPTH:
        raise ToolError(f"the expression is nested more than {_MAX_DEPTH} deep")
    if isinstance(node, ast.operator | ast.unaryop):
        if type(node) not in _OPERATORS:
            raise ToolError(f"the operator {type(node).__name__} is not known; use + - * / // % ** and parentheses")
        return
    if isinstance(node, ast.Tuple):
        raise ToolError("a comma stands only between a function's arguments; write 1234, not 1,234")
    if not isinstance(node, _NODES):
        raise ToolError(f"{type(node).__name__} is no arithmetic; use numbers, operators, names and functions")
    if isinstance(node, ast.Constant):
        _number(node.value)
    if isinstance(node, ast.Call) and (node.keywords or not isinstance(node.func, ast.Name)):
        raise ToolError("functions are called by their name, with arguments in order")
    for child in ast.iter_child_nodes(node):
        _check_tree(child, depth + 1)


def number_text(value: int | float | Fraction) -> str:
    """Whole numbers in full, all else with 12 significant digits, which hides the rounding of binary fractions.

    Raises:
      ToolError: a fraction beyond the range of floats.
    """
    if isinstance(value, int):
        return str(value)
    try:
        rounded = float(value)
    except OverflowError:
        raise ToolError("the result is too large") from None
    if value and not rounded:
        raise ToolError("the result is too close to zero")
    return f"{rounded:.12g}"


def calculator_tool(*, name: str = "calculator") -> Tool:
    """A tool that evaluates an arithmetic expression and returns the number."""

    def calculator(expression: str) -> str:
        """Evaluates an arithmetic expression, exactly for whole numbers, and returns the number.

        Args:
          expression: such as 3 * (17 + 4) / 2 or sqrt(2) ** 3; with + - * / // % **, parentheses, pi, e, and
            functions such as sqrt, log, exp, sin, round, factorial, comb, gcd, min, max.
        """
        return number_text(evaluate(expression))

    return tool(calculator, name=name)
