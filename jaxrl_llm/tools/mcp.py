"""Tools of a server that speaks the Model Context Protocol, through its official SDK: over the standard streams of a
process that is started here, or over streamable HTTP.

The client lives in a thread with an event loop of its own. So the tools may be called from any thread and any event
loop, many at a time, and a caller that computes for long does not keep the connection waiting.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import math
import os
import re
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl_llm.tools.tool import Tool, ToolError, check_tools

_CLOSE_SECONDS = 15.0  # the SDK gives a process 2 s to leave by itself and 2 s after a SIGTERM
_LOST = "Connection closed"  # what the SDK says of a call on a connection that has ended
_WATCH_SECONDS = 0.25
_LAST_WORDS = 2000  # bytes of a server's log that an error repeats

logger = logging.getLogger(__name__)


def mcp_tools(
    server: str | Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    log_path: str | os.PathLike[str] | None = None,
    headers: Mapping[str, str] | None = None,
    only: Sequence[str] | None = None,
    call_timeout: float = 60.0,
    start_timeout: float = 60.0,
) -> contextlib.AbstractContextManager[list[Tool]]:
    """`with mcp_tools(server) as tools:` gives the server's tools, in its order and with its JSON schemas.

    The tools are async functions: use `call_tool` or `call_tool_async`. A call that the server answers with an error,
    that it does not answer in time, or that it does not survive is a `ToolError` that says so. Once a connection is
    lost, the next call fails too and has it made anew, with a process started anew, in the background. Content that is
    no text (images, sounds) is named beside text, and "not_text" where there is no text. A name that `Tool` does not
    take is written with underscores, and cut. When the block ends, the server's process and its children are killed.

    Args:
      server: an `http://` or `https://` address, or the command line of a server on standard streams.
      environment: variables of the process, beside HOME, PATH and a few others; the rest of ours it does not see.
      folder: the directory of the process; None for the present one.
      log_path: where the process's stderr is appended; None for a file that is removed at the end.
      headers: sent with every HTTP request, such as `{"Authorization": "Bearer ..."}`.
      only: names of the tools that are wanted, as the server has them; None for all.
      call_timeout: seconds for a call.
      start_timeout: seconds for connecting and listing the tools.

    Raises:
      ValueError: a server that is neither an address nor a command, a command that is not found, a time-out that is not
        positive, options that belong to the other kind of server, names in `only` that the server lacks, tools whose
        names collide, or a schema that `Tool` refuses.
      ConnectionError: the server does not start or does not answer; the message has the end of its stderr.
      ImportError: `mcp` is not installed.
    """
    return _Connection(
        server,
        environment=environment,
        folder=folder,
        log_path=log_path,
        headers=headers,
        only=only,
        call_timeout=call_timeout,
        start_timeout=start_timeout,
    )


@contextlib.asynccontextmanager
async def connect(server: str | Sequence[str], **options: Any) -> AsyncIterator[list[Tool]]:
    """`async with connect(server) as tools:` is `mcp_tools` for a coroutine, with the same options and errors; starting
    and closing do not block the event loop."""
    connection = _Connection(server, **options)
    starting = asyncio.ensure_future(asyncio.to_thread(connection.__enter__))
    try:
        tools = await asyncio.shield(starting)
    except asyncio.CancelledError:
        await asyncio.to_thread(connection.interrupt)
        with contextlib.suppress(ConnectionError):
            await starting
            await asyncio.to_thread(connection.__exit__, None, None, None)  # it had started all the same
        raise
    try:
        yield tools
    finally:
        await asyncio.shield(asyncio.to_thread(connection.__exit__, None, None, None))


class _Connection(contextlib.AbstractContextManager["list[Tool]"]):
    """A client in an event loop of its own, and what keeps it alive. The options are those of `mcp_tools`."""

    def __init__(
        self,
        server: str | Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        folder: str | os.PathLike[str] | None = None,
        log_path: str | os.PathLike[str] | None = None,
        headers: Mapping[str, str] | None = None,
        only: Sequence[str] | None = None,
        call_timeout: float = 60.0,
        start_timeout: float = 60.0,
    ) -> None:
        for name, seconds in (("call_timeout", call_timeout), ("start_timeout", start_timeout)):
            if not 0 < seconds < math.inf:
                raise ValueError(f"{name} must be a positive number of seconds, got {seconds}")
        if not isinstance(server, str):
            if headers is not None:
                raise ValueError("headers are for an address, not for a command; use environment")
            command = _command(server)
            self.transport = lambda scratch, log: _process(command, scratch, environment, folder, log)
        elif re.match(r"https?://", server):
            if environment is not None or folder is not None or log_path is not None:
                raise ValueError("environment, folder and log_path are for a server that is started here, not for an "
                                 "address")  # fmt: skip
            self.transport = lambda scratch, log: _http(server, headers, start_timeout)
        else:
            raise ValueError(
                f"server must be an address with http:// or https://, or a command as a list, got {server!r}"
            )
        self.server, self.only, self.call_timeout, self.start_timeout = server, only, call_timeout, start_timeout
        self.log_path = log_path
        self.portal: Any = None  # to the event loop
        self.scope: Any = None  # of the present connection
        self.client: Any = None  # None while there is no connection
        self.reason = ""  # why there is none
        self.closing = False

    def __enter__(self) -> list[Tool]:
        if self.portal is not None:
            raise ValueError("this connection was opened before; call mcp_tools(...) for another one")
        try:
            from anyio.from_thread import start_blocking_portal  # comes with mcp
            from mcp import Client
        except ImportError as error:
            raise ImportError("tools of an MCP server need its SDK: pip install mcp") from error
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mcp-")))
            self.log = scratch / "stderr" if self.log_path is None else Path(self.log_path)
            self.make_client = lambda: Client(self.transport(scratch, self.log))
            self.portal = stack.enter_context(start_blocking_portal(name="mcp client"))
            try:
                serving, listed = self.portal.start_task(self.serve)
            except Exception as error:
                raise ConnectionError(
                    f"no connection to the MCP server {self.server!r}: {_reason(error)}{_tail(self.log)}"
                ) from error
            stack.callback(concurrent.futures.wait, [serving])
            stack.callback(self.interrupt)
            tools = self.as_tools(listed)
            self.stack = stack.pop_all()
        return tools

    def __exit__(self, *exception: Any) -> None:
        self.stack.__exit__(*exception)

    def interrupt(self) -> None:
        """Ends the connection, or a start that is under way; from any thread."""
        self.closing = True
        with contextlib.suppress(RuntimeError):  # it has ended
            if self.portal is not None:
                self.portal.call(self.close)

    def close(self) -> None:
        """Lets `serve` end. Like all that follows, runs in the event loop of the portal."""
        if self.scope is not None:
            self.wake.set()
            if self.client is None:
                self.scope.cancel()  # it may be connecting

    async def serve(self, *, task_status: Any) -> None:
        """Connects, reports the listed tools, and holds the connection until `close`; makes it anew when it was lost
        and a call wants it."""
        import anyio

        started = False
        while not self.closing:
            self.wake = anyio.Event()
            try:
                with anyio.fail_after(self.start_timeout) as self.scope:
                    async with self.make_client() as client:
                        listed = await _list_tools(client)
                        self.scope.deadline = math.inf
                        self.client, self.wake = client, anyio.Event()
                        if not started:
                            started = True
                            task_status.started(listed)
                        await self.wake.wait()  # for `close`, or for a call that finds the connection lost
                        self.client = None
                        self.scope.deadline = anyio.current_time() + _CLOSE_SECONDS
            except Exception as error:
                if not started:
                    raise
                self.reason = _reason(error)
            finally:
                self.client = None
            if not self.closing:
                logger.warning("the connection to an MCP server was lost: %s%s", self.reason, _tail(self.log))
                self.wake = anyio.Event()
                await self.wake.wait()

    async def ask(self, name: str, arguments: dict[str, Any]) -> Any:
        """What the tool `name` answers: text, or the first content if none is text."""
        from mcp import MCPError

        client = self.client
        if client is None:
            self.wake.set()
            raise ToolError(f"the MCP server is not there ({self.reason}); it is being connected anew")
        try:
            result = await client.call_tool(name, arguments)
        except MCPError as error:
            if error.message != _LOST:
                raise ToolError(error.message) from error
            if self.client is client:
                self.client, self.reason = None, "it ended during a call"
                self.wake.set()
            raise ToolError("the MCP server ended before it answered") from error
        except Exception as error:  # such as an answer that does not fit the tool's own output schema
            raise ToolError(f"the MCP server's answer cannot be used: {_reason(error)}") from error
        return _answer(result)

    def as_tools(self, listed: Sequence[Any]) -> list[Tool]:
        """What is wanted of the server's tools."""
        names = [entry.name for entry in listed]
        if self.only is not None and (missing := sorted(set(self.only) - set(names))):
            raise ValueError(f"the MCP server has no tools {missing}; it has {names}")
        tools = [self.as_tool(entry) for entry in listed if self.only is None or entry.name in self.only]
        check_tools(tools)
        return tools

    def as_tool(self, entry: Any) -> Tool:
        """A tool whose calls go to the event loop of the portal."""

        async def call(**arguments: Any) -> Any:
            closed = "the connection to the MCP server is closed"
            try:
                future = self.portal.start_task_soon(self.ask, entry.name, arguments)
            except RuntimeError:
                raise ToolError(closed) from None
            try:
                # giving up here cancels the call over there
                return await asyncio.wait_for(asyncio.wrap_future(future), self.call_timeout)
            except TimeoutError:
                raise ToolError(f"{entry.name} did not answer within {self.call_timeout:g} s") from None
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                raise ToolError(closed) from None

        name = re.sub(r"[^A-Za-z0-9_.-]", "_", entry.name)[:64]
        description = entry.description or entry.title or f"The tool {entry.name}."
        return Tool(name=name, description=description, parameters=entry.input_schema, call=call)


