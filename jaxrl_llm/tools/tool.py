"""What a tool is: a named function from JSON arguments to text, and how a policy's call of one is carried out.

Time-outs, retries, call budgets and output caps are no business of this module: the environment that runs the episode
holds them, for all tools alike.
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, Literal, NamedTuple, overload

import jsonschema

# What every protocol can write: a name without spaces, quotes, brackets or slashes.
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TYPE_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
_MESSAGE_CHARACTERS = 300  # jsonschema repeats the value that it rejects, which may be as long as a turn


class ToolError(Exception):
    """Raised by a tool for what the policy should read: its text becomes the observation."""


class ToolResult(NamedTuple):
    """What a call returned.

    Attributes:
      text: the observation, always text that encodes as UTF-8.
      error: None, or why there is no result: "unknown_tool", "bad_arguments", "failed" (the tool raised), "not_text".
        An environment adds "timeout", "over_budget" and "malformed" (what the policy wrote could not be read).
    """

    text: str
    error: Literal["unknown_tool", "bad_arguments", "failed", "not_text", "timeout", "over_budget", "malformed"] | None


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function that a policy may call.

    Attributes:
      name: 1 to 64 of the characters A-Z a-z 0-9 _ . -
      description: what it does, for the prompt.
      parameters: JSON schema of an object, whose properties are the keyword arguments.
      call: `call(**arguments) -> str`, plain or async. It raises `ToolError` for what the policy should read.

    Raises:
      ValueError: a name that a protocol cannot write, an empty description, or parameters that are no such schema.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    call: Callable[..., Any]
    _validator: Any = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(
                f"tool name {self.name!r}: expected 1 to 64 of the characters A-Z a-z 0-9 _ . -; rename it"
            )
        if not isinstance(self.description, str) or not self.description.strip():
            raise ValueError(
                f"tool {self.name}: the description is empty; say what it does, as prompts are made from it"
            )
        if not callable(self.call):
            raise ValueError(f"tool {self.name}: call must be a function, got {type(self.call).__name__}")
        parameters = self.parameters
        if not isinstance(parameters, Mapping) or parameters.get("type") != "object":
            raise ValueError(
                f"tool {self.name}: parameters must be a JSON schema with 'type': 'object', got {parameters!r:.200}"
            )
        try:
            copy = json.loads(json.dumps(dict(parameters)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"tool {self.name}: parameters must be JSON, {error}") from error
        remote = [target for target in _references(copy) if not target.startswith("#")]
        if remote:
            raise ValueError(f"tool {self.name}: parameters refer to {remote[0]!r}; write that schema out in place")
        validator = jsonschema.validators.validator_for(copy, default=jsonschema.Draft202012Validator)
        try:
            validator.check_schema(copy)
        except jsonschema.SchemaError as error:
            raise ValueError(f"tool {self.name}: parameters are no JSON schema: {error.message:.200}") from error
        object.__setattr__(self, "parameters", copy)  # what the caller does to its own object changes nothing here
        object.__setattr__(self, "_validator", validator(copy))

    def argument_errors(self, arguments: Any) -> list[str]:
        """What is wrong with `arguments`, in words; empty if they fit the schema."""
        if not isinstance(arguments, Mapping):
            return [f"arguments must be a JSON object, got {type(arguments).__name__}"]
        found = []
        for error in self._validator.iter_errors(dict(arguments)):
            place = ".".join(str(part) for part in error.absolute_path)
            found.append(f"{place}: {_shortened(error.message)}" if place else _shortened(error.message))
        return found


def _references(schema: Any) -> Iterator[str]:
    """Targets of all `$ref` in a schema."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key in ("$ref", "$dynamicRef") and isinstance(value, str):
                yield value
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _shortened(message: str) -> str:
    """`message` with its middle left out where it is long: both the value and what is wrong with it stay."""
    if len(message) <= _MESSAGE_CHARACTERS:
        return message
    return message[: _MESSAGE_CHARACTERS // 2] + " ... " + message[-_MESSAGE_CHARACTERS // 2 :]


@overload
def tool(function: Callable[..., Any], *, name: str | None = None, description: str | None = None) -> Tool:
    """As `tool(function)` and as a plain `@tool`."""


@overload
def tool(*, name: str | None = None, description: str | None = None) -> Callable[[Callable[..., Any]], Tool]:
    """As `@tool(name=...)`."""


def tool(
    function: Callable[..., Any] | None = None, *, name: str | None = None, description: str | None = None
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """A tool from a function: the schema from its type hints and defaults, the texts from its docstring.

    Use it as `@tool`, `@tool(name=...)` or `tool(function)`. Hints may be `str`, `int`, `float`, `bool`, `None`, `Any`,
    `Literal`, unions, and lists and dicts (with string keys) of these. The docstring's text before "Args:" is the
    description; a line `argument: text` under "Args:" describes that argument.

    Raises:
      ValueError: an argument without a hint, with a hint that JSON cannot express or that has no name of its own
        (`*args`, `**kwargs`, positional only), or no description.
    """
    if function is None:
        return lambda decorated: tool(decorated, name=name, description=description)
    name = name or str(getattr(function, "__name__", type(function).__name__))
    text, argument_texts = _parse_docstring(inspect.getdoc(function) or "")
    properties: dict[str, Any] = {}
    required = []
    hinted = function if inspect.isroutine(function) else type(function).__call__
    try:
        hints = typing.get_type_hints(hinted)
    except NameError as error:
        raise ValueError(
            f"tool {name}: a type hint cannot be read here: {error}; define its type in the module"
        ) from error
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"tool {name}: argument {parameter} cannot be passed by name; give it a name of its own")
        if parameter.name not in hints:
            raise ValueError(
                f"tool {name}: argument {parameter.name!r} has no type hint; the schema is made from hints"
            )
        schema = _schema_of_hint(hints[parameter.name], f"tool {name}: argument {parameter.name!r}")
        if parameter.name in argument_texts:
            schema["description"] = argument_texts[parameter.name]
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        else:
            schema["default"] = parameter.default
        properties[parameter.name] = schema
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return Tool(name, description or text, parameters, function)


def _schema_of_hint(hint: Any, where: str) -> dict[str, Any]:
    """JSON schema of the values of a type hint; `where` names it in the error."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if hint in _TYPE_NAMES:
        return {"type": _TYPE_NAMES[hint]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema_of_hint(argument, where) for argument in arguments]}
    if hint is list or origin in (list, Sequence):
        return {"type": "array", **({"items": _schema_of_hint(arguments[0], where)} if arguments else {})}
    if hint is dict or (origin in (dict, Mapping) and arguments[0] is str):
        values = {"additionalProperties": _schema_of_hint(arguments[1], where)} if arguments else {}
        return {"type": "object", **values}
    raise ValueError(
        f"{where} has the type hint {hint!r}, which no JSON value has; use str, int, float, bool, list, dict"
    )


def _parse_docstring(docstring: str) -> tuple[str, dict[str, str]]:
    """The text before the first section, and the text of each argument under "Args:"."""
    text, *sections = re.split(r"\n(?=(?:Args|Arguments|Returns|Raises|Yields|Examples?):[ \t]*(?:\n|$))", docstring)
    arguments: dict[str, str] = {}
    for section in sections:
        heading, _, body = section.partition("\n")
        if heading.strip() not in ("Args:", "Arguments:"):
            continue
        body = inspect.cleandoc(body)
        # An entry starts at the margin; lines that continue it are indented further.
        for entry in re.split(r"\n(?=\S)", body):
            match = re.match(r"(\w+)(?:\s*\([^)]*\))?:\s*(.*)", entry, flags=re.DOTALL)
            if match:
                arguments[match[1]] = " ".join(match[2].split())
    return " ".join(text.split()), arguments


def check_tools(tools: Sequence[Tool]) -> dict[str, Tool]:
    """The tools by name.

    Raises:
      ValueError: two of them have one name.
    """
    by_name: dict[str, Tool] = {}
    for entry in tools:
        if entry.name in by_name:
            raise ValueError(f"two tools are named {entry.name!r}; a call could mean either, so rename one")
        by_name[entry.name] = entry
    return by_name


def _refuse(tools: Sequence[Tool], name: str, arguments: Any) -> tuple[Tool | None, ToolResult | None]:
    """The tool that a call names, or the observation that says why there is no such call."""
    by_name = check_tools(tools)
    chosen = by_name.get(name) if isinstance(name, str) else None
    if chosen is None:
        known = ", ".join(by_name) or "none"
        near = difflib.get_close_matches(str(name)[:64], by_name, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return None, _error("unknown_tool", f"there is no tool {str(name)[:64]!r}.{hint} Tools: {known}")
    try:
        wrong = chosen.argument_errors(arguments)
    except RecursionError:
        wrong = ["arguments are nested too deeply"]
    if wrong:
        text = "; ".join(wrong[:5])
        return None, _error("bad_arguments", f"wrong arguments for {name}: {text}. Expected: {signature_text(chosen)}")
    return chosen, None


def _error(kind: Any, text: str) -> ToolResult:
    return ToolResult(_encodable(f"Error: {text}"), kind)


def _encodable(text: str) -> str:
    """`text` with a question mark for each half of a surrogate pair, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _raised(name: str, error: Exception) -> ToolResult:
    text = str(error) if isinstance(error, ToolError) else f"{name} failed: {type(error).__name__}: {error}"
    return _error("failed", text)


def _returned(name: str, value: Any) -> ToolResult:
    if isinstance(value, str):
        return ToolResult(_encodable(value), None)
    return _error("not_text", f"{name} returned {type(value).__name__}, which is no text")


def call_tool(tools: Sequence[Tool], name: str, arguments: Mapping[str, Any]) -> ToolResult:
    """Carries out a policy's call, and blocks until it has returned.

    Whatever the policy did wrong, and whatever exception the tool raises, is a result with `error` set; exceptions that
    are no `Exception`, such as KeyboardInterrupt, pass through.

    Raises:
      ValueError: two tools have one name.
      RuntimeError: the tool is async and the calling thread runs an event loop; use `call_tool_async` there.
    """
    chosen, refusal = _refuse(tools, name, arguments)
    if chosen is None:
        assert refusal is not None
        return refusal
    if inspect.iscoroutinefunction(chosen.call) and _loop_runs_here():
        raise RuntimeError(f"tool {name} is async and this thread runs an event loop; await call_tool_async(...)")
    try:
        value = chosen.call(**arguments)
        if inspect.isawaitable(value):
            value = asyncio.run(_wait(value))
    except Exception as error:
        return _raised(name, error)
    return _returned(name, value)


def _loop_runs_here() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _wait(awaitable: Any) -> Any:
    return await awaitable


async def call_tool_async(
    tools: Sequence[Tool], name: str, arguments: Mapping[str, Any], *, executor: Executor | None = None
) -> ToolResult:
    """`call_tool` for an event loop: awaits an async tool and runs a plain one in a thread.

    Args:
      executor: where plain tools run; None is the loop's own, which has few threads (four more than there are cores).

    Raises:
      ValueError: two tools have one name.
    """
    chosen, refusal = _refuse(tools, name, arguments)
    if chosen is None:
        assert refusal is not None
        return refusal
    call, given = chosen.call, dict(arguments)
    try:
        if inspect.iscoroutinefunction(call):
            value = await call(**given)
        else:
            value = await asyncio.get_running_loop().run_in_executor(executor, lambda: call(**given))
            if inspect.isawaitable(value):
                value = await value
    except Exception as error:
        return _raised(name, error)
    return _returned(name, value)


def signature_text(described: Tool) -> str:
    """One line such as `search(query: string, k: integer = 3)`."""
    required = described.parameters.get("required", ())
    parts = []
    for name, schema in described.parameters.get("properties", {}).items():
        part = f"{name}: {_type_text(schema)}"
        if isinstance(schema, Mapping) and "default" in schema:
            part += f" = {json.dumps(schema['default'], ensure_ascii=False)}"
        elif name not in required:
            part += " (optional)"
        parts.append(part)
    return f"{described.name}({', '.join(parts)})"


def _type_text(schema: Any) -> str:
    if not isinstance(schema, Mapping):
        return "any"
    if "enum" in schema:
        return " | ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    if "anyOf" in schema:
        return " | ".join(_type_text(choice) for choice in schema["anyOf"])
    kind = schema.get("type", "any")
    if kind == "array" and "items" in schema:
        return f"array of {_type_text(schema['items'])}"
    return " | ".join(kind) if isinstance(kind, list) else str(kind)


def render_tools(tools: Sequence[Tool], style: Literal["hermes", "react", "plain"]) -> str:
    """The tools' documentation for a prompt, from their schemas; every line ends in a newline.

    Args:
      style: "hermes" is the block between `<tools>` tags that Hermes and Qwen models were trained on, a line of JSON
        for each tool; "react" a line for each with its parameters as JSON, and a line with all names; "plain" a
        signature for each, with the descriptions of the tool and of its arguments under it.

    Raises:
      ValueError: two tools have one name, or the style is unknown.
    """
    check_tools(tools)
    if style == "hermes":
        lines = ["<tools>", *(json.dumps(tool_schema(entry), ensure_ascii=False) for entry in tools), "</tools>"]
    elif style == "react":
        lines = [
            f"{entry.name}: {entry.description} Parameters: {json.dumps(entry.parameters, ensure_ascii=False)}"
            for entry in tools
        ]
        lines.append(f"Tool names: {', '.join(entry.name for entry in tools)}")
    elif style == "plain":
        lines = []
        for entry in tools:
            lines += [signature_text(entry), f"  {entry.description}"]
            for name, schema in entry.parameters.get("properties", {}).items():
                if isinstance(schema, Mapping) and "description" in schema:
                    lines.append(f"  {name}: {schema['description']}")
    else:
        raise ValueError(f"style {style!r}: expected 'hermes', 'react' or 'plain'")
    return "".join(f"{line}\n" for line in lines)


def tool_schema(entry: Tool) -> dict[str, Any]:
    """The tool as chat templates and chat interfaces take it."""
    function = {"name": entry.name, "description": entry.description, "parameters": entry.parameters}
    return {"type": "function", "function": function}
