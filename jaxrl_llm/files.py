"""Files that are whole or not there, also on a disk that is full."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(OSError):
    """There is no room for a file. What stood under its name before is as it was."""


@contextlib.contextmanager
def replacing(path: str | Path, num_bytes: int | None = None) -> Iterator[Path]:
    """Gives the path of a temporary file beside `path`; once it is written and on the disk, it takes the place of
    `path`. A reader, or a crash, sees the old file or the new one.

    Args:
      num_bytes: what it is going to take, for the message.

    Raises:
      DiskFullError: there was no room, whatever error the writer made of that.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except Exception as error:
        partial.unlink(missing_ok=True)
        raise_if_full(error, path, num_bytes)
        raise


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Replaces a file as `replacing` does.

    Raises:
      DiskFullError: there was no room.
    """
    data = content.encode() if isinstance(content, str) else content
    with replacing(path, len(data)) as partial:
        partial.write_bytes(data)


def append_whole(descriptor: int, path: Path, data: bytes) -> None:
    """Appends to a file that is open for that, all of `data` or nothing.

    Raises:
      DiskFullError: there was no room.
    """
    size = os.fstat(descriptor).st_size
    rest = memoryview(data)
    try:
        while rest:  # a write that fills the disk takes a part, and the next one fails
            rest = rest[os.write(descriptor, rest) :]
    except OSError as error:
        os.ftruncate(descriptor, size)
        raise_if_full(error, path, len(data))
        raise


def raise_if_full(error: BaseException, path: str | Path, num_bytes: int | None = None) -> None:
    """Raises `DiskFullError` if `error` came of a full disk (a quota, or a limit on the size of files).

    Libraries that write from other languages say so only in their text.
    """
    if isinstance(error, DiskFullError):
        raise error
    text = str(error)
    said = [f"os error {code})" in text or f"os_error_code='{code}'" in text for code in FULL]
    full = error.errno in FULL if isinstance(error, OSError) else any(said)
    if not full:
        return
    path = Path(path).absolute()
    folder = next(folder for folder in path.parents if folder.is_dir())
    needed = "it needs room" if num_bytes is None else f"it takes {num_bytes:,} bytes"
    raise DiskFullError(
        f"{path} could not be written ({error}): {needed}, and {shutil.disk_usage(folder).free:,} bytes are free in "
        f"{folder}. What stood there before is as it was. Make room; the same command goes on from the newest "
        "checkpoint"
    ) from error
