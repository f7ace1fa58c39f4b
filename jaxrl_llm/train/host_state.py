"""What a run keeps on the host (a curriculum, a replay buffer, a position in a source), saved beside each checkpoint.

The file `<step>.host` is complete before the checkpoint `<step>` is begun, and it is read only with that checkpoint. So
the two are of one moment, whenever the process is killed. It has a CRC-32.
"""

from __future__ import annotations

import io
import json
import warnings
import zlib
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxrl_llm.files import write_atomically
from jaxrl_llm.train.checkpoints import CheckpointError, finished_steps


class HostState(Protocol):
    """An object whose state goes into checkpoints: dicts with text keys, lists, text, numbers and arrays, in any
    nesting (tuples come back as lists). With several processes, it must be the same in all."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


def save_host_state(folder: Path, step: int, host: HostState) -> None:
    """Writes `<folder>/<step>.host`. To be called before the checkpoint of that step is.

    Raises:
      DiskFullError: there was no room.
      TypeError: something in the state is none of what `HostState` lists.
    """
    if jax.process_index() == 0:
        data = pack(host.get_state())
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{step}.host", zlib.crc32(data).to_bytes(4, "big") + data)
        oldest = min(finished_steps(folder), default=0)
        for path in folder.glob("*.host"):  # the checkpoint of one may be under way, but not of those before the oldest
            if int(path.stem) < oldest:
                path.unlink()


def load_host_state(folder: Path, step: int) -> Any:
    """What `save_host_state` was given.

    Raises:
      CheckpointError: there is no such file, or it is damaged.
    """
    path = folder / f"{step}.host"
    if not path.exists():
        raise CheckpointError(
            f"checkpoint {folder / str(step)} has no host state ({path} is missing): it was made by other code or "
            "settings. Use another workdir"
        )
    content = path.read_bytes()
    if zlib.crc32(content[4:]).to_bytes(4, "big") != content[:4]:
        raise CheckpointError(f"{path} is damaged: its checksum differs")
    return unpack(content[4:])


def set_damaged_aside(folder: Path) -> None:
    """Passes over checkpoints whose host state is damaged: renamed to `<step>.bad`, with a warning."""
    if jax.process_index() != 0:  # the one who says which checkpoint is taken
        return
    for step in reversed(finished_steps(folder)):
        try:
            load_host_state(folder, step)
            return
        except CheckpointError as error:
            if not (folder / f"{step}.host").exists():
                raise
            warnings.warn(f"{error}; trying the one before", RuntimeWarning, stacklevel=2)
            (folder / str(step)).rename(folder / f"{step}.bad")


def pack(state: Any) -> bytes:
    """A state as bytes: JSON, with the arrays beside it."""
    arrays: list[np.ndarray] = []

    def put_aside(value: Any) -> dict[str, int]:
        array = np.asarray(value)
        if array.dtype == object:
            raise TypeError(f"host state must be dicts, lists, text, numbers and arrays, got {type(value).__name__}")
        arrays.append(array)
        return {"__array__": len(arrays) - 1}

    text = json.dumps(state, default=put_aside)
    content = io.BytesIO()
    np.savez(content, text, *arrays)
    return content.getvalue()


def unpack(data: bytes) -> Any:
    """Inverse of `pack`."""
    with np.load(io.BytesIO(data)) as parts:
        arrays = [parts[f"arr_{index + 1}"] for index in range(len(parts.files) - 1)]
        return json.loads(
            str(parts["arr_0"]), object_hook=lambda value: arrays[value["__array__"]] if "__array__" in value else value
        )
