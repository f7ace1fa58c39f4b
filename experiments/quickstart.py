"""The small search agent from start to finish: trains it, prints what it learned, and says where to look.

python -m experiments.quickstart [--from-scratch] [--workdir=out/quickstart]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments import ROOT, run
from jaxrl_llm import train

CONFIG = "configs/agentic_search/search_r1.py"
STYLES = {"prompt": "bold", "policy": "green", "observation": "dim cyan"}


def success_table(summary: dict[str, Any]) -> Table:
    table = Table(title="Success on held-out questions (countries that no training question touches)")
    table.add_column("policy")
    hops = summary["trained"]["success"]
    for count in hops:
        table.add_column(f"{count} hop" + "s" * (count != "1"), justify="right")
    for label, name in (
        ("warm start", "warm_start"),
        ("trained", "trained"),
        ("trained, search switched off", "no_search"),
    ):
        table.add_row(label, *(f"{summary[name]['success'][count]:.2f}" for count in hops))
    return table


def choose_rollouts(path: Path) -> list[dict[str, Any]]:
    """Two hops answered, one hop answered, and one that failed (or another success, if none did)."""
    rollouts = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    wanted = [
        lambda r: r["reward"] and r["hops"] == 2,
        lambda r: r["reward"] and r["hops"] == 1,
        lambda r: not r["reward"],
    ]
    chosen: list[dict[str, Any]] = []
    for test in wanted:
        rest = [r for r in rollouts if r not in chosen]
        chosen.append(next(filter(test, rest), rest[0]))
    return chosen


def rollout_text(rollout: dict[str, Any]) -> Text:
    """The question, then a line a turn: what the policy wrote, and what came back."""
    text = Text(f"{'right' if rollout['reward'] else 'wrong'}, {rollout['hops']} hop(s)\n", style="bold magenta")
    for span in rollout["spans"]:
        label = {"prompt": "question", "policy": "  policy", "observation": "  search"}[span["role"]]
        text.append(f"{label:>10}  ", style="dim")
        text.append(span["text"].strip() + "\n", style=STYLES[span["role"]])
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.quickstart", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--workdir", default="out/quickstart", help="a run that is there goes on")
    parser.add_argument("--from-scratch", action="store_true", help="train the warm start too (about 10 minutes more)")
    options = parser.parse_args(arguments)
    command = [f"--config={CONFIG}", f"--workdir={options.workdir}"]
    if options.from_scratch:
        command.append("--config.warm_start.from_scratch=True")
    if code := run.main(command):
        return code
    workdir, console = ROOT / options.workdir, Console()
    summary = train.read_summary(workdir)
    assert summary is not None  # run.main succeeded
    console.print(success_table(summary))
    console.print("Three held-out episodes. Green is what the policy wrote, blue what the search returned.\n")
    for rollout in choose_rollouts(workdir / "rollouts.jsonl"):
        console.print(rollout_text(rollout))
    console.print(
        f"{summary['minutes']} minutes. Learning curve: {options.workdir}/figures/learning_curve.png, "
        f"every step: {options.workdir}/metrics.jsonl, all episodes: {options.workdir}/rollouts.jsonl",
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
