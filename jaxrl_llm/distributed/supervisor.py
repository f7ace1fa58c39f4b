"""The process that nothing but its own death ends: it runs a command, and runs it again when that is killed.

It starts neither Ray nor JAX, so that what ends those does not end it. What restarts what:

| killed | restarted by | goes on from |
| --- | --- | --- |
| a rollout worker, a tool server | the trainer | the rollouts and calls that it had are made again |
| the trainer, and with it its workers | the supervisor | the newest checkpoint, and the rollouts in the store |
| the head of the Ray cluster, and with it all of these | the supervisor, for a cluster of the run's own | the same |
| the supervisor, and with it everything | whoever started it: the same command again | the same |
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Exit codes of a command that is not run again: done, bad arguments, failed by itself, asked to end.
FAILED = 3
FINAL = (0, 2, FAILED, 128 + signal.SIGINT, 128 + signal.SIGTERM)
MOST_DEATHS = 5  # in a row without progress
PAUSE_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1  # of Linux
_SUPERVISOR = "JAXRL_SUPERVISOR"


def supervise(
    command: Sequence[str],
    progress: Callable[[], Any],
    *,
    most_deaths: int = MOST_DEATHS,
    pause_seconds: float = PAUSE_SECONDS,
) -> int:
    """Runs `command` until it is done, has failed by itself or was asked to end, and returns its exit code.

    SIGINT and SIGTERM are passed on to it. If this process is killed, it is killed too.

    Args:
      command: ends with 0, 2, 130, 143 or `FAILED` when it is not to be run again; with anything else when it is.
      progress: any value that changes as the command gets on. After `most_deaths` deaths in a row without a change,
        the last exit code is returned; before, there is a pause, which doubles each time.
    """
    deaths, before = 0, progress()
    while True:
        code = _run(command)
        if code in FINAL:
            return code
        now = progress()
        deaths, before = (1 if now != before else deaths + 1), now
        name = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        if deaths == most_deaths:
            print(f"ended {name}, {deaths} times in a row without getting on: giving up", file=sys.stderr, flush=True)
            return code if code > 0 else 128 - code
        print(f"ended {name}; started again, and goes on from what is saved", file=sys.stderr, flush=True)
        time.sleep(pause_seconds * 2 ** (deaths - 1))


def workdir_progress(workdir: str | Path) -> tuple[int, ...]:
    """Sizes of what a run writes as it gets on: its metrics and the ledger of its rollouts."""
    files = [Path(workdir) / "metrics.jsonl", Path(workdir) / "rollouts" / "ledger.jsonl"]
    return tuple(file.stat().st_size if file.exists() else 0 for file in files)


def die_with_supervisor() -> None:
    """In the command: lets the system kill this process when its supervisor dies; nothing if it has none.

    Without it, the same command again would find the workdir in use by a run that nobody watches.
    """
    if supervisor := os.environ.pop(_SUPERVISOR, None):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(supervisor):
            os.kill(os.getpid(), signal.SIGKILL)


def _run(command: Sequence[str]) -> int:
    """One life of the command, in a session of its own: Ctrl-C on a terminal must not reach it twice."""
    asked: list[int] = []
    process: subprocess.Popen | None = None

    def pass_on(number: int, frame: Any) -> None:
        asked.append(number)
        if process is not None:
            process.send_signal(number)

    handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        environment = os.environ | {_SUPERVISOR: str(os.getpid())}
        process = subprocess.Popen(command, start_new_session=True, env=environment)
        code = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 128 + asked[0] if asked and code != 0 else code
