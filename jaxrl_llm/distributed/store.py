"""Samples between those who make them and those who train on them: durable, acknowledged, each given out once.

A folder with one file a sample and a ledger, `ledger.jsonl`, with a line for each thing that happened to one:

    {"event": "committed", "key": "search", "id": "12", "reward": 0.5, "crc32": 93, "bytes": 812, ...}
    {"event": "fetched", "key": "search", "step": 3, "ids": ["12", "14"], ...}
    {"event": "dropped", "key": "search", "id": "13", "reason": "stale"}

A line is on the disk before the call that wrote it returns, and a sample before its line. So whoever was told that a
sample is committed may forget it, a second commit of the same id changes nothing, and a trainer that comes back from a
checkpoint and asks for a step again is given what it was given then. A process killed at any moment leaves at most a
sample without its line, which was not acknowledged.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxrl_llm.files import append_whole, write_atomically
from jaxrl_llm.train.logging import drop_torn_line

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")


class Sample(NamedTuple):
    """What was committed: its id, its value, the reward, and further facts of its ledger line."""

    id: str
    value: Any
    reward: float
    facts: dict[str, Any]


class Fetched(NamedTuple):
    """What a step was given, and the facts that were noted with it."""

    samples: list[Sample]
    facts: dict[str, Any]


class SampleStore:
    """The samples in `folder`, in queues by key, first in first out. One process at a time, any number of its threads.

    Values are pickled: open only folders that your own runs wrote.

    Raises:
      ValueError: the ledger has a line in the middle that cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock = threading.RLock()
        self._waiting: dict[str, dict[str, dict[str, Any]]] = {}  # by key and id, in the order of their commits
        self._ids: dict[str, set[str]] = {}
        self._steps: dict[tuple[str, int], tuple[list[dict[str, Any]], dict[str, Any]]] = {}  # not yet released
        self._released: dict[str, int] = {}  # by key: steps before this one
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "ledger.jsonl"
        drop_torn_line(path)
        for line in read_ledger(self.folder):
            self._apply(line)
        self._ledger = path.open("ab", buffering=0)

    def commit(self, key: str, value: Any, *, id: str, reward: float, **facts: Any) -> bool:
        """Keeps a sample. Once this returns, it is not lost, whoever is killed.

        Args:
          key: of the queue. id: no two samples of a queue have the same. Both of letters, digits and `_ . -`.
          reward: of the sample. facts: anything for the ledger that JSON can write.

        Returns:
          False if there was a sample of this id already: nothing was done.

        Raises:
          ValueError: no reward, or one that is not finite; a key or an id of other characters.
          DiskFullError: there is no room; nothing was committed.
        """
        for name, text in (("key", key), ("id", id)):
            if not _NAME.fullmatch(text):
                raise ValueError(f"{name} {text!r}: expected 1 to 100 of the characters A-Z a-z 0-9 _ . -")
        if reward is None or not math.isfinite(reward):
            raise ValueError(f"sample {id!r} of {key!r} has the reward {reward!r}: score it first, or leave it out")
        content = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        with self._lock:
            if id in self.ids(key):
                return False
            path = self._path(key, id)
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, content)
            checks = {"crc32": zlib.crc32(content), "bytes": len(content)}
            self._write({"event": "committed", "key": key, "id": id, "reward": float(reward), **checks, **facts})
            return True

    def fetch(self, key: str, step: int, count: int, facts: Callable[[], dict[str, Any]] = dict) -> Fetched | None:
        """The samples of a step: the `count` that have waited longest, or those that it was given before.

        Args:
          step: of the trainer whose queue this is.
          facts: gives what else to note, when the step is given its samples for the first time.

        Returns:
          None where fewer than `count` wait.

        Raises:
          ValueError: the store is closed, the step was released, or a sample is not what was committed.
        """
        with self._lock:
            if self._ledger.closed:
                raise ValueError(f"the store in {self.folder} is closed")
            if step < self._released.get(key, 0):
                raise ValueError(f"the samples of step {step} of {key!r} were released; go on in a new workdir")
            if (key, step) not in self._steps:
                ids = list(self._waiting.get(key, {}))[:count]
                if len(ids) < count:
                    return None
                self._write({"event": "fetched", "key": key, "step": step, "ids": ids, **facts()})
            lines, noted = self._steps[key, step]
            return Fetched([self._read(key, line) for line in lines], noted)

    def drop(self, key: str, id: str, reason: str) -> None:
        """Notes that a sample, committed or not, is not to be trained on. The id may be committed again."""
        with self._lock:
            self._write({"event": "dropped", "key": key, "id": id, "reason": reason})
            self._path(key, id).unlink(missing_ok=True)

    def release(self, key: str, before: int) -> None:
        """Deletes the samples of all steps before that one: no trainer will come back to them. The ledger stays."""
        with self._lock:
            self._released[key] = max(before, self._released.get(key, 0))
            for old in [old for old in self._steps if old[0] == key and old[1] < before]:
                for line in self._steps.pop(old)[0]:
                    self._path(key, line["id"]).unlink(missing_ok=True)

    def waiting(self, key: str) -> list[dict[str, Any]]:
        """The ledger lines of what is committed and was given to no step."""
        with self._lock:
            return list(self._waiting.get(key, {}).values())

    def ids(self, key: str) -> set[str]:
        """Of all samples of a queue, given out or not, but without those that were dropped."""
        with self._lock:
            return self._ids.setdefault(key, set())

    def close(self) -> None:
        """Ends writing. What was committed can be read by the next store."""
        self._ledger.close()

    def _write(self, line: dict[str, Any]) -> None:
        append_whole(self._ledger.fileno(), self.folder / "ledger.jsonl", json.dumps(line).encode() + b"\n")
        os.fsync(self._ledger.fileno())
        self._apply(line)

    def _apply(self, line: dict[str, Any]) -> None:
        key, waiting = line["key"], self._waiting.setdefault(line["key"], {})
        if line["event"] == "committed":
            waiting[line["id"]] = line
            self.ids(key).add(line["id"])
        elif line["event"] == "fetched":
            facts = {name: value for name, value in line.items() if name not in ("event", "key", "step", "ids")}
            self._steps[key, line["step"]] = ([waiting.pop(id) for id in line["ids"]], facts)
        elif line["event"] == "dropped":
            waiting.pop(line["id"], None)
            self.ids(key).discard(line["id"])

    def _path(self, key: str, id: str) -> Path:
        return self.folder / key / id

    def _read(self, key: str, line: dict[str, Any]) -> Sample:
        path = self._path(key, line["id"])
        content = path.read_bytes() if path.exists() else None
        if content is None or zlib.crc32(content) != line["crc32"]:
            raise ValueError(
                f"{path} is {'missing' if content is None else 'damaged'}, and a step is to be given it again; "
                "go on in a new workdir"
            )
        facts = {name: value for name, value in line.items() if name not in ("event", "key", "id", "reward")}
        return Sample(line["id"], pickle.loads(content), line["reward"], facts)


