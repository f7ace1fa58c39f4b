"""Tables of a page: arms times seeds, each metric's mean with an interval, and claims that come out as they come out.

`results/<slug>/<table>.json` holds everything, `.md` the table to read, `.png` the bars.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.files import write_atomically
from jaxrl_llm.train import figures
from jaxrl_llm.train.config import config_difference
from jaxrl_llm.train.intervals import Interval, bootstrap_mean, describe, judge
from jaxrl_llm.train.logging import read_outcomes, read_summary
from jaxrl_llm.train.runs import Page, is_complete, run_page


@dataclasses.dataclass(frozen=True)
class Claim:
    """`arm` has a mean above that of `other` by more than `by` (below, where `lower`), on `metric` (None: the table's
    first)."""

    arm: str
    other: str
    by: float = 0.0
    metric: str | None = None
    lower: bool = False

    @property
    def text(self) -> str:
        """`grpo > warm_start + 0.05 (success.2)`: the claim's name in files."""
        sign, shift = ("<", "-") if self.lower else (">", "+")
        margin = f" {shift} {self.by:g}" if self.by else ""
        return f"{self.arm} {sign} {self.other}{margin}" + (f" ({self.metric})" if self.metric else "")


def better(arm: str, other: str, by: float = 0.0, *, metric: str | None = None, lower: bool = False) -> Claim:
    """The claim that `arm` beats `other` by more than `by`; see `Claim`."""
    return Claim(arm, other, by, metric, lower)


@dataclasses.dataclass(frozen=True)
class Table:
    """Arms to compare, each a name with its config overrides (dotted keys).

    `metric` or `metrics` are paths into `summary.json`: `trained.success.2` (a slash separates as well). If a run kept
    outcomes under a metric's path (`RunLog.outcomes`), intervals also account for the choice of the questions.

    Raises:
      ValueError: no arm, no metric, fewer than one seed, or a claim about an arm or metric that is not in the table.
    """

    arms: Mapping[str, Mapping[str, Any]]
    metric: str | None = None
    metrics: Sequence[str] = ()
    seeds: int = 3
    claims: Sequence[Claim] = ()
    title: str | None = None

    def __post_init__(self) -> None:
        if not self.arms or not self.columns or self.seeds < 1:
            raise ValueError(f"a table needs arms, a metric and at least one seed, got {self}")
        for claim in self.claims:
            for arm in (claim.arm, claim.other):
                if arm not in self.arms:
                    raise ValueError(
                        f"claim {claim.text!r} is about {arm!r}; the table has the arms {', '.join(self.arms)}"
                    )
            if claim.metric is not None and claim.metric not in self.columns:
                raise ValueError(
                    f"claim {claim.text!r} needs the metric {claim.metric!r}; the table has {', '.join(self.columns)}"
                )

    @property
    def columns(self) -> tuple[str, ...]:
        """All metrics, `metric` first."""
        return tuple(dict.fromkeys(([self.metric] if self.metric else []) + list(self.metrics)))


def find_metric(summary: Mapping[str, Any], path: str) -> Any:
    """The value at a path of a summary. A key may itself hold dots or slashes: `success/2` finds `success/2` and
    `success -> 2`.

    Raises:
      ValueError: there is none; the keys that are there are named.
    """

    def search(node: Any, path: str) -> list[Any]:
        if not isinstance(node, Mapping):
            return []
        if path in node:
            return [node[path]]
        cuts = [index for index, letter in enumerate(path) if letter in "./"]
        return [hit for cut in cuts for hit in search(node.get(path[:cut]), path[cut + 1 :])]

    hits = search(summary, path)
    if not hits or isinstance(hits[0], Mapping):
        inside = hits[0] if hits else summary
        raise ValueError(f"summary has no metric {path!r}; there is {', '.join(map(str, inside))}")
    return hits[0]