async def _list_tools(client: Any) -> list[Any]:
    listed, cursor = [], None
    while True:  # the caller's time-out bounds it
        page = await client.list_tools(cursor=cursor)
        listed += page.tools
        cursor = page.next_cursor
        if cursor is None:
            return listed


def _answer(result: Any) -> Any:
    parts, others = [], []
    for content in result.content:
        if content.type == "text":
            parts.append(content.text)
        elif content.type == "resource" and hasattr(content.resource, "text"):
            parts.append(content.resource.text)
        elif content.type == "resource_link":
            parts.append(f"[{content.name}: {content.uri}]")
        else:
            others.append(content)
    if others and not parts and not result.is_error:
        return others[0]  # call_tool names its type
    parts += [f"[{type(content).__name__} left out: it is no text]" for content in others]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    if result.is_error:
        raise ToolError("\n".join(parts) or "the tool failed and does not say why")
    return "\n".join(parts)


@contextlib.asynccontextmanager
async def _http(url: str, headers: Mapping[str, str] | None, connect_timeout: float) -> AsyncIterator[Any]:
    """The transport to an address. It bounds neither how long an answer takes nor how many calls are under way."""
    import httpx2  # comes with mcp
    from mcp.client.streamable_http import streamable_http_client

    limits = httpx2.Limits(max_connections=None)
    timeout = httpx2.Timeout(None, connect=connect_timeout)
    async with httpx2.AsyncClient(headers=dict(headers or {}), timeout=timeout, limits=limits) as client:
        async with streamable_http_client(url, http_client=client) as streams:
            yield streams


