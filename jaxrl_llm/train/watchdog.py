"""A run that hangs ends, says where, and can be started again."""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Hashable
from pathlib import Path
from types import TracebackType

STUCK = 75  # exit code; "try again" in sysexits.h
LEAST_SECONDS = 600.0
TIMES_MEDIAN = 20.0
REMEMBERED = 100  # durations of each kind
LAST_RESORT_SECONDS = 30.0
STANDARD_ERROR = 2


class Watchdog:
    """Within this context, the process ends with exit code 75 (`STUCK`) if something takes too long.

    Where that is, stands in `<folder>/stuck.txt`: the stacks of all threads. Nothing is saved, as what hangs may hold
    half a state; the newest checkpoint stands. Should a thread hang that never lets go of the interpreter, the stacks
    go to standard error 30 s later, and the exit code is 1.

    Args:
      folder: for the file.
      timeout: seconds that anything may take. None: 20 times the median of the same kind, but never less than 10
        minutes, and any time for the first of a kind, which compiles.
    """

    def __init__(self, folder: str | Path, timeout: float | None = None) -> None:
        if timeout is not None and not timeout > 0:
            raise ValueError(f"config.step_timeout must be positive seconds or None, got {timeout}")
        self.path, self.timeout = Path(folder) / "stuck.txt", timeout
        self._durations: dict[Hashable, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._changed = threading.Condition()
        self._kind: Hashable = None
        self._what = ""
        self._begun = 0.0
        self._allowed: float | None = None
        self._over = False

    def expect(self, kind: Hashable, what: str) -> None:
        """What was expected before has come; from now on this is. `what` names it for whoever reads that it hangs."""
        now = time.monotonic()
        with self._changed:
            if self._kind is not None:
                self._durations[self._kind].append(now - self._begun)
            self._kind, self._what, self._begun = kind, what, now
            self._allowed = self._limit(kind)
            self._changed.notify()
        self._arm(self._allowed)

    def _limit(self, kind: Hashable) -> float | None:
        if self.timeout is not None or not self._durations[kind]:
            return self.timeout
        return max(LEAST_SECONDS, TIMES_MEDIAN * statistics.median(self._durations[kind]))

    def _arm(self, seconds: float | None) -> None:
        faulthandler.cancel_dump_traceback_later()
        if seconds is not None:  # a thread of C, which needs no leave of the interpreter
            faulthandler.dump_traceback_later(seconds + LAST_RESORT_SECONDS, exit=True, file=STANDARD_ERROR)

    def _watch(self) -> None:
        with self._changed:
            while not self._over:
                left = None if self._allowed is None else self._begun + self._allowed - time.monotonic()
                if left is not None and left <= 0:
                    self._end()
                self._changed.wait(left)

    def _end(self) -> None:
        message = (
            f"stuck: {self._what} has taken more than {self._allowed:.0f} s. The stacks of all threads are in "
            f"{self.path}. Nothing more is saved; the newest checkpoint stands, and the same command goes on from it. "
            f"config.step_timeout sets another limit. Exit code {STUCK}"
        )
        try:
            print(f"\n{message}", file=sys.stderr, flush=True)
            with self.path.open("a", encoding="utf-8") as file:
                print(message, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        finally:
            os._exit(STUCK)

    def __enter__(self) -> Watchdog:
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        with self._changed:
            self._over = True
            self._changed.notify()
        self._thread.join()