def run_table(
    page: Page,
    make_config: Callable[[Mapping[str, Any]], Any],
    table: Table,
    folder: str | Path,
    *,
    seeds: int | None = None,
    arms: Sequence[str] | None = None,
    vmap_seeds: bool = False,
    overrides: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = print,
    quiet: bool = False,
) -> dict[str, Any]:
    """Runs arms times seeds in `folder/<arm>/<seed>` and returns the table as JSON-ready data (see `summarize`).

    A finished run is not run again, so an interrupted sweep goes on where it was.

    Args:
      make_config: from overrides to a config.
      seeds: how many, from 0; None: the table's.
      arms: some of the table's; the others enter the result if their runs are there, complete and of the same config.
      vmap_seeds: all seeds of an arm at once, in `folder/<arm>/seeds_<first>_<last>`.

    Raises:
      ValueError: an unknown arm; see also `run_page`.
    """
    overrides = dict(overrides or {})
    seeds = table.seeds if seeds is None else seeds
    if seeds < 1:
        raise ValueError(f"a table needs at least one seed, got {seeds}")
    chosen = list(table.arms) if arms is None else list(arms)
    for arm in chosen:
        if arm not in table.arms:
            raise ValueError(f"the table has no arm {arm!r}; it has {', '.join(table.arms)}")
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in table.arms:
        groups: list[Any] = [tuple(range(seeds))] if vmap_seeds and seeds > 1 else list(range(seeds))
        results = []
        for seed in groups:
            config = make_config({**table.arms[arm], **overrides, "seed": seed})
            name = f"seeds_{seed[0]}_{seed[-1]}" if isinstance(seed, tuple) else str(seed)
            workdir = Path(folder) / arm / name
            if arm in chosen:
                report(f"{arm}, seed {seed}: {workdir}")
                summary = run_page(page, config, workdir, quiet=quiet)
            elif not _is_run_of(workdir, config):
                break
            else:
                summary = read_summary(workdir) or {}
            results.extend(_by_seed(summary, workdir, table.columns, seed))
        else:
            found[arm] = results
    return summarize(table, found, overrides)


def _is_run_of(workdir: Path, config: Any) -> bool:
    path = workdir / "config.json"
    return (
        is_complete(read_summary(workdir))
        and path.exists()
        and not config_difference(json.loads(path.read_text()), config)
    )


def _by_seed(
    summary: Mapping[str, Any], workdir: Path, columns: Sequence[str], seed: int | tuple[int, ...]
) -> list[dict[str, Any]]:
    seeds = seed if isinstance(seed, tuple) else (seed,)
    results: list[dict[str, Any]] = [
        {"values": {}, "outcomes": {}, "seconds": summary["run"]["seconds"] / len(seeds), "run": summary["run"]}
        for _ in seeds
    ]
    for metric in columns:
        values = find_metric(summary, metric)
        values = values if isinstance(seed, tuple) else [values]
        if not isinstance(values, list) or len(values) != len(seeds):
            raise ValueError(
                f"{workdir}: metric {metric!r} must be one number for each of the seeds {seeds}, got {values}"
            )
        outcomes = read_outcomes(workdir, metric)
        for index, result in enumerate(results):
            result["values"][metric] = values[index]
            if outcomes is not None:
                result["outcomes"][metric] = outcomes[index] if isinstance(seed, tuple) else outcomes
    return results


