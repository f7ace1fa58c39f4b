"""Sampling side by side with TRL and Tunix: one machine, one run, the same sizes and numbers of tokens, in float32.

    python -m benchmarks.peers --repeats 3 --json
    python -m benchmarks.peers --only multi_turn
    python -m benchmarks.peers --write             # benchmarks/peers/RESULTS.md

TRL and Tunix are installed into environments of their own (`.peers/`, 3 GB, from `requirements-*.lock`). Each library
runs in a process of its own. For each work ours samples first, which draws the lengths that the peers are given; each
then tries its batch sizes and keeps the fastest; then they take turns, and the medians are compared. `--json` prints a
line for each measurement and, as the last line, how many times the tokens per second of the faster peer ours are.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORKERS = {"ours": "ours", "trl": "trl_worker", "tunix": "tunix_worker"}
PEERS = {"generate": ("trl", "tunix"), "long_tail": ("trl", "tunix"), "multi_turn": ("trl",)}


def install(peer: str) -> Path:
    """The interpreter of a peer's environment, which is made if it is not there or its lock has changed."""
    folder, lock = ROOT / ".peers" / peer, (HERE / f"requirements-{peer}.lock").read_text()
    stamp, python = folder / "installed.lock", folder / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != lock:
        print(f"Installing {peer} into {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "-r", str(HERE / f"requirements-{peer}.lock")], check=True)
        stamp.write_text(lock)
    return python


@contextlib.contextmanager
def worker(name: str) -> Iterator[subprocess.Popen[str]]:
    """A process that answers `ask`, on the CPU and without a network."""
    python = Path(sys.executable) if name == "ours" else install(name)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [python, "-m", f"benchmarks.peers.{WORKERS[name]}"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        answer(process)  # its first line: everything is imported
        yield process
    finally:
        process.terminate()
        process.wait()


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The worker's next line."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"the worker {process.args!r} ended; its message is above")
    return json.loads(line)


def ask(process: subprocess.Popen[str], **request: Any) -> dict[str, Any]:
    """The worker's answer to a request (`works.serve`)."""
    assert process.stdin is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    return answer(process)


def measure(work: str, names: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """A record for each library, ours first."""
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(worker(name)) for name in names}
        prepared: dict[str, dict[str, Any]] = {}
        lengths = None
        for name, process in workers.items():
            prepared[name] = ask(process, prepare=work, lengths=lengths)
            lengths = prepared[name].pop("lengths")
        rounds = [
            {name: ask(process, run=work)["seconds"] for name, process in workers.items()} for _ in range(repeats)
        ]
    tokens = sum(map(sum, lengths or []))
    seconds = {name: statistics.median(times[name] for times in rounds) for name in names}
    return [
        {
            "work": work,
            **prepared[name],
            "tokens": tokens,
            "seconds": round(seconds[name], 3),
            "tokens_per_s": round(tokens / seconds[name], 1),
            "ratio": round(seconds[name] / seconds["ours"], 2),
        }
        for name in names
    ]


def table(records: list[dict[str, Any]]) -> str:
    """All records in Markdown; the last column is ours over that line's tokens per second."""
    columns = {
        "work": "work",
        "library": "library",
        "version": "on",
        "settings": "fastest settings",
        "tokens": "tokens",
        "seconds": "s",
        "tokens_per_s": "tokens/s",
        "ratio": "ours over it",
    }
    rows = [list(columns.values()), ["---"] * len(columns), *([str(row[key]) for key in columns] for row in records)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PEERS), help="works, with commas between them")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each library, taken in turns")
    parser.add_argument("--json", action="store_true", help="print JSON lines, the ratios last")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/peers/RESULTS.md")
    args = parser.parse_args()
    works = args.only.split(",")
    if unknown := set(works) - set(PEERS):
        parser.error(f"--only {args.only}: {sorted(unknown)} is none of {sorted(PEERS)}")
    records, ratios = [], {}
    for work in works:
        ours, *peers = measure(work, ["ours", *PEERS[work]], args.repeats)
        records += [ours, *peers]
        ratios[f"{work}_ratio"] = min(peer["ratio"] for peer in peers)
        if args.json:
            print("\n".join(map(json.dumps, [ours, *peers])), flush=True)
    if args.write:
        machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
        command = f"`python -m benchmarks.peers --only {args.only} --repeats {args.repeats} --write`"
        heading = f"Medians of {args.repeats} runs taken in turns, {datetime.date.today()}, {machine}. {command}"
        (HERE / "RESULTS.md").write_text(f"# Sampling beside TRL and Tunix\n\n{heading}\n\n{table(records)}\n")
    print(json.dumps(ratios) if args.json else table(records))


if __name__ == "__main__":
    main()
