"""Ending a run from outside: the first Ctrl-C or SIGTERM lets the step finish, the second Ctrl-C ends the process at
once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax

from jaxrl_llm.train.processes import largest

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """A run was asked to end and has saved its state. The exit code is 128 + the signal's number: 130 or 143."""


class StopRequests:
    """Within this context, `received` is the number of the signal that asked the run to end, or None.

    A thread reads the signals from a pipe, which the system's own handler fills. Python's handlers run in the main
    thread alone, and that may be waiting for a device for minutes. Outside the main thread (where signals cannot be
    caught) nothing is received.

    Args:
      grace_seconds: if this context is still active so long after the signal, the process ends at once, with the same
        exit code as if it had saved. None: it takes the time that it takes.
      newest: what the message then says that is left, such as "step 40".
    """

    def __init__(self, grace_seconds: float | None = None, newest: Callable[[], str] = lambda: "none") -> None:
        if grace_seconds is not None and not grace_seconds > 0:
            raise ValueError(f"config.grace_seconds must be positive seconds or None, got {grace_seconds}")
        self.received: int | None = None
        self._grace_seconds, self._newest = grace_seconds, newest
        self._timer: threading.Timer | None = None
        self._asked: Any = 0

    def agreed(self) -> int:
        """The number of a signal that asked any of the processes to end, or 0: the same in all, which call it once a
        step. With several processes it is what they had received by the call before, so that none waits for it."""
        asked, self._asked = self._asked, largest(self.received or 0)
        return int(self._asked if jax.process_count() == 1 else asked)

    def __enter__(self) -> StopRequests:
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._old_descriptor = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._old_handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
            self._thread = threading.Thread(target=self._watch, daemon=True, name="stop-requests")
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._old_descriptor)
            os.close(self._writer)
            self._thread.join()
            os.close(self._reader)
            if self._timer is not None:
                self._timer.cancel()

    def _watch(self) -> None:
        while byte := os.read(self._reader, 1):
            number = byte[0]
            if number not in SIGNALS:
                continue
            if self.received is not None and number == signal.SIGINT:
                os._exit(128 + number)
            if self.received is None:
                self.received = number
                name = signal.Signals(number).name
                print(
                    f"\n{name}: finishing this step and saving; Ctrl-C once more ends at once",
                    file=sys.stderr,
                    flush=True,
                )
                if self._grace_seconds is not None:
                    self._timer = threading.Timer(self._grace_seconds, self._give_up, [number])
                    self._timer.daemon = True
                    self._timer.start()

    def _give_up(self, number: int) -> None:
        print(
            f"\n{signal.Signals(number).name}: the step was not finished and saved within grace_seconds="
            f"{self._grace_seconds:g}. The newest checkpoint stands ({self._newest()}), and the same command goes on "
            "from it",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + number)