@contextlib.asynccontextmanager
async def _process(
    command: Sequence[str],
    scratch: Path,
    environment: Mapping[str, str] | None,
    folder: str | os.PathLike[str] | None,
    log: Path,
) -> AsyncIterator[Any]:
    """The transport to a process that is started here, which leads a process group of its own. The SDK kills the group
    of a server that does not leave by itself; here that of any, as one that left or died may leave children behind:
    while they hold its stdout, nobody would notice that it is gone."""
    import anyio
    from mcp import StdioServerParameters
    from mcp.client.stdio import stdio_client

    pid_file = scratch / "pid"
    # the SDK keeps the process to itself, so a shell writes down its id, which stays that of the server
    parameters = StdioServerParameters(
        command="/bin/sh",
        args=["-c", 'echo $$ > "$0" && exec "$@"', str(pid_file), *command],
        env=dict(environment or {}),
        cwd=None if folder is None else os.fspath(folder),
    )
    pid_file.unlink(missing_ok=True)

    def send(signal_number: int, to: Callable[[int, int], None]) -> bool:
        try:
            to(int(pid_file.read_text()), signal_number)
        except ProcessLookupError:
            return False
        except (FileNotFoundError, ValueError):  # it has not come to write its id
            pass
        return True

    async def watch() -> None:
        while send(0, os.kill):
            await anyio.sleep(_WATCH_SECONDS)
        send(signal.SIGKILL, os.killpg)
        pid_file.unlink()  # the id is free for others now

    try:
        with open(log, "a") as errors:
            async with anyio.create_task_group() as watching, stdio_client(parameters, errlog=errors) as streams:
                watching.start_soon(watch)
                yield streams
                watching.cancel_scope.cancel()
    finally:
        send(signal.SIGKILL, os.killpg)


def _command(server: Sequence[str]) -> list[str]:
    words = [os.fspath(word) for word in server]
    if not words:
        raise ValueError("server is an empty command; give the program and its arguments")
    program = shutil.which(words[0])
    if program is None:
        raise ValueError(f"the program {words[0]!r} of the MCP server was not found; give its path or install it")
    return [os.path.abspath(program), *words[1:]]


def _reason(error: BaseException) -> str:
    """The first of the errors that a task group bundles."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    return f"{type(error).__name__}: {error}"


def _tail(log: Path) -> str:
    if not log.is_file():  # that of an address
        return ""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - _LAST_WORDS))
        words = file.read().decode("utf-8", "replace").strip()
    return f". Its stderr ends with:\n{words}" if words else ""
