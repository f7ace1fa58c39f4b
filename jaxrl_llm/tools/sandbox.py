"""A sandbox for Python programs that a policy wrote: Linux without root, the standard library, nothing else.

Every run is a new process with an empty folder of its own. Three protections of the kernel hold it, one behind the
other; the constructor tries which of them this machine has:

- namespaces: an own root with only Python's library in it, no network, no sight of other processes, and the end of all
  its processes when it ends. The folder lies in memory and is limited in size and in number of files.
- landlock: a list of the files that may be opened.
- seccomp: no new programs, no sockets, no debugging of other processes, no rare parts of the kernel.

Limits of time, memory, processes, file size and open files hold besides. The memory limit is one process's: a program
of several may take `processes` times as much, and its files `disk_bytes` more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import marshal
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxrl_llm.tools.tool import Tool

PROTECTIONS = ("namespaces", "landlock", "seccomp")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
# A program that writes on and on is ended when it has written this many times what is kept.
_OUTPUT_FACTOR = 256
# What the launcher has beyond the wall time to end everything, on a busy machine.
_GRACE_SECONDS = 10.0

# The interpreter imports neither site-packages nor this package; the modules it needs come to it compiled.
_BOOT = """
import marshal, sys, types
job = marshal.load(sys.stdin.buffer)
for name in ("jaxrl_llm", "jaxrl_llm.tools"):
    sys.modules[name] = types.ModuleType(name)
for name, file, code in job.pop("modules"):
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = file
    setattr(sys.modules["jaxrl_llm.tools"], name.rpartition(".")[2], module)
    exec(code, module.__dict__)
module.main(job)
"""
# Loads every extension module of the standard library, and prints the shared libraries that came with them.
_LIST_LIBRARIES = """
import ctypes, os, sys
for name in ["libgcc_s.so.1", *(os.path.join(sys.argv[1], name) for name in sorted(os.listdir(sys.argv[1])))]:
    if "_tkinter" not in name and ".so" in name:
        try:
            ctypes.CDLL(name)
        except OSError:
            pass
class Info(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("name", ctypes.c_char_p)]
@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Info), ctypes.c_size_t, ctypes.c_void_p)
def show(info, size, data):
    print(os.fsdecode(info.contents.name or b""))
    return 0
ctypes.CDLL(None).dl_iterate_phdr(show, None)
"""


@dataclasses.dataclass(frozen=True)
class SandboxLimits:
    """What a program may use.

    Attributes:
      cpu_seconds: processor time of each process, whole seconds.
      wall_seconds: time from start to end.
      memory_bytes: address space of each process. Python alone takes about 30 MB of it.
      processes: processes and threads at one time. Without namespaces: threads only.
      file_bytes: size of one file.
      disk_bytes: all files together. Held by namespaces.
      files: number of files and folders. Held by namespaces.
      open_files: file descriptors of each process.
      output_bytes: what is kept of standard output, and of standard error; the middle is cut.

    Raises:
      ValueError: a limit that is not positive, or no whole number where one is needed.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 10.0
    memory_bytes: int = 256 << 20
    processes: int = 8
    file_bytes: int = 8 << 20
    disk_bytes: int = 32 << 20
    files: int = 256
    open_files: int = 64
    output_bytes: int = 16 << 10

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = (int, float) if field.name == "wall_seconds" else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 2**62:
                expected = "number" if float in kinds else "whole number"
                raise ValueError(f"{field.name} is {value!r}; expected a positive {expected}")
        if self.memory_bytes < 64 << 20:
            raise ValueError(f"memory_bytes is {self.memory_bytes}; Python needs at least 64 MiB = {64 << 20}")
        if self.open_files < 8:
            raise ValueError(f"open_files is {self.open_files}; Python needs at least 8")


class SandboxResult(NamedTuple):
    """How a program ended.

    Attributes:
      stdout, stderr: what it wrote, with a note in the middle of what was cut.
      cut_bytes: number of bytes cut from both.
      exit_code: None if a signal or a limit ended it.
      signal: number of the signal that ended it, None if none did.
      stopped: the limit that ended it, None if none did. Other limits show as exceptions inside the program.
      seconds: wall time, the start of the process included.
    """

    stdout: str
    stderr: str
    cut_bytes: int
    exit_code: int | None
    signal: int | None
    stopped: Literal["cpu_seconds", "wall_seconds", "output"] | None
    seconds: float


