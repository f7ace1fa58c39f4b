"""What a run leaves behind: `config.json`, `metrics.jsonl`, `summary.json`, TensorBoard events, figures and outcomes.

`metrics.jsonl` has one object for each (stage, step[, seed]), once and in order, also after a crash: what a resumed run
makes again replaces what the crashed one had written. Made again, a line is the same bit for bit but for `TIMING_KEYS`.

Nothing is left half written when the disk is full: what writes raises `DiskFullError`, and the file is as it was.
"""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from jaxrl_llm.files import append_whole, write_atomically
from jaxrl_llm.train.config import config_difference, to_json
from jaxrl_llm.train.processes import all_agree, is_writer
from jaxrl_llm.train.tensorboard import EventFile
from jaxrl_llm.types import Metrics

TIMING_KEYS = ("seconds", "tokens_per_second", "minutes")
PLAIN_SECONDS = 10.0  # between lines where the output is not a terminal

# Label of the progress line, and the metrics that may stand behind it, the first that is there.
PROGRESS = {
    "tokens/s": ("tokens_per_second",),
    "loss": ("loss",),
    "reward": ("reward",),
    "success": ("success",),
    "held out": ("eval/success",),
    "entropy": ("entropy",),
    "KL": ("kl", "approx_kl"),
    "clipped": ("clip_fraction",),
    "skipped": ("skipped",),
}


class WorkdirError(ValueError):
    """A workdir cannot be used: another process has it, or it holds a run of another config."""


