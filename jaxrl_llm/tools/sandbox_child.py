"""The process around a sandboxed program: it confines, starts, watches and ends it.

`jaxrl_llm.tools.sandbox` sends this file to a bare interpreter and calls `main` there. Up to three processes:

- The launcher, this interpreter. It enters the namespaces and keeps the clock; the program cannot reach it.
- The first process of the new PID namespace. It waits for the program; when it ends, the kernel ends all others there.
- The program. Without namespaces it is the launcher's child, and may have threads but no child processes.
"""

from __future__ import annotations

import linecache
import os
import resource
import signal
import sys
import traceback
import types
from typing import Any, NoReturn

from jaxrl_llm.tools import sandbox_kernel as kernel

WORK = "/sandbox"
_FILE_NAME = "program.py"


def main(job: dict[str, Any]) -> None:
    """Runs `job` and writes what became of it to the file descriptor `job["status"]`, a line:

    - `setup PROTECTION MESSAGE`: the program did not start.
    - `exit CODE CPU_SECONDS` or `signal NUMBER CPU_SECONDS`: how it ended.
    - `stopped wall_seconds` or `stopped output`: the launcher ended it.

    It returns in the program's process only, by the exception that ends the interpreter.
    """
    status = job["status"]
    kernel.die_with_parent(signal.SIGKILL)
    in_namespaces = "namespaces" in job["protections"]
    user = _program_user()
    # The kernel does not count root's processes, so a program that stays root has none beside it.
    job["may_fork"] = in_namespaces and (job["as_root"] or os.geteuid() != 0)
    if in_namespaces:
        try:
            _build_root(job, user)
        except OSError as error:
            _write(status, f"setup namespaces {error}")
            os._exit(1)
    child = os.fork()
    if child:
        _watch(child, status, job["wall_seconds"], report=not in_namespaces)
    kernel.die_with_parent(signal.SIGKILL)
    if in_namespaces:
        program = os.fork()
        if program:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            _write(status, _wait_for(program))
            os._exit(0)
    _run(job, user)


def _program_user() -> int:
    """A user id that nobody has, and no other sandbox at the same time: processes are limited by user.

    It is the launcher's process id, counted down from the last id that this machine, or its container, has.
    """
    with open("/proc/self/uid_map") as file:
        start, _, count = (int(text) for text in file.read().splitlines()[-1].split())
    return start + count - 1 - os.getpid() % max(count // 2, 1)


def _build_root(job: dict[str, Any], user: int) -> None:
    kernel.enter_namespaces(job["as_root"], user)
    options = f"size={job['disk_bytes']},nr_inodes={job['files'] + 1},mode=700,uid={user},gid={user}"
    kernel.change_root(job["folder"], job["readable"], job["hidden"], job["devices"], WORK, options)


def _write(status: int, line: str) -> None:
    os.write(status, line.replace("\n", " ").encode(errors="replace") + b"\n")


def _wait_for(program: int) -> str:
    """Reaps every child until `program` has ended, and says how it did."""
    while True:
        process, code, usage = os.wait3(0)
        if process == program:
            break
    seconds = usage.ru_utime + usage.ru_stime
    if os.WIFSIGNALED(code):
        return f"signal {os.WTERMSIG(code)} {seconds:.3f}"
    return f"exit {os.WEXITSTATUS(code)} {seconds:.3f}"


def _watch(child: int, status: int, wall_seconds: float, report: bool) -> NoReturn:
    """Waits for `child`, or kills it: after `wall_seconds`, or when this process is sent SIGTERM."""

    def stop(number: int, frame: object) -> None:
        _write(status, "stopped wall_seconds" if number == signal.SIGALRM else "stopped output")
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGTERM, stop)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)
    # When the first process of a namespace is reaped, the kernel has ended every other one in it.
    end = _wait_for(child)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if report:
        _write(status, end)
    os._exit(0)


def _confine(job: dict[str, Any], user: int) -> None:
    in_namespaces = "namespaces" in job["protections"]
    os.umask(0o077)
    if in_namespaces and job["as_root"]:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    # A user namespace counts the launcher and its first process too.
    processes = job["processes"] + (2 if in_namespaces and not job["as_root"] else 0)
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_AS: job["memory_bytes"],
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_FSIZE: job["file_bytes"],
        resource.RLIMIT_NOFILE: job["open_files"],
        resource.RLIMIT_STACK: 8 << 20,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 64,
    }
    for which, value in limits.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    # At the soft limit a signal says that it was the time; at the hard one the kernel kills who ignores it.
    resource.setrlimit(resource.RLIMIT_CPU, (job["cpu_seconds"], job["cpu_seconds"] + 1))
    protection = "limits"
    try:
        kernel.drop_privileges()
        if "landlock" in job["protections"]:
            protection = "landlock"
            work = WORK if in_namespaces else job["folder"]
            kernel.restrict_files(job["readable"], job["devices"], work)
        if "seccomp" in job["protections"]:
            protection = "seccomp"
            kernel.restrict_system_calls(in_namespaces, job["may_fork"])
    except OSError as error:
        _write(job["status"], f"setup {protection} {error}")
        os._exit(1)


def _run(job: dict[str, Any], user: int) -> NoReturn:
    """Confines this process and runs the program in it, as the interpreter would run a file."""
    if "namespaces" not in job["protections"]:
        os.chdir(job["folder"])
    given = os.memfd_create("input")
    os.write(given, job["stdin"])
    os.lseek(given, 0, os.SEEK_SET)
    os.dup2(given, 0)
    source = job["program"]
    _confine(job, user)
    os.closerange(3, 65536)

    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        # A program that is killed keeps the lines it has written.
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    sys.argv = [_FILE_NAME]
    os.environ.clear()  # the interpreter sets LC_CTYPE when it starts
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    linecache.cache[_FILE_NAME] = (len(source), None, source.splitlines(keepends=True), _FILE_NAME)
    try:
        exec(compile(source, _FILE_NAME, "exec", dont_inherit=True), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next
        traceback.print_exception(type(error), error, frames)
        raise SystemExit(1) from None
    raise SystemExit(0)
