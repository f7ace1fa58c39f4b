"""A small MCP server for test_mcp.py. `python mcp_server.py` serves standard streams, with a port streamable HTTP."""

import os
import signal
import subprocess
import sys

import anyio
from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import CallToolResult, EmbeddedResource, ResourceLink, TextResourceContents

server = MCPServer("example", log_level="ERROR")


@server.tool()
def echo(text: str) -> str:
    """Says what it is told."""
    return text


@server.tool()
def add(a: int, b: int = 1) -> int:
    """The sum of two integers."""
    return a + b


@server.tool()
def fail(text: str) -> str:
    """Fails with a message."""
    raise ToolError(text)


@server.tool()
async def sleep(seconds: float) -> str:
    """Sleeps."""
    await anyio.sleep(seconds)
    return f"slept {seconds}"


@server.tool()
def image() -> Image:
    """A picture."""
    return Image(data=b"no picture", format="png")


@server.tool()
def illustrated() -> list:
    """A picture with words."""
    return ["see here", Image(data=b"no picture", format="png")]


@server.tool()
def linked() -> CallToolResult:
    """A text of its own kind and a link."""
    text = TextResourceContents(uri="file:///notes.txt", text="a note")
    link = ResourceLink(type="resource_link", uri="file:///more.txt", name="more")
    return CallToolResult(content=[EmbeddedResource(type="resource", resource=text), link])


@server.tool()
def structured(wrong: bool) -> CallToolResult:
    """A result without content."""
    return CallToolResult(content=[], structured_content=None if wrong else {"rows": 2}, is_error=wrong)


@server.tool(name="odd/name")
def odd() -> str:
    """Has a name that most protocols cannot write."""
    return "odd"


@server.tool()
def pids() -> list[int]:
    """The process and a child that it starts and leaves alone."""
    child = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL)  # it holds the server's stdout open
    return [os.getpid(), child.pid]


@server.tool()
def variables() -> list[str]:
    """The names of its environment's variables."""
    return sorted(os.environ)


@server.tool()
def crash() -> str:
    """Ends the process."""
    print("last words", file=sys.stderr, flush=True)
    os._exit(3)


@server.tool()
def freeze() -> str:
    """Stops the process as a debugger would."""
    os.kill(os.getpid(), signal.SIGSTOP)
    return "awake"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run("stdio")
