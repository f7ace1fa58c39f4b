"""Kills a run again and again and compares what it ends with to a run that nobody disturbed.

    python -m benchmarks.kill_resume --kills=10 --config=search_r1:tiny [--config.steps=40]

The page runs once uninterrupted. Then it runs in a second workdir, where it gets `kill -9` at random moments: in the
start-up, in a step, and, every third time, while a checkpoint is being written. After the last kill it may end. Final
parameters (and all other arrays of the newest checkpoint of every stage), outcomes and summaries must be equal bit for
bit, and so must metrics.jsonl but for timings. The exit code is 1 if they are not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.train import finished_steps, parse_overrides, read_arrays, read_metrics, read_summary
from jaxrl_llm.train.logging import TIMING_KEYS

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.001


def start(config: str, overrides: dict[str, str], workdir: Path, *options: str) -> subprocess.Popen[bytes]:
    """Starts a run in a process of its own; its output goes to `<workdir>.log`."""
    command = [sys.executable, "-m", "experiments.run", f"--config={config}", f"--workdir={workdir}", *options]
    command += [f"--config.{key}={value}" for key, value in overrides.items()]
    with workdir.with_name(f"{workdir.name}.log").open("ab") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)


def count_lines(workdir: Path) -> int:
    """Finished lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def is_writing(workdir: Path, since: float = 0.0) -> bool:
    """Whether a checkpoint is under its temporary name just now, one begun after the time `since`."""
    partial = (workdir / "checkpoints").glob("*/*orbax-checkpoint-tmp*")
    return any(os.path.exists(path) and os.path.getmtime(path) > since for path in partial)


def kill_when(
    process: subprocess.Popen[bytes], workdir: Path, *, lines: int = 0, writing: bool = False, delay: float = 0.0
) -> bool:
    """Sends SIGKILL once `lines` lines are there (and a checkpoint is being written) and `delay` seconds have passed.

    Returns:
      False if the run ended before.
    """
    begun = time.time()
    while process.poll() is None:
        if count_lines(workdir) >= lines and (not writing or is_writing(workdir, begun)):
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            return process.wait() == -signal.SIGKILL
        time.sleep(POLL_SECONDS)
    return False


def differences(one: Path, other: Path) -> list[str]:
    """Everything in which two finished workdirs differ that should be equal; timings and dates may differ."""
    found = []
    lines = [[_untimed(line) for line in read_metrics(workdir)] for workdir in (one, other)]
    keys = [[(line["stage"], line["step"], line.get("seed")) for line in run] for run in lines]
    if keys[0] != keys[1]:
        found.append(f"metrics.jsonl: {len(keys[0])} lines against {len(keys[1])}, or in another order")
    elif lines[0] != lines[1]:
        first = next(index for index, pair in enumerate(zip(*lines, strict=True)) if pair[0] != pair[1])
        found.append(f"metrics.jsonl: {lines[0][first]} against {lines[1][first]}")
    summaries = [_untimed(read_summary(workdir) or {}) | {"run": None} for workdir in (one, other)]
    if summaries[0] != summaries[1]:
        found.append(f"summary.json: {json.dumps(summaries[0])} against {json.dumps(summaries[1])}")
    arrays = [final_arrays(workdir) for workdir in (one, other)]
    for name in sorted(arrays[0].keys() | arrays[1].keys()):
        left, right = (run.get(name) for run in arrays)
        if left is None or right is None or left.dtype != right.dtype or left.tobytes() != right.tobytes():
            found.append(f"{name} differs")
    return found


def _untimed(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in TIMING_KEYS}


def final_arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Outcomes, and all arrays of the newest checkpoint of every stage."""
    arrays = {path.name: np.load(path) for path in sorted((workdir / "outcomes").glob("*.npy"))}
    for stage in sorted((workdir / "checkpoints").iterdir()):
        step = finished_steps(stage)[-1]
        arrays |= {f"{stage.name}/{step}{name}": array for name, array in read_arrays(stage / str(step)).items()}
    return arrays


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 equal, 1 different, 2 a run failed."""
    overrides, rest = parse_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kill_resume", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--config", required=True, help="config file or slug, with :arm")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workdir", help="keeps both runs here (default: a temporary folder)")
    options = parser.parse_args(rest)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.workdir or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        whole, killed = folder / "whole", folder / "killed"
        begun = time.perf_counter()
        if start(options.config, overrides, whole).wait() != 0:
            print((folder / "whole.log").read_text(errors="replace"), file=sys.stderr)
            return 2
        seconds = time.perf_counter() - begun
        total = count_lines(whole)
        print(f"uninterrupted: {total} lines in {seconds:.1f} s", flush=True)

        random_moments = random.Random(options.seed)
        targets = sorted(random_moments.randrange(total) for _ in range(options.kills))
        step_seconds = (read_summary(whole) or {})["run"]["step_seconds"] / total
        for number, lines in enumerate(targets, start=1):
            writing = number % 3 == 0
            delay = 0.0 if writing else random_moments.uniform(0, 2 * step_seconds)
            process = start(options.config, overrides, killed)
            if not kill_when(process, killed, lines=lines, writing=writing, delay=delay):
                print(f"kill {number}/{options.kills}: the run had ended (exit code {process.returncode})", flush=True)
                continue
            written = is_writing(killed)
            stages = sorted((killed / "checkpoints").glob("*"))
            saved = ", ".join(f"{stage.name} {steps[-1]}" for stage in stages if (steps := finished_steps(stage)))
            print(
                f"kill {number}/{options.kills}: {count_lines(killed)} of {total} lines"
                f"{', a checkpoint half written' if written else ''}; saved: {saved or 'nothing'}",
                flush=True,
            )
        if start(options.config, overrides, killed).wait() != 0:
            print((folder / "killed.log").read_text(errors="replace"), file=sys.stderr)
            return 2
        found = differences(whole, killed)
        print("\n".join(found) or "equal bit for bit: parameters, optimizer state, metrics, summary", flush=True)
        return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