class _Kept:
    """The first and the last part of a stream."""

    def __init__(self, limit: int) -> None:
        self.limit, self.total = limit, 0
        self.first, self.last = bytearray(), bytearray()

    def add(self, data: bytes) -> None:
        self.total += len(data)
        room = self.limit - self.limit // 2 - len(self.first)
        self.first += data[:room]
        self.last += data[room:]
        if len(self.last) > self.limit + (64 << 10):
            self.trim()

    def trim(self) -> None:
        del self.last[: max(0, len(self.last) - self.limit // 2)]

    def text(self) -> tuple[str, int]:
        """The text, and the number of bytes left out of it."""
        self.trim()
        cut = self.total - len(self.first) - len(self.last)
        note = f"\n[... {cut} bytes cut ...]\n".encode() if cut else b""
        return (bytes(self.first) + note + bytes(self.last)).decode("utf-8", "replace"), cut


@functools.cache
def _python() -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The interpreter, the folders and files it reads, and the folders in them that do not belong to it."""
    executable = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    # The libraries of this very interpreter, also where a virtual environment started it.
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    folders = dict.fromkeys(sysconfig.get_path(name, vars=base) for name in ("stdlib", "platstdlib"))
    extensions = importlib.util.find_spec("_ctypes")
    loaded = os.path.dirname(extensions.origin) if extensions and extensions.origin else next(iter(folders))
    folders[loaded] = None
    listing = subprocess.run(
        [executable, "-I", "-S", "-c", _LIST_LIBRARIES, loaded], env={}, capture_output=True, text=True, timeout=60
    )
    libraries = [path for path in listing.stdout.splitlines() if path.startswith("/")]
    paths = [os.path.normpath(path) for path in [*folders, *libraries, "/etc/ld.so.cache"] if os.path.exists(path)]
    outer = [path for path in dict.fromkeys(paths) if not any(path.startswith(f"{other}/") for other in paths)]
    hidden = [f"{folder}/{name}" for folder in folders for name in ("site-packages", "dist-packages")]
    return executable, tuple(outer), tuple(path for path in hidden if os.path.isdir(path))


@functools.cache
def _child_modules() -> list[tuple[str, str, Any]]:
    """Name, file and code of the modules that run in the sandbox's interpreter."""
    modules = []
    for name in ("sandbox_kernel", "sandbox_child"):
        path = Path(__file__).with_name(f"{name}.py")
        code = compile(path.read_text(encoding="utf-8"), str(path), "exec", dont_inherit=True)
        modules.append((f"jaxrl_llm.tools.{name}", str(path), code))
    return modules


@functools.cache
def available_protections() -> tuple[dict[str, str], bool]:
    """Tries the protections on this machine, once for each process.

    Returns:
      The protections that are missing, each with the reason, and whether namespaces are entered as root, which is
      tried first, and not through a user namespace.
    """
    if sys.platform != "linux":
        return dict.fromkeys(PROTECTIONS, f"{sys.platform} is no Linux"), False
    missing: dict[str, str] = {}
    as_root = os.geteuid() == 0
    while True:
        protections = tuple(name for name in PROTECTIONS if name not in missing)
        status = _launch(SandboxLimits(), protections, as_root, "", b"")[0]
        if status[0] != "setup":
            return missing, as_root
        name, reason = status[1], " ".join(status[2:])
        if name == "namespaces" and as_root:
            as_root = False
        elif name in protections:
            missing[name] = reason
        else:
            raise RuntimeError(f"no program can be started in a sandbox: {reason}")


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """The program's folder, or, with namespaces, the place in which their root is mounted and that stays empty."""
    path = os.path.realpath(tempfile.mkdtemp(prefix="sandbox-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _launch(
    limits: SandboxLimits, protections: Sequence[str], as_root: bool, program: str, stdin: bytes
) -> tuple[list[str], _Kept, _Kept]:
    """Runs a program; the words of the first line of status (see `sandbox_child.main`), standard output and error."""
    executable, readable, hidden = _python()
    status_read, status_write = os.pipe()
    streams = {status_read: _Kept(4096)}
    process = None
    with _folder() as folder:
        job = dataclasses.asdict(limits) | {
            **{"modules": _child_modules(), "program": program, "stdin": stdin, "status": status_write},
            **{"protections": list(protections), "as_root": as_root, "folder": folder},
            **{"readable": list(readable), "hidden": list(hidden), "devices": list(_DEVICES)},
        }
        try:
            process = subprocess.Popen(
                [executable, "-I", "-S", "-B", "-X", "utf8", "-c", _BOOT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd="/",
                env={},
                pass_fds=(status_write,),
                start_new_session=True,
            )
            os.close(status_write)
            status_write = -1
            assert process.stdin is not None and process.stdout is not None and process.stderr is not None
            streams[process.stdout.fileno()] = _Kept(limits.output_bytes)
            streams[process.stderr.fileno()] = _Kept(limits.output_bytes)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(marshal.dumps(job))
                process.stdin.close()
            _read_all(process, streams, limits)
        finally:
            _end(process)
            for descriptor in (status_read, status_write):
                if descriptor >= 0:
                    os.close(descriptor)
    kept = list(streams.values())
    words = kept[0].text()[0].partition("\n")[0].split()
    return words or ["setup", "limits", kept[2].text()[0] or "the launcher was killed"], kept[1], kept[2]


def _read_all(process: subprocess.Popen, streams: dict[int, _Kept], limits: SandboxLimits) -> None:
    """Reads until all streams are closed, which they are when the last process of the sandbox has ended."""
    deadline = time.monotonic() + limits.wall_seconds + _GRACE_SECONDS
    stopped = False
    with selectors.DefaultSelector() as selector:
        for descriptor in streams:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                data = os.read(key.fd, 1 << 16)
                streams[key.fd].add(data)
                if not data:
                    selector.unregister(key.fd)
                elif streams[key.fd].total > _OUTPUT_FACTOR * limits.output_bytes and not stopped:
                    process.send_signal(signal.SIGTERM)
                    stopped = True


def _end(process: subprocess.Popen | None) -> None:
    """Reaps the launcher. One that still runs is killed with its group, and the kernel ends its children after it."""
    if process is None:
        return
    try:
        process.wait(timeout=0.5)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(BrokenPipeError):
            if stream is not None:
                stream.close()


class PythonSandbox:
    """Runs Python programs under limits. It keeps no state between runs, and threads may share it.

    Attributes:
      limits: what each program may use.
      protections: those of the kernel's protections that hold it, of "namespaces", "landlock", "seccomp".
    """

    def __init__(self, limits: SandboxLimits | None = None, *, allow_missing: Sequence[str] = ()) -> None:
        """Tries which protections this machine has.

        Args:
          allow_missing: protections to do without where this machine lacks them. Without namespaces a program still
            sees which files exist, shares the disk, and may start threads only. Without landlock and namespaces it
            reads every file that the user can; without seccomp and namespaces it reaches the network.

        Raises:
          ValueError: `allow_missing` names none of the protections.
          RuntimeError: a protection is missing that it does not name.
        """
        unknown = sorted(set(allow_missing) - set(PROTECTIONS))
        if unknown:
            raise ValueError(f"allow_missing names {unknown[0]!r}; expected some of {', '.join(PROTECTIONS)}")
        missing, self._as_root = available_protections()
        refused = [f"{name} ({reason})" for name, reason in missing.items() if name not in allow_missing]
        if refused:
            raise RuntimeError(
                f"this machine lacks protections of the sandbox: {'; '.join(refused)}. "
                "Name them in allow_missing to run programs without"
            )
        self.limits = limits or SandboxLimits()
        self.protections = tuple(name for name in PROTECTIONS if name not in missing)

    def run(self, program: str, stdin: str = "") -> SandboxResult:
        """Runs a program to its end, and ends every process that it started.

        Args:
          program: the source, which runs as a file `program.py` would.
          stdin: what it finds on standard input.

        Raises:
          RuntimeError: the program could not be started (the machine has no processes or memory left).
        """
        start = time.monotonic()
        words, stdout, stderr = _launch(
            self.limits, self.protections, self._as_root, program, stdin.encode("utf-8", "replace")
        )
        if words[0] == "setup":
            raise RuntimeError(f"the sandbox could not be set up: {' '.join(words[1:])}")
        stopped: Any = words[1] if words[0] == "stopped" else None
        number = int(words[1]) if words[0] == "signal" else None
        # Who ignores SIGXCPU is killed a second of processor time later.
        if number == signal.SIGXCPU or (number == signal.SIGKILL and float(words[2]) >= self.limits.cpu_seconds):
            stopped = "cpu_seconds"
        (output, output_cut), (errors, errors_cut) = stdout.text(), stderr.text()
        code = int(words[1]) if words[0] == "exit" else None
        seconds = time.monotonic() - start
        return SandboxResult(output, errors, output_cut + errors_cut, code, number, stopped, seconds)


def python_tool(sandbox: PythonSandbox | None = None, *, name: str = "python") -> Tool:
    """A tool that runs programs in `sandbox` (None: a new one with the limits' defaults)."""
    chosen = sandbox or PythonSandbox()
    limits = chosen.limits
    description = (
        "Runs a Python program with the standard library and returns what it prints. Nothing is kept between calls; "
        f"no network. Limits: {limits.wall_seconds:g} s, {limits.memory_bytes >> 20} MB."
    )
    source = {"type": "string", "description": "Source of the program. It must print its results."}
    parameters = {
        "type": "object",
        "properties": {"program": source},
        "required": ["program"],
        "additionalProperties": False,
    }
    return Tool(name, description, parameters, lambda program: result_text(chosen.run(program), limits))


def result_text(result: SandboxResult, limits: SandboxLimits) -> str:
    """The observation for a program's end: its output, its errors, and how it ended unless that was as it should."""
    parts = [text.rstrip("\n") for text in (result.stdout, result.stderr) if text.strip()]
    if result.stopped == "output":
        parts.append("[stopped: too much output]")
    elif result.stopped:
        parts.append(f"[stopped: limit of {getattr(limits, result.stopped):g} {result.stopped.replace('_', ' ')}]")
    elif result.signal is not None:
        parts.append(f"[ended by signal {result.signal}, {signal.Signals(result.signal).name}]")
    elif result.exit_code:
        parts.append(f"[exit code {result.exit_code}]")
    return "\n".join(parts) if parts else "[no output]"
