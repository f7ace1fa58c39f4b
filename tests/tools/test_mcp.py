"""The MCP client against a real server, over standard streams and over HTTP: many calls at once, errors, time-outs, a
server that dies, freezes or never starts, and that no process is left."""

import asyncio
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxrl_llm.tools.mcp import connect, mcp_tools
from jaxrl_llm.tools.tool import call_tool, call_tool_async, render_tools

SILENT = "echo $$ > pid; cat > /dev/null"  # reads and never answers
COMMAND = [sys.executable, str(Path(__file__).with_name("mcp_server.py"))]


def is_alive(pid):
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_gone(pids):
    """What was killed takes a moment to go."""
    wait_until(lambda: not any(map(is_alive, pids)), 5)


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_http_server(port):
    process = subprocess.Popen([*COMMAND, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def answers():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(answers, 120)  # importing the server takes a while where other work goes on
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process


@pytest.fixture(scope="module")
def http_port():
    port = free_port()
    process = start_http_server(port)
    yield port
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def connections(http_port):
    """The tools over either transport."""
    with (
        mcp_tools(COMMAND) as over_streams,
        mcp_tools(f"http://127.0.0.1:{http_port}/mcp", headers={"X-Test": "1"}) as over_http,
    ):
        yield {"streams": over_streams, "http": over_http}


@pytest.fixture(params=["streams", "http"])
def tools(request, connections):
    return connections[request.param]


def test_tools_have_the_server_s_schemas(tools):
    by_name = {tool.name: tool for tool in tools}
    assert list(by_name)[:3] == ["echo", "add", "fail"] and by_name["add"].description == "The sum of two integers."
    properties = by_name["add"].parameters["properties"]
    assert properties["a"]["type"] == "integer" and properties["b"]["default"] == 1
    assert by_name["add"].parameters["required"] == ["a"]
    assert "add(a: integer, b: integer = 1)" in render_tools(tools, "plain")


def test_calls_and_what_can_be_wrong_with_them(tools):
    assert call_tool(tools, "echo", {"text": "Grüße \n 你好"}) == ("Grüße \n 你好", None)
    assert call_tool(tools, "add", {"a": 2}) == ("3", None)
    assert call_tool(tools, "odd_name", {}) == ("odd", None)
    assert call_tool(tools, "fail", {"text": "no such row"}) == (
        "Error: Error executing tool fail: no such row",
        "failed",
    )
    assert call_tool(tools, "add", {"a": "two"}).error == "bad_arguments"
    assert call_tool(tools, "ad", {"a": 2}).error == "unknown_tool"
    assert call_tool(tools, "image", {}) == ("Error: image returned ImageContent, which is no text", "not_text")
    assert call_tool(tools, "linked", {}) == ("a note\n[more: file:///more.txt]", None)
    assert call_tool(tools, "structured", {"wrong": False}) == ('{"rows": 2}', None)
    assert call_tool(tools, "structured", {"wrong": True}).text == "Error: the tool failed and does not say why"
    assert call_tool(tools, "illustrated", {}) == ("see here\n[ImageContent left out: it is no text]", None)


def test_many_calls_at_once(tools):
    """From several threads, each with an event loop of its own, and many tasks in each: answers are not mixed up."""

    async def ask(name):
        slow = call_tool_async(tools, "sleep", {"seconds": 1})
        fast = [call_tool_async(tools, "echo", {"text": f"{name} {i}"}) for i in range(8)]
        return await asyncio.gather(slow, *fast)

    before = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: asyncio.run(ask(name)), range(8)))
    wall = time.monotonic() - before
    for name, (slow, *fast) in enumerate(found):
        assert slow == ("slept 1.0", None)
        assert fast == [(f"{name} {i}", None) for i in range(8)]
    assert wall < 7.5  # one after another, the sleeps alone would take 8 s


def test_a_call_that_takes_too_long_is_given_up(http_port):
    with mcp_tools(f"http://127.0.0.1:{http_port}/mcp", only=["sleep", "echo"], call_timeout=0.3) as tools:
        assert [tool.name for tool in tools] == ["echo", "sleep"]
        before = time.monotonic()
        found = call_tool(tools, "sleep", {"seconds": 60})
        assert found == ("Error: sleep did not answer within 0.3 s", "failed")
        assert time.monotonic() - before < 5
        # on a busy machine the time may be too short for an answer, too
        wait_until(lambda: call_tool(tools, "echo", {"text": "still there"}) == ("still there", None))
    assert call_tool(tools, "echo", {"text": "x"}) == ("Error: the connection to the MCP server is closed", "failed")


def test_a_server_that_dies_says_so_and_comes_back(tmp_path, caplog):
    log = tmp_path / "log"
    with mcp_tools(COMMAND, environment={"ADDED": "1"}, log_path=log, folder=tmp_path) as tools:
        names = call_tool(tools, "variables", {}).text
        assert "ADDED" in names and "PATH" in names and "PYTEST_CURRENT_TEST" not in names
        pids = re.findall(r"\d+", call_tool(tools, "pids", {}).text)
        assert len(pids) == 2 and all(map(is_alive, pids))
        found = []
        waiting = threading.Thread(target=lambda: found.append(call_tool(tools, "sleep", {"seconds": 60})))
        waiting.start()
        time.sleep(0.2)
        gone = ("Error: the MCP server ended before it answered", "failed")
        assert call_tool(tools, "crash", {}) == gone
        waiting.join(timeout=10)
        assert found == [gone]
        assert_gone(pids)  # the child too, which the server left behind
        refusal = call_tool(tools, "echo", {"text": "x"})
        assert refusal.error == "failed" and "it is being connected anew" in refusal.text
        wait_until(lambda: call_tool(tools, "echo", {"text": "back"}) == ("back", None))
        pids = re.findall(r"\d+", call_tool(tools, "pids", {}).text)
    assert_gone(pids)
    assert "last words" in log.read_text() and "last words" in caplog.text


