"""Kills processes of a decoupled run at random, and checks from its ledger that no rollout was lost or counted twice.

    python -m benchmarks.kill_workers --kills=20 --config=search_r1:tiny --config.steps=60

The run is `python -m experiments.run` with two workers. Again and again, at a random moment after it has got on, one of
its processes gets `kill -9`: a rollout worker, the trainer, or the head of Ray (`gcs_server` or `raylet`). Nothing is
started by hand. Once the run has ended by itself,

- every step must have been given rollouts exactly once, every rollout to at most one step,
- whatever the ledger had acknowledged at any of the kills must have been trained on, or be named as dropped (too old),
- metrics.jsonl must have every step once, and the exit code must be 0.

The exit code is 1 if one of these does not hold.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.kill_resume import start
from jaxrl_llm.distributed import audit, read_ledger
from jaxrl_llm.train import parse_overrides, read_metrics

KINDS: dict[str, Callable[[str], bool]] = {
    "worker": lambda command: command.startswith("ray::RolloutWorker"),
    "trainer": lambda command: "experiments.run" in command and "--once" in command,
    "head": lambda command: "/gcs_server " in command or "/raylet/raylet " in command,
}


def processes_of(supervisor: int, kind: str) -> list[psutil.Process]:
    """The processes of a run that are of a kind, by the process id of its command."""
    found = []
    for process in psutil.Process(supervisor).children(recursive=True):
        try:
            if KINDS[kind](" ".join(process.cmdline())):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue  # it has just ended
    return found


def kill_one(supervisor: int, kind: str, rng: random.Random) -> bool:
    """Sends SIGKILL to a process of that kind; False if there is none."""
    try:
        victim = rng.choice(processes_of(supervisor, kind))
        victim.kill()
    except (IndexError, psutil.NoSuchProcess):
        return False
    return True


def committed(folder: Path) -> set[str]:
    """Ids that the ledger has acknowledged so far."""
    return {line["id"] for line in read_ledger(folder) if line["event"] == "committed"}


def problems(workdir: Path, acknowledged: set[str]) -> tuple[dict[str, int], list[str]]:
    """Counts of the ledger, and everything in which a run that has ended differs from what it should have done."""
    folder = workdir / "rollouts"
    counts, wrong = audit(folder, "train")
    lines = read_ledger(folder)
    fetched = {id for line in lines if line["event"] == "fetched" for id in line["ids"]}
    if lost := sorted(acknowledged - fetched, key=int):
        wrong.append(f"acknowledged, but never trained on: {', '.join(lost)}")
    steps = [line["step"] for line in read_metrics(workdir) if line["stage"] == "train" and "loss" in line]
    if steps != [*range(1, len(steps) + 1)] or len(steps) != sum(line["event"] == "fetched" for line in lines):
        wrong.append(f"metrics.jsonl has {len(steps)} steps, not each of them once")
    return counts, wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 nothing lost, 1 something is wrong, 2 the run failed."""
    overrides, rest = parse_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kill_workers", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--config", required=True, help="config file or slug, with :arm")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments")
    parser.add_argument("--workdir", help="keeps the run here (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="the figures as one JSON object")
    options = parser.parse_args(rest)
    rng = random.Random(options.seed)
    kinds = [list(KINDS)[number % len(KINDS)] for number in range(options.kills)]
    rng.shuffle(kinds)
    with tempfile.TemporaryDirectory() as temporary:
        workdir = Path(options.workdir or temporary).absolute() / "run"
        workdir.parent.mkdir(parents=True, exist_ok=True)
        folder = workdir / "rollouts"
        began = time.monotonic()
        run = start(options.config, {"distributed.workers": "2"} | overrides, workdir)
        killed: collections.Counter[str] = collections.Counter()
        acknowledged: set[str] = set()
        for number, kind in enumerate(kinds, start=1):
            target = len(read_ledger(folder)) + rng.randint(1, 4)
            while run.poll() is None and len(read_ledger(folder)) < target:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.5))
            while run.poll() is None and not kill_one(run.pid, kind, rng):
                time.sleep(0.02)
            if run.poll() is not None:
                print(
                    f"the run ended (exit code {run.returncode}) before kill {number}: raise config.steps", flush=True
                )
                break
            acknowledged |= committed(folder)
            killed[kind] += 1
            if not options.json:
                print(f"kill {number}/{options.kills}: {kind}; {len(acknowledged)} rollouts acknowledged", flush=True)
        code = run.wait()
        if code != 0:
            print(workdir.with_name("run.log").read_text(errors="replace")[-5000:], file=sys.stderr)
            return 2
        counts, wrong = problems(workdir, acknowledged)
        last = read_metrics(workdir)[-1]
        figures: dict[str, Any] = {
            "kills": dict(killed),
            **counts,
            "steps": last["step"],
            "worker_restarts": last["worker_restarts"],
            "minutes": round((time.monotonic() - began) / 60, 1),
            "wrong": wrong,
        }
        print(json.dumps(figures) if options.json else "\n".join(f"{name}: {value}" for name, value in figures.items()))
        return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
