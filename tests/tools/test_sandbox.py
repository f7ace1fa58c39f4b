"""The Python sandbox against programs that want out, or want everything."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxrl_llm.tools import call_tool, sandbox
from jaxrl_llm.tools.sandbox import PythonSandbox, SandboxLimits, available_protections, python_tool

LIMITS = SandboxLimits(cpu_seconds=1, wall_seconds=30.0, memory_bytes=128 << 20)
SECRET = "the gold answer 4711"

# What a program must not manage prints ESCAPED; {folder} is a folder of the test's, {parent} the test's process.
TRY = """
def attempt(what):
    try:
        what()
    except OSError as error:
        print("refused", type(error).__name__)
    else:
        print("ESCAPED")
"""
# Contained whatever protections the machine has: name, program, and a text that the observation must have.
HOSTILE = {
    "fork bomb": ("import os\nwhile True:\n    os.fork()", "refused|Error"),
    "fork bomb that ignores errors": (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        "[stopped: limit of 0.7 wall seconds]",
    ),
    "processes through multiprocessing": (
        "import multiprocessing as m\nm.set_start_method('fork')\n"
        "for _ in range(200):\n    m.Process(target=lambda: __import__('time').sleep(60)).start()",
        "[stopped: limit of 0.7 wall seconds]|not permitted",
    ),
    "thread bomb": (
        "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "can't start new thread",
    ),
    "memory bomb": ("x = bytearray(1 << 34)", "MemoryError"),
    "memory bomb in steps": ("x = []\nwhile True:\n    x.append(bytearray(1 << 20))", "MemoryError"),
    "memory bomb by mmap": ("import mmap\nx = [mmap.mmap(-1, 1 << 24) for _ in range(100)]", "Error"),
    "memory bomb by a number": ("x = 10 ** 10 ** 10", "[stopped: limit of 0.7 wall seconds]"),
    "infinite loop": ("while True: pass", "[stopped: limit of 1 cpu seconds]"),
    "loop that ignores signals": (
        "import signal\nfor n in set(signal.Signals) - {9, 19}:\n    signal.signal(n, signal.SIG_IGN)\n"
        "while True: pass",
        "[stopped: limit of",
    ),
    "sleep": ("import time; time.sleep(100)", "[stopped: limit of 0.7 wall seconds]"),
    "wait for input": ("print(input())", "EOFError"),
    "wait on a pipe": ("import os; r, w = os.pipe(); os.read(r, 1)", "[stopped: limit of 0.7 wall seconds]"),
    "deep recursion": ("def f(): f()\nf()", "RecursionError"),
    "deeper recursion": (
        "import sys; sys.setrecursionlimit(10 ** 9)\nclass A:\n    def __repr__(self): return repr(self)\nrepr(A())",
        "signal|Error|stopped",
    ),
    "read the password file": (TRY + "attempt(lambda: open('/etc/passwd').read())", "refused"),
    "read a file of the host": (TRY + "attempt(lambda: print(open('{folder}/secret').read()))", "refused"),
    "read it through a symlink": (
        TRY + "import os; os.symlink('{folder}/secret', 's')\nattempt(lambda: print(open('s').read()))",
        "refused",
    ),
    "read it through a hard link": (
        TRY + "import os\nattempt(lambda: (os.link('{folder}/secret', 's'), print(open('s').read())))",
        "refused",
    ),
    "read it from above": (
        TRY + "import os; os.chdir('..')\nattempt(lambda: print(open('../../../../..{folder}/secret').read()))",
        "refused",
    ),
    "read the repository": (TRY + "attempt(lambda: open('{repository}/setup.py').read())", "refused"),
    "list the root": (TRY + "import os\nattempt(lambda: os.listdir('/'))", "refused"),
    "read the parent's environment": (TRY + "attempt(lambda: open('/proc/{parent}/environ').read())", "refused"),
    "read its own parent": (
        TRY + "import os\nattempt(lambda: open(f'/proc/{{os.getppid()}}/environ').read())\nprint(dict(os.environ))",
        "{}",
    ),
    "read the parent's memory": (TRY + "attempt(lambda: open('/proc/{parent}/mem', 'rb').read(1))", "refused"),
    "write outside": (TRY + "attempt(lambda: open('{folder}/new', 'w'))", "refused"),
    "write to the temporary folder": (TRY + "attempt(lambda: open('/tmp/sandbox-escaped', 'w'))", "refused"),
    "write into Python's library": (TRY + "import os\nattempt(lambda: open(os.__file__, 'a'))", "refused"),
    "truncate a file": (TRY + "import os\nattempt(lambda: os.truncate('{folder}/secret', 0))", "refused"),
    "delete a file": (TRY + "import os\nattempt(lambda: os.unlink('{folder}/secret'))", "refused"),
    "move a file": (TRY + "import os\nattempt(lambda: os.rename('{folder}/secret', '{folder}/gone'))", "refused"),
    "change a file's mode": (TRY + "import os\nattempt(lambda: os.chmod('{folder}/secret', 0))", "refused"),
    "change a file's times": (TRY + "import os\nattempt(lambda: os.utime('{folder}/secret', (0, 0)))", "refused"),
    "make a device": (TRY + "import os, stat\nattempt(lambda: os.mknod('d', 0o600 | stat.S_IFBLK, 0xfe00))", "refused"),
    "connect by TCP": (
        TRY + "import socket\nattempt(lambda: socket.create_connection(('127.0.0.1', {port}), 1))",
        "refused",
    ),
    "connect by urllib": (
        TRY + "import urllib.request\nattempt(lambda: urllib.request.urlopen('http://127.0.0.1:{port}/', timeout=1))",
        "refused",
    ),
    "raw socket": (TRY + "import socket\nattempt(lambda: socket.socket(socket.AF_INET, 3, 1))", "refused"),
    "unix socket": (
        TRY + "import socket\nattempt(lambda: socket.socket(socket.AF_UNIX).connect('{folder}/socket'))",
        "refused",
    ),
    "netlink socket": (TRY + "import socket\nattempt(lambda: socket.socket(socket.AF_NETLINK))", "refused"),
    "socket through ctypes": (
        "import ctypes\nfor number in (41, 0x40000029):\n"
        "    print('contained' if ctypes.CDLL(None).syscall(number, 2, 1, 0) < 0 else 'ESCAPED')",
        "contained",
    ),
    "io_uring, bpf, userfaultfd, perf": (
        "import ctypes\nfor number in (425, 321, 323, 298):\n"
        "    print('contained' if ctypes.CDLL(None).syscall(number, 0, 0, 0, 0, 0) < 0 else 'ESCAPED')",
        "contained",
    ),
    "new namespaces": ("import ctypes\nprint('ESCAPED' if ctypes.CDLL(None).unshare(0x10000000) == 0 else 'no')", "no"),
    "debug the parent": (
        "import ctypes\nprint('ESCAPED' if ctypes.CDLL(None).ptrace(16, {parent}, 0, 0) == 0 else 'no')",
        "no",
    ),
    "break out of the root": (TRY + "import os\nos.mkdir('d')\nattempt(lambda: os.chroot('d'))", "refused"),
    "become root": (TRY + "import os\nattempt(lambda: os.setresuid(0, 0, 0) or open('/etc/shadow'))", "refused"),
    "kill the parent": (
        TRY + "import os, signal\nattempt(lambda: os.kill({parent}, signal.SIGTERM))\n"
        "attempt(lambda: os.kill({parent}, signal.SIGKILL))",
        "refused",
    ),
    "kill all": ("import os\ntry:\n    os.kill(-1, 9)\nexcept OSError:\n    pass\nprint('alive')", "alive"),
    "kill its own parent": (
        "import os\ntry:\n    os.kill(os.getppid(), 9)\nexcept OSError:\n    pass\nprint('alive')",
        "alive",
    ),
    "shell": (TRY + "import os, subprocess\nattempt(lambda: subprocess.run(['/bin/sh', '-c', 'id']))", "refused"),
    "Python anew": (TRY + "import os, sys\nattempt(lambda: os.execv(sys.executable, ['python']))", "refused"),
    "a megabyte of output": ("print('x' * (1 << 20))\nprint('end')", "bytes cut"),
    "endless output": ("while True: print('x' * 10000)", "[stopped"),
    "binary output": ("import os; os.write(1, bytes(range(256)) * 4)", "\ufffd"),
    "huge file": ("f = open('f', 'wb')\nwhile True: f.write(bytes(1 << 20))", "OSError: [Errno 27]"),
    "raise its limits": (
        TRY + "import resource as r\nattempt(lambda: r.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 40)))",
        "Error",
    ),
    "limits of the parent": (
        TRY + "import resource as r\nattempt(lambda: r.prlimit({parent}, r.RLIMIT_NOFILE, (3, 3)))",
        "refused",
    ),
    "open files": ("x = [open('/dev/zero') for _ in range(1000)]", "Too many open files"),
    "other descriptors": (
        "import os\nfor n in range(3, 64):\n    try:\n        os.fstat(n)\n        print('ESCAPED', n)\n"
        "    except OSError:\n        pass\nprint('none')",
        "none",
    ),
    "signal to itself": ("import os; os.kill(os.getpid(), 15)", "[ended by signal 15, SIGTERM]"),
    "abort": ("import os; os.abort()", "[ended by signal 6, SIGABRT]"),
    "crash": ("import ctypes; ctypes.string_at(0)", "[ended by signal 11, SIGSEGV]"),
    "exit code": ("import sys; sys.exit(3)", "[exit code 3]"),
    "forged status": (
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'exit 0 0\\n')\n    except OSError: pass\n1/0",
        "[exit code 1]",
    ),
    "close everything": ("import os\nos.closerange(0, 64)\nos._exit(0)", "[no output]"),
}
# These need namespaces: without them there are no child processes at all, and the disk has no limit.
HOSTILE_IN_NAMESPACES = {
    "thousands of files": ("for i in range(5000): open(f'f{i}', 'w')", "No space left"),
    "many large files": (
        "for i in range(100):\n    with open(f'f{i}', 'wb') as f: f.write(bytes(4 << 20))",
        "No space left",
    ),
    "output kept open by a grandchild": (
        "import os, time\nif os.fork() == 0:\n    if os.fork() == 0:\n        time.sleep(100)\n    os._exit(0)\n"
        "print('done')",
        "done",
    ),
    "daemon in a session of its own": (
        "import os, signal, time\nif os.fork() == 0:\n    os.setsid()\n    signal.signal(15, signal.SIG_IGN)\n"
        "    if os.fork() == 0:\n        while True: time.sleep(1)\n    os._exit(0)\nos.wait()\nprint('done')",
        "done",
    ),
    "zombies": (
        "import os\nfor _ in range(1000):\n    try:\n        if os.fork() == 0: os._exit(0)\n"
        "    except OSError:\n        break\nprint('done')",
        "done",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def adopts_orphans() -> None:
    """A process that outlives its sandbox becomes a child of this one, and is seen."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def children() -> list[str]:
    found: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        found += (task / "children").read_text().split()
    return found


