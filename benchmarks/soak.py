"""A long run with all that goes wrong in a week, beside the same run with nothing going wrong.

    python -m benchmarks.soak --steps 2000 --kills 10 --out benchmarks/soak.json

The agent of `benchmarks.soak_page` trains twice, side by side. One of the runs is quiet and in one process. In the
other one calls of the search engine hang until their time is over or raise, every 200th update is NaN, and processes
get `kill -9` at random moments: the trainer, and with `--workers`, two times in three, one that samples. It must do
every step once, skip just those updates, end in as much memory as it had soon after the last kill, and answer held-out
questions no worse than the quiet run but for chance. The exit code is 1 if it does not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.kill_resume import count_lines, start
from jaxrl_llm.train import read_metrics, read_summary

PAGE = "benchmarks/soak_page.py"
POLL_SECONDS = 0.5
WARM_STEPS = 100  # after a start, until memory counts
FLAT = 0.05  # by how much it may have grown from there
NAN_EVERY = 200
FAULTS = {"faults.time_outs": "0.001", "faults.exceptions": "0.02", "faults.nan_every": str(NAN_EVERY)}


def descendants(root: int) -> dict[int, str]:
    """Process ids of a process and all below it, with their command lines."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return {process: names.get(process, "") for process in found}


def memory(process: int) -> int:
    """Bytes of memory that a process holds; 0 once it is gone."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class Watched:
    """A run in a process of its own: its memory over its steps, and kills at random moments."""

    def __init__(self, workdir: Path, overrides: dict[str, str], kills: list[int]) -> None:
        self.workdir, self.overrides, self.kills = workdir, overrides, kills
        self.workers = int(overrides["distributed.workers"])
        self.killed: list[int] = []  # the steps at which it was hit
        self.memory: list[tuple[int, int]] = []  # step, bytes, since the last kill
        self.process: subprocess.Popen[bytes] = start(PAGE, overrides, workdir)

    def poll(self) -> bool:
        """Whether it still runs; one that was killed is started again."""
        step = count_lines(self.workdir)
        code = self.process.poll()
        if code == -signal.SIGKILL:
            self.process = start(PAGE, self.overrides, self.workdir)
        elif code is not None:
            return False
        else:
            family = descendants(self.process.pid)
            samplers = [process for process, name in family.items() if name.startswith("ray::RolloutWorker")]
            trainers = [process for process, name in family.items() if "experiments.run" in name]
            if self.kills and step >= self.kills[0] and (samplers or not self.workers):
                hit_trainer = not self.workers or len(self.killed) % 3 == 2
                # the last in line: with workers, the first is a supervisor
                os.kill(trainers[-1] if hit_trainer else random.choice(samplers), signal.SIGKILL)
                self.kills.pop(0)
                self.killed.append(step)
                self.memory = []
            else:
                self.memory.append((step, sum(memory(process) for process in [*trainers, *samplers])))
        return True


def judge(quiet: Watched, troubled: Watched, steps: int) -> dict[str, Any]:
    """What is to be shown, as numbers and as one verdict for each."""
    lines = [line for line in read_metrics(troubled.workdir) if line["step"]]
    since = troubled.killed[-1] if troubled.killed else 0
    kept = [size for step, size in troubled.memory if step >= since + WARM_STEPS]
    tenth = max(len(kept) // 10, 1)
    early, late = (sorted(part)[len(part) // 2] for part in (kept[:tenth], kept[-tenth:]))
    summaries = [read_summary(run.workdir) or {} for run in (quiet, troubled)]
    questions = 2 * json.loads((quiet.workdir / "config.json").read_text())["test_questions"]
    success = [summary["success"] for summary in summaries]
    noise = math.sqrt(sum(rate * (1 - rate) for rate in success) / questions)
    expected = sum(step % NAN_EVERY == NAN_EVERY // 2 for step in range(steps))
    return {
        "steps": steps,
        "workers": troubled.workers,
        "kills_at_step": troubled.killed,
        "worker_restarts": lines[-1].get("worker_restarts"),
        "call_attempts": sum(line["call_attempts"] for line in lines),
        "calls_failed_for_good": sum(line["calls_failed"] for line in lines),
        "updates_skipped": lines[-1]["skipped"],
        "memory_mb": [round(size / 2**20, 1) for size in (early, late)],
        "success": {"start": lines_start(quiet), "quiet": success[0], "with_faults": success[1]},
        "standard_error_of_difference": round(noise, 4),
        "minutes": [round(summary["run"]["step_seconds"] / 60, 1) for summary in summaries],
        "no_step_lost": [line["step"] for line in lines] == list(range(1, steps + 1)),
        "only_bad_updates_skipped": lines[-1]["skipped"] == expected,
        "memory_flat": late <= early * (1 + FLAT),
        "success_no_worse": success[1] >= success[0] - 2 * noise,
    }


def lines_start(run: Watched) -> float:
    """Success before the first step."""
    return read_metrics(run.workdir)[0]["eval/success"]


def main() -> int:
    """Returns the exit code: 0 all shown, 1 not, 2 a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, default=0, help="processes that sample (Ray)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workdir", help="keeps both runs here (default: a temporary folder)")
    parser.add_argument("--out", help="writes the result to this file, too")
    args = parser.parse_args()
    if args.steps < 4 * WARM_STEPS:
        parser.error(f"--steps must be at least {4 * WARM_STEPS}, got {args.steps}: memory counts after {WARM_STEPS}")
    moments = random.Random(args.seed)
    # in the first half, so that the memory of the second is that of one life
    kills = sorted(moments.randrange(1, args.steps // 2) for _ in range(args.kills))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.workdir or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        common = {"steps": str(args.steps)}
        quiet = Watched(folder / "quiet", common | {"distributed.workers": "0"}, [])
        troubled = Watched(folder / "troubled", common | FAULTS | {"distributed.workers": str(args.workers)}, kills)
        while any([quiet.poll(), troubled.poll()]):
            time.sleep(POLL_SECONDS)
        for run in (quiet, troubled):
            if run.process.returncode != 0:
                print(run.workdir.with_name(f"{run.workdir.name}.log").read_text()[-3000:], file=sys.stderr)
                return 2
        result = judge(quiet, troubled, args.steps)
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    return 0 if all(value for value in result.values() if isinstance(value, bool)) else 1


if __name__ == "__main__":
    sys.exit(main())