def read_ledger(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a store's ledger, also while it is written; none where there is no ledger.

    Raises:
      ValueError: a line in the middle is not JSON.
    """
    path = Path(folder) / "ledger.jsonl"
    *lines, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} has a line that is not JSON ({error}); delete that line, or the folder") from error


def audit(folder: str | Path, key: str) -> tuple[dict[str, int], list[str]]:
    """What became of the samples of a queue, from the ledger alone, and everything that is wrong with it.

    Returns:
      Numbers of samples `committed` (acknowledged), `fetched` (each by one step), `waiting` and `dropped`; and a line
      for each sample that was given out twice, or without having been committed, or is committed twice.
    """
    state: dict[str, str] = {}
    counts = {"committed": 0, "fetched": 0, "waiting": 0, "dropped": 0}
    wrong = []
    steps = set()
    for line in (line for line in read_ledger(folder) if line["key"] == key):
        if line["event"] == "committed":
            if line["id"] in state:
                wrong.append(f"{line['id']} is committed again, though {state[line['id']]}")
            state[line["id"]] = "waiting"
            counts["committed"] += 1
        elif line["event"] == "dropped":
            counts["dropped"] += 1
            if state.pop(line["id"], "waiting") != "waiting":
                wrong.append(f"{line['id']} is dropped, though a step had it")
        else:
            if line["step"] in steps:
                wrong.append(f"step {line['step']} is given samples a second time")
            steps.add(line["step"])
            for id in line["ids"]:
                if state.get(id) != "waiting":
                    wrong.append(f"step {line['step']} is given {id}, which is {state.get(id, 'not committed')}")
                state[id] = "fetched"
    counts["fetched"] = sum(what == "fetched" for what in state.values())
    counts["waiting"] = sum(what == "waiting" for what in state.values())
    missing = [id for id, what in state.items() if what == "waiting" and not (Path(folder) / key / id).exists()]
    return counts, wrong + [f"{id} waits, but its file is gone" for id in missing]