@pytest.fixture
def places(tmp_path: Path) -> Iterator[dict[str, object]]:
    """What a program must not touch, looked at again when it has run: files, processes, a port, the repository."""
    before = set(children())
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    state = secret.stat()
    repository = Path(__file__).resolve().parents[2]
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {
            **{"folder": tmp_path, "repository": repository},
            **{"parent": os.getpid(), "port": server.getsockname()[1]},
        }
    assert secret.read_text() == SECRET
    after = secret.stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_nlink) == (state.st_mode, state.st_mtime_ns, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert not set(children()) - before
    assert not Path("/tmp/sandbox-escaped").exists()


def fill(program: str, places: dict[str, object]) -> str:
    for name, value in places.items():
        program = program.replace("{" + name + "}", str(value))
    return program.replace("{{", "{").replace("}}", "}")


def check(chosen: PythonSandbox, program: str, expected: str, places: dict[str, object]) -> None:
    result = chosen.run(fill(program, places))
    text = sandbox.result_text(result, chosen.limits)
    assert "ESCAPED" not in text and SECRET not in text, text
    assert any(choice in text for choice in expected.split("|")), text
    assert len(text) < 5 * chosen.limits.output_bytes
    assert result.seconds < chosen.limits.wall_seconds + sandbox._GRACE_SECONDS


def limits_for(expected: str) -> SandboxLimits:
    """A short wall time for programs that are to meet it; ample for others, on a machine with other work."""
    return dataclasses.replace(LIMITS, wall_seconds=0.7 if "0.7 wall" in expected else LIMITS.wall_seconds)


@pytest.fixture(scope="module")
def full() -> PythonSandbox:
    missing, _ = available_protections()
    if missing:
        pytest.skip(f"this machine lacks {missing}")
    return PythonSandbox(LIMITS)


@pytest.mark.parametrize("name", [*HOSTILE, *HOSTILE_IN_NAMESPACES])
def test_hostile_program_is_contained(name: str, full: PythonSandbox, places: dict[str, object]) -> None:
    program, expected = (HOSTILE | HOSTILE_IN_NAMESPACES)[name]
    check(PythonSandbox(limits_for(expected)), program, expected, places)


@pytest.mark.parametrize("mode", ["user namespace", "no namespaces"])
def test_hostile_programs_are_contained_in_other_ways(
    mode: str, full: PythonSandbox, places: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine where this user is not root, or where namespaces are forbidden as in many containers. Programs
    that only run into a time limit are left out: the same clock stops them."""
    most = Path("/proc/sys/user/max_user_namespaces")
    if mode == "user namespace" and not (most.exists() and int(most.read_text())):
        pytest.skip("this machine has no user namespaces")
    missing = {"namespaces": "not tried"} if mode == "no namespaces" else {}
    monkeypatch.setattr(sandbox, "available_protections", lambda: (missing, False))
    cases = [case for case in HOSTILE.values() if "[stopped" not in case[1]]
    assert len(cases) >= 30

    def run(case: tuple[str, str]) -> None:
        check(PythonSandbox(limits_for(case[1]), allow_missing=tuple(missing)), *case, places)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, cases))


def test_nothing_leaks_between_calls(full: PythonSandbox) -> None:
    first = full.run("open('left', 'w').write('x'); import os; os.environ['LEFT'] = 'x'; print(os.listdir())")
    second = full.run("import os; print(os.listdir(), dict(os.environ), open.__name__)")
    assert (first.stdout, second.stdout) == ("['left']\n", "[] {} open\n")


def test_program_runs_as_a_file_does(full: PythonSandbox) -> None:
    program = """
import asyncio, bz2, ctypes, decimal, hashlib, json, lzma, sqlite3, ssl, zlib
import dataclasses, pickle, sys, tempfile, threading
@dataclasses.dataclass
class Point:
    x: int
print(pickle.loads(pickle.dumps(Point(int(input())))), __name__, sys.argv)
thread = threading.Thread(target=lambda: print("thread"))
thread.start()
async def main():
    await asyncio.sleep(0)
    print("asyncio", tempfile.mkdtemp().startswith("/sandbox"))
asyncio.run(main())
def fail():
    raise KeyError("here")
fail()
"""
    result = full.run(program, stdin="7\n")
    assert result.stdout == "Point(x=7) __main__ ['program.py']\nthread\nasyncio True\n"
    assert result.exit_code == 1
    assert result.stderr.splitlines()[:3] == [
        "Traceback (most recent call last):",
        '  File "program.py", line 16, in <module>',
        "    fail()",
    ]
    assert full.run("def").stderr.splitlines()[-1].startswith("SyntaxError")


def test_output_keeps_both_ends(full: PythonSandbox) -> None:
    result = full.run("print('first'); print('x' * (1 << 20)); print('last')")
    assert result.stdout.startswith("first\n") and result.stdout.endswith("\nlast\n")
    assert result.cut_bytes == (1 << 20) + 12 - LIMITS.output_bytes
    assert f"[... {result.cut_bytes} bytes cut ...]" in result.stdout


def test_sandbox_needs_its_protections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "available_protections", lambda: ({"landlock": "no such call"}, False))
    with pytest.raises(RuntimeError, match=r"landlock \(no such call\).*allow_missing"):
        PythonSandbox()
    assert PythonSandbox(allow_missing=["landlock"]).protections == ("namespaces", "seccomp")
    with pytest.raises(ValueError, match="allow_missing names 'network'"):
        PythonSandbox(allow_missing=["network"])


@pytest.mark.parametrize("limits", [{"cpu_seconds": 0}, {"cpu_seconds": 1.5}, {"memory_bytes": 1}, {"open_files": 2}])
def test_limits_are_checked(limits: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        SandboxLimits(**limits)


def test_tool(full: PythonSandbox) -> None:
    tools = [python_tool(full)]
    assert call_tool(tools, "python", {"program": "print(6 * 7)"}) == ("42", None)
    assert call_tool(tools, "python", {"program": ""}) == ("[no output]", None)
    assert call_tool(tools, "python", {"program": 1}).error == "bad_arguments"


def test_calls_run_side_by_side(full: PythonSandbox) -> None:
    before, descriptors = set(children()), len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: full.run(f"print({i})").stdout, range(24)))
    assert results == [f"{i}\n" for i in range(24)]
    assert not set(children()) - before and len(os.listdir("/proc/self/fd")) == descriptors


def test_sandbox_ends_with_its_host(full: PythonSandbox, tmp_path: Path) -> None:
    """Also when the host is killed and can do nothing about it."""
    code = (
        "from jaxrl_llm.tools.sandbox import PythonSandbox\n"
        "PythonSandbox().run('import os, time\\nos.fork()\\ntime.sleep(9)')"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # it cannot take its folder away
    host = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=environment)
    deadline = time.monotonic() + 20
    while len(descendants(host.pid)) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    started = descendants(host.pid)
    assert len(started) >= 4  # the launcher, the first process, the program and its child
    host.kill()
    host.wait()
    while any(is_running(process) for process in started) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [process for process in started if is_running(process)]


def descendants(process: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def is_running(process: int) -> bool:
    """Whether it is there, and no zombie that this process has yet to reap."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