class RunLog:
    """The record of one run in `workdir`, held by one process at a time, or by those of one `jax.distributed` run: of
    them process 0 writes, and for the others `writes` is false and all that would write does nothing.

    Args:
      workdir: made if absent. If it holds a run already, that run goes on; its config must be equal but for `mesh`.
      config: an ml_collections ConfigDict or a mapping. The training loop reads its settings from here.
      quiet: no progress on the screen.

    Raises:
      WorkdirError: the workdir holds a run of another config (every differing key is named), or another process uses
        it.
    """

    def __init__(self, workdir: str | Path, config: Any, *, quiet: bool = False) -> None:
        self.workdir = Path(workdir)
        self.config = config
        self.quiet = quiet
        self.steps_done = 0  # by this process, over all stages
        self.opened = time.perf_counter()
        self.writes = is_writer()
        self._metrics_path = self.workdir / "metrics.jsonl"
        problem = self._open() if self.writes else None
        if not all_agree(problem is None):
            raise problem or WorkdirError(f"process 0 cannot use {self.workdir}; it says why")
        self._writers: dict[str, EventFile] = {}
        self._purge_step = 0  # TensorBoard drops what an earlier process wrote from this step on
        self._progress: _Progress | None = None

    def _open(self) -> WorkdirError | None:
        self.workdir.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = _lock(self.workdir)
        except WorkdirError as error:
            return error
        try:
            self._check_config()
        except WorkdirError as error:
            self._lock.close()
            return error
        drop_torn_line(self._metrics_path)
        self._lines = self._metrics_path.open("ab", buffering=0)
        return None

    def _check_config(self) -> None:
        path = self.workdir / "config.json"
        if not path.exists():
            write_atomically(path, to_json(self.config) + "\n")
            return
        differences = [
            line
            for line in config_difference(json.loads(path.read_text()), self.config)
            if not line.startswith("mesh.")  # a run may go on with more devices or fewer
        ]
        if differences:
            raise WorkdirError(
                f"{self.workdir} holds a run of another config; use another --workdir, or delete that one. "
                "The differences:\n  " + "\n  ".join(differences)
            )

    # Metrics of steps

    def start_stage(self, stage: str, step: int, steps: int) -> None:
        """Readies the record for `stage` going on from `step`: its lines beyond that step are dropped.

        Lines of other stages stay. Stages stand in the order in which they first appeared.
        """
        if not self.writes:
            return
        self._lines.close()
        lines = [line for line in read_metrics(self.workdir) if line["stage"] != stage or line["step"] <= step]
        order = {name: index for index, name in enumerate(dict.fromkeys(line["stage"] for line in lines))}
        lines.sort(key=lambda line: (order[line["stage"]], line["step"]))  # stable: seeds keep their order
        write_atomically(self._metrics_path, "".join(_dump(line) + "\n" for line in lines))
        self._lines = self._metrics_path.open("ab", buffering=0)
        for name in [name for name in self._writers if name.split("/")[0] == stage]:
            self._writers.pop(name).close()
        self._purge_step = step + 1
        if not self.quiet:
            self._progress = _Progress(stage, max(step, 0), steps)

    def metrics(self, stage: str, step: int, values: Mapping[str, Any], seed: int | None = None) -> None:
        """Appends one line. Values are scalars; what is not finite is written as null."""
        if not self.writes:
            return
        head = {"stage": stage, "step": step} | ({} if seed is None else {"seed": seed})
        line: dict[str, Any] = head | {name: _scalar(name, value) for name, value in values.items()}
        append_whole(self._lines.fileno(), self._metrics_path, (_dump(line) + "\n").encode())
        events = self._tensorboard(stage if seed is None else f"{stage}/seed_{seed}")
        scalars = {name: line[name] for name in values if line[name] is not None}
        events.add(step, {f"{stage}/{name}": value for name, value in scalars.items()})

    def progress(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows how far the stage is, with those of the metrics of `PROGRESS` that are there."""
        if self._progress is not None:
            self._progress.update(step, values)

    def end_stage(self) -> None:
        """Takes the progress line off the screen and flushes the event files."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None
        self.sync()

    def sync(self) -> None:
        """Puts all lines so far on the disk, before a checkpoint of the same step may be."""
        if not self.writes:
            return
        os.fsync(self._lines.fileno())
        for writer in self._writers.values():
            writer.flush()

    def _tensorboard(self, name: str) -> EventFile:
        if name not in self._writers:
            self._writers[name] = EventFile(self.workdir / "tensorboard" / name, self._purge_step)
        return self._writers[name]

    def last(self, stage: str) -> Metrics | list[Metrics]:
        """The last line of a stage; with several seeds, the last line of each.

        Raises:
          ValueError: the stage has no line.
        """
        lines = [line for line in read_metrics(self.workdir) if line["stage"] == stage]
        if not lines:
            raise ValueError(f"stage {stage!r} has no line in {self._metrics_path}")
        last = [line for line in lines if line["step"] == lines[-1]["step"]]
        return last if "seed" in last[0] else last[0]

    # Results

    def summary(self, values: Mapping[str, Any]) -> None:
        """Merges `values` into `summary.json`, which is replaced in one go. Arrays become lists; what is not finite,
        null.

        A run of several seeds at once gives each metric as a list in the order of `config.seed`.
        """
        if not self.writes:
            return
        path = self.workdir / "summary.json"
        merged = (read_summary(self.workdir) or {}) | _plain(values)
        write_atomically(path, json.dumps(merged, indent=2, allow_nan=False) + "\n")

    def outcomes(self, name: str, values: Any) -> None:
        """Keeps per-question outcomes `[N]` (or `[seeds, N]`) of the metric of that name in the summary
        (`trained.success`).

        Question `n` must be the same in all runs of a table: with outcomes, its intervals also account for the choice
        of the questions, and differences are paired by question (`jaxrl_llm.train.intervals`).

        Raises:
          ValueError: the array has no axis, more than two, or values that are not finite.
        """
        array = np.asarray(values, np.float64)
        if array.ndim not in (1, 2) or not np.all(np.isfinite(array)):
            raise ValueError(f"outcomes {name!r} must be finite numbers [N] or [seeds, N], got shape {array.shape}")
        if not self.writes:
            return
        folder = self.workdir / "outcomes"
        folder.mkdir(exist_ok=True)
        content = io.BytesIO()
        np.save(content, array)
        write_atomically(folder / f"{_file_name(name)}.npy", content.getvalue())

    def figure(self, name: str, figure: Any) -> Path:
        """Saves a matplotlib figure as `figures/<name>.png` and returns the path."""
        path = self.workdir / "figures" / f"{_file_name(name)}.png"
        if self.writes:
            path.parent.mkdir(exist_ok=True)
            content = io.BytesIO()
            figure.savefig(content, dpi=150, bbox_inches="tight")
            write_atomically(path, content.getvalue())
        return path

    def info(self, text: str) -> None:
        """Prints a line without tearing the progress line."""
        if self._progress is not None:
            self._progress.print(text)
        elif self.writes and not self.quiet:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the record and lets another process have the workdir. May be called twice."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None
        if not self.writes:
            return
        self._lines.close()
        self._lock.close()
        writers, self._writers = self._writers, {}
        for writer in writers.values():
            writer.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Progress:
    """A live line on a terminal; elsewhere a plain line now and then."""

    def __init__(self, stage: str, step: int, steps: int) -> None:
        self.stage, self.steps = stage, steps
        self.started, self.start_step = time.perf_counter(), step
        self.printed = -math.inf
        self.values: dict[str, float] = {}
        self.bar: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(compact=True),
            )
            self.bar.start()
            self.task = self.bar.add_task(stage, total=steps, completed=step, text="")

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        self.values.update({name: value for name, value in values.items() if value is not None})
        text = progress_text(self.values)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=text)
            return
        now = time.perf_counter()
        if (
            now - self.printed < PLAIN_SECONDS
            and step < self.steps
            and not any(name.startswith("eval/") for name in values)
        ):
            return
        self.printed = now
        done = step - self.start_step
        left = (
            f"  {(now - self.started) / done * (self.steps - step):.0f} s left"
            if 0 < done and step < self.steps
            else ""
        )
        print(f"{self.stage} {step}/{self.steps}  {text}{left}", flush=True)

    def print(self, text: str) -> None:
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def progress_text(values: Mapping[str, Any]) -> str:
    """The metrics of `PROGRESS` that are there, in its order: `tokens/s 12000  reward 0.41  KL 0.003`."""
    parts = []
    for label, names in PROGRESS.items():
        value = next((values[name] for name in names if values.get(name) is not None), None)
        if value is not None and not (label == "skipped" and value == 0):
            parts.append(f"{label} {value:,.0f}" if label in ("tokens/s", "skipped") else f"{label} {value:.3g}")
    return "  ".join(parts)


