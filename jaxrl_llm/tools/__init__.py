"""Tools that a policy calls: functions from JSON arguments to text."""

from jaxrl_llm.tools.calculator import calculator_tool
from jaxrl_llm.tools.mcp import mcp_tools
from jaxrl_llm.tools.memory import KeyValueMemory, memory_tools
from jaxrl_llm.tools.policy import policy_tool
from jaxrl_llm.tools.sandbox import PythonSandbox, SandboxLimits, python_tool
from jaxrl_llm.tools.search import hybrid_search, search_tool
from jaxrl_llm.tools.sqlite import open_database, sqlite_tool
from jaxrl_llm.tools.tool import (
    Tool,
    ToolError,
    ToolResult,
    call_tool,
    call_tool_async,
    check_tools,
    render_tools,
    tool,
    tool_schema,
)

__all__ = [
    "KeyValueMemory",
    "PythonSandbox",
    "SandboxLimits",
    "Tool",
    "ToolError",
    "ToolResult",
    "calculator_tool",
    "call_tool",
    "call_tool_async",
    "check_tools",
    "hybrid_search",
    "mcp_tools",
    "memory_tools",
    "open_database",
    "policy_tool",
    "python_tool",
    "render_tools",
    "search_tool",
    "sqlite_tool",
    "tool",
    "tool_schema",
]