def test_an_http_server_that_dies_says_so_and_comes_back():
    port = free_port()
    process = start_http_server(port)
    try:
        with mcp_tools(f"http://127.0.0.1:{port}/mcp", call_timeout=20) as tools:
            assert call_tool(tools, "crash", {}).error == "failed"
            assert process.wait(timeout=10) == 3
            assert call_tool(tools, "echo", {"text": "x"}).error == "failed"  # nobody listens
            process = start_http_server(port)
            wait_until(lambda: call_tool(tools, "echo", {"text": "back"}) == ("back", None))
    finally:
        process.kill()
        process.wait()


def test_a_frozen_server_holds_nobody_up():
    with mcp_tools(COMMAND, call_timeout=1.0) as tools:
        pids = re.findall(r"\d+", call_tool(tools, "pids", {}).text)
        assert len(pids) == 2
        before = time.monotonic()
        assert "did not answer within 1 s" in call_tool(tools, "freeze", {}).text
        # more than a pipe holds, so that writing the call blocks
        assert "did not answer within 1 s" in call_tool(tools, "echo", {"text": "x" * 1_000_000}).text
        assert time.monotonic() - before < 5
    assert time.monotonic() - before < 25
    assert_gone(pids)


def test_inside_an_event_loop():
    async def run():
        async with connect(COMMAND) as tools:
            pids = re.findall(r"\d+", (await call_tool_async(tools, "pids", {})).text)
            # this blocks the loop that opened the connection, and the call is answered nevertheless
            with ThreadPoolExecutor(1) as pool:
                found = pool.submit(call_tool, tools, "add", {"a": 4}).result(timeout=20)
            assert found == ("5", None)
            slow = asyncio.create_task(call_tool_async(tools, "sleep", {"seconds": 60}))
            await asyncio.sleep(0.1)
            slow.cancel()
            with pytest.raises(asyncio.CancelledError):
                await slow
            return pids

    assert_gone(asyncio.run(run()))


def test_an_interrupt_and_a_cancelled_start_leave_no_process(tmp_path):
    with pytest.raises(KeyboardInterrupt), mcp_tools(COMMAND) as tools:
        pids = re.findall(r"\d+", call_tool(tools, "pids", {}).text)
        raise KeyboardInterrupt
    assert_gone(pids)

    async def give_up():
        async with connect(["sh", "-c", SILENT], folder=tmp_path):
            pass

    async def run():
        starting = asyncio.create_task(give_up())
        while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
            await asyncio.sleep(0.02)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    asyncio.run(asyncio.wait_for(run(), 20))
    assert_gone([(tmp_path / "pid").read_text().strip()])


def test_servers_that_do_not_start(tmp_path):
    def start(server, **options):
        with mcp_tools(server, **options):
            raise AssertionError("it started")

    with pytest.raises(ConnectionError, match=r"(?s)Connection closed.*stderr ends with:\nmodule missing"):
        start(["sh", "-c", "echo module missing >&2; exit 1"])
    before = time.monotonic()
    with pytest.raises(ConnectionError, match="it did not answer in time"):
        start(["sh", "-c", SILENT], folder=tmp_path, start_timeout=0.5)
    assert time.monotonic() - before < 10
    assert_gone([(tmp_path / "pid").read_text().strip()])
    with pytest.raises(ConnectionError, match="no connection to the MCP server 'http://127.0.0.1:1/mcp': ConnectError"):
        start("http://127.0.0.1:1/mcp")


def test_bad_input(http_port):
    def start(server, **options):
        with mcp_tools(server, **options):
            raise AssertionError("it started")

    with pytest.raises(ValueError, match="the program 'no-such-program' of the MCP server was not found"):
        start(["no-such-program"])
    with pytest.raises(ValueError, match="server must be an address with http:// or https://.* got 'python'"):
        start("python")
    with pytest.raises(ValueError, match="server is an empty command"):
        start([])
    with pytest.raises(ValueError, match="call_timeout must be a positive number of seconds, got 0"):
        start(COMMAND, call_timeout=0)
    with pytest.raises(ValueError, match="headers are for an address"):
        start(COMMAND, headers={})
    with pytest.raises(ValueError, match="environment, folder and log_path are for a server that is started here"):
        start("http://127.0.0.1:1", folder="/")
    once = mcp_tools(f"http://127.0.0.1:{http_port}/mcp")
    with once:
        pass
    with pytest.raises(ValueError, match="this connection was opened before"), once:
        pass
    with pytest.raises(ValueError, match=r"the MCP server has no tools \['ad'\]; it has \['echo', 'add'"):
        start(f"http://127.0.0.1:{http_port}/mcp", only=["ad"])