def read_metrics(workdir: str | Path) -> list[Metrics]:
    """The lines of `metrics.jsonl` in order; a torn last line is left out, no file gives none.

    Raises:
      ValueError: a line in the middle is not JSON.
    """
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} has a line that is not JSON ({error}); delete that line, or the workdir") from error


def read_summary(workdir: str | Path) -> dict[str, Any] | None:
    """`summary.json`, or None where there is none yet."""
    path = Path(workdir) / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def read_outcomes(workdir: str | Path, name: str) -> np.ndarray | None:
    """What `RunLog.outcomes` kept under that name, or None."""
    path = Path(workdir) / "outcomes" / f"{_file_name(name)}.npy"
    return np.load(path) if path.exists() else None


def _lock(workdir: Path) -> Any:
    """An exclusive lock that the system drops when its holder dies, however it dies."""
    file = (workdir / ".lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise WorkdirError(
            f"another process is using {workdir}; wait for it to end, or use another --workdir"
        ) from None
    return file


def drop_torn_line(path: Path) -> None:
    """A line without its newline was being written when the process died."""
    if path.exists():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)


def _dump(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False)


def _scalar(name: str, value: Any) -> float | int | None:
    array = np.asarray(value)
    if array.shape != ():
        raise ValueError(f"metric {name!r} must be a scalar, got shape {array.shape}")
    return _plain(array)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, Sequence):
        return [_plain(inner) for inner in value]
    array = np.asarray(value)
    if array.ndim:
        return [_plain(inner) for inner in array]
    if array.dtype.kind in "biu":
        return array.item()
    number = float(array)
    return number if math.isfinite(number) else None


def _file_name(name: str) -> str:
    """A file name for a metric's path: `success/2` -> `success.2`."""
    return re.sub(r"[^A-Za-z0-9_.-]", ".", name)
