"""Ending a run from outside: the first Ctrl-C or SIGTERM lets the step finish, the second Ctrl-C ends the process at
once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """A run was asked to end and has saved its state. The exit code is 128 + the signal's number: 130 or 143."""


class StopRequests:
    """Within this context, `received` is the number of the signal that asked the run to end, or None.

    A thread reads the signals from a pipe, which the system's own handler fills. Python's handlers run in the main
    thread alone, and that may be waiting for a device for minutes. Outside the main thread (where signals cannot be
    caught) nothing is received.
    """

    def __init__(self) -> None:
        self.received: int | None = None

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
