"""Scalars for TensorBoard, written at once and by the thread that calls.

tensorboardX's `SummaryWriter` hands events to a thread of its own. That thread dies when the disk is full, and once its
queue is full whoever logs waits for ever.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from jaxrl_llm.files import raise_if_full


class EventFile:
    """One event file in `folder`; TensorBoard drops what earlier files have from `purge_step` on."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # the name has whole seconds, and a second file would overwrite the first
        self._events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._events.write_event(
            Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START))
        )

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """One value for each tag.

        Raises:
          DiskFullError: there was no room.
        """
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        try:
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        except OSError as error:
            raise_if_full(error, self.folder)
            raise

    def flush(self) -> None:
        """Puts all events so far on the disk.

        Raises:
          DiskFullError: there was no room.
        """
        try:
            self._events.flush()
        except OSError as error:
            raise_if_full(error, self.folder)
            raise

    def close(self) -> None:
        """Flushes and closes the file."""
        try:
            self._events.close()
        except OSError as error:
            raise_if_full(error, self.folder)
            raise