def summarize(
    table: Table, found: Mapping[str, list[dict[str, Any]]], overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Means, intervals and claims from the results of each arm's seeds.

    Args:
      found: arm -> for each seed `{"values": {metric: number or None}, "outcomes": {metric: array [N]}, "seconds",
        "run"}`. Seeds stand in the same order in all arms: differences are paired by seed, and by question where
        outcomes are known.

    Returns:
      `{"date", "device", "versions", "seeds", "overrides", "metrics", "arms": {arm: {"overrides", "seconds", "metrics":
      {metric: {"values", "mean", "low", "high"}}}}, "claims": {text: {"outcome", "metric", "by", "differences", "mean",
      "low", "high"}}, "intervals": what they mean}`.
    """
    num_seeds = max((len(results) for results in found.values()), default=0)
    arms = {
        arm: {
            "overrides": dict(table.arms[arm]),
            "seconds": round(sum(result["seconds"] for result in results), 1),
            "metrics": {
                metric: {"values": [result["values"][metric] for result in results]}
                | _interval(_matrix(results, metric))
                for metric in table.columns
            },
        }
        for arm, results in found.items()
    }
    claims = {claim.text: _check_claim(claim, table, found) for claim in table.claims}
    everything = [result for results in found.values() for result in results]
    questions = {len(array) for result in everything for array in result["outcomes"].values()}
    runs = [result["run"] for result in everything]
    return {
        "title": table.title,
        "date": time.strftime("%Y-%m-%d"),
        "device": sorted({run["device"] for run in runs}),
        "versions": runs[0]["versions"] if runs else {},
        "seeds": num_seeds,
        "overrides": dict(overrides or {}),
        "metrics": list(table.columns),
        "arms": arms,
        "claims": claims,
        "intervals": describe(num_seeds, max(questions) if questions else None) if num_seeds else "No run.",
    }


def _matrix(results: Sequence[Mapping[str, Any]], metric: str) -> np.ndarray | None:
    """`[S, N]` outcomes where every seed has as many, else `[S]` values; None where a value is not a number."""
    outcomes = [result["outcomes"].get(metric) for result in results]
    if all(array is not None for array in outcomes) and len({len(array) for array in outcomes}) == 1:
        return np.array(outcomes)
    values = [result["values"][metric] for result in results]
    return None if any(value is None for value in values) else np.array(values, np.float64)


def _interval(matrix: np.ndarray | None) -> dict[str, float | None]:
    return {"mean": None, "low": None, "high": None} if matrix is None else bootstrap_mean(matrix)._asdict()


def _check_claim(claim: Claim, table: Table, found: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    metric = claim.metric or table.columns[0]
    result: dict[str, Any] = {"outcome": "not run", "metric": metric, "by": claim.by}
    if claim.arm not in found or claim.other not in found:
        return result
    left, right = _matrix(found[claim.arm], metric), _matrix(found[claim.other], metric)
    if left is None or right is None:
        return result | {"outcome": "undecided"}
    if left.shape != right.shape:  # Other questions, or none, in one arm: pairs of seeds are all there is.
        left, right = (array.reshape(len(array), -1).mean(axis=1) for array in (left, right))
    difference = right - left if claim.lower else left - right
    interval = bootstrap_mean(difference)
    per_seed = difference.reshape(len(difference), -1).mean(axis=1)
    return result | {"outcome": judge(interval, claim.by), "differences": per_seed.tolist()} | interval._asdict()


def write_table(result: Mapping[str, Any], folder: str | Path, name: str, *, command: str) -> list[Path]:
    """Writes `<name>.json`, `<name>.md` and `<name>.png` into `folder` and returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{ending}" for ending in ("json", "md", "png")]
    write_atomically(paths[0], json.dumps({"command": command, **result}, indent=2, allow_nan=False) + "\n")
    write_atomically(paths[1], markdown(result, name, command))
    bars = {
        metric: {arm: _bar(data["metrics"][metric]) for arm, data in result["arms"].items()}
        for metric in result["metrics"]
    }
    chart = figures.bar_chart(bars, title=result["title"] or f"{folder.name}: {name}")
    chart.savefig(paths[2], dpi=150)
    return paths


def _bar(numbers: Mapping[str, Any]) -> tuple[Interval | None, list[float]]:
    values = [value for value in numbers["values"] if value is not None]
    return (None if numbers["mean"] is None else Interval(numbers["mean"], numbers["low"], numbers["high"])), values


def markdown(result: Mapping[str, Any], name: str, command: str) -> str:
    """The table to read: arms by metrics, then the claims, then how it was made."""
    from tabulate import tabulate

    arm_rows = [
        [arm, *(_cell(data["metrics"][metric]) for metric in result["metrics"]), f"{data['seconds']:.0f}"]
        for arm, data in result["arms"].items()
    ]
    claim_rows = [
        [text, claim["metric"], _cell(claim) if "mean" in claim else "", claim["outcome"]]
        for text, claim in result["claims"].items()
    ]
    changed = ", ".join(f"{key}={value}" for key, value in result["overrides"].items())
    versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
    parts = [
        f"# {result['title'] or name}",
        tabulate(arm_rows, headers=["arm", *result["metrics"], "seconds"], tablefmt="github", disable_numparse=True),
        tabulate(
            claim_rows, headers=["claim", "metric", "difference", "outcome"], tablefmt="github", disable_numparse=True
        )
        if claim_rows
        else "",
        result["intervals"],
        f"Made by `{command}`" + (f" with {changed}" if changed else "") + f" on {result['date']}; "
        f"{', '.join(result['device'])}; {versions}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _cell(numbers: Mapping[str, Any]) -> str:
    if numbers["mean"] is None:
        return "not finite"
    text = f"{numbers['mean']:.3f}"
    return text if numbers["low"] is None else f"{text} [{numbers['low']:.3f}, {numbers['high']:.3f}]"
