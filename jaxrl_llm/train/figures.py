"""The two pictures every run and table wants: learning curves and bars with intervals. Titled, with labelled axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxrl_llm.train.intervals import Interval
from jaxrl_llm.train.logging import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def read_curve(workdirs: Sequence[str | Path], metric: str, stage: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """`steps[T]` and `values[S, T]` of one metric over the runs of several seeds (or of one run of several seeds).

    Only steps that every seed has are taken.

    Raises:
      ValueError: no line of any run has the metric.
    """
    curves: list[dict[int, float]] = []
    for workdir in workdirs:
        by_seed: dict[int | None, dict[int, float]] = {}
        for line in read_metrics(workdir):
            if line["stage"] == stage and line.get(metric) is not None:
                by_seed.setdefault(line.get("seed"), {})[line["step"]] = line[metric]
        curves.extend(by_seed.values())
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    if not steps:
        raise ValueError(
            f"no step of stage {stage!r} has the metric {metric!r} in each of {[str(path) for path in workdirs]}"
        )
    return np.array(steps), np.array([[curve[step] for step in steps] for curve in curves])


def learning_curves(
    runs: Mapping[str, str | Path | Sequence[str | Path]],
    metrics: str | Sequence[str],
    *,
    stage: str = "train",
    title: str | None = None,
    ylabels: Mapping[str, str] | None = None,
    smooth: int = 1,
) -> Figure:
    """A panel for each metric, in it a line for each label: the mean over its runs (seeds), in a band
    from the smallest to the largest.

    Args:
      runs: label -> workdir or workdirs.
      ylabels: names for the axes, where the metric's own will not do.
      smooth: steps of the trailing average (fewer at the start); the axis says so when above 1.

    Raises:
      ValueError: see `read_curve`.
    """
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    figure, axes = _figure(len(metrics))
    for axis, metric in zip(axes, metrics, strict=True):
        for index, (label, workdirs) in enumerate(runs.items()):
            steps, values = read_curve([workdirs] if isinstance(workdirs, (str, Path)) else workdirs, metric, stage)
            values = np.stack([_trailing_mean(row, smooth) for row in values])
            name = label if len(values) == 1 else f"{label} ({len(values)} seeds: mean, min to max)"
            axis.plot(steps, values.mean(axis=0), color=f"C{index}", label=name, linewidth=1.5)
            if len(values) > 1:
                ends = values.min(axis=0), values.max(axis=0)
                axis.fill_between(steps, *ends, color=f"C{index}", alpha=0.2, linewidth=0)
        axis.set_xlabel("step" if smooth == 1 else f"step (mean of the last {smooth})")
        axis.set_ylabel((ylabels or {}).get(metric, metric))
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.suptitle(title or f"{', '.join(metrics)} during {stage}")
    return figure


def bar_chart(
    bars: Mapping[str, Mapping[str, tuple[Interval | None, Sequence[float]]]],
    *,
    title: str,
    ylabels: Mapping[str, str] | None = None,
) -> Figure:
    """A panel for each metric, a bar for each arm, with its interval and a dot for each seed.

    Args:
      bars: metric -> arm -> (interval or None, values of the seeds).
    """
    figure, axes = _figure(len(bars))
    for axis, (metric, arms) in zip(axes, bars.items(), strict=True):
        for position, (interval, values) in enumerate(arms.values()):
            if interval is not None:
                axis.bar(position, interval.mean, width=0.6, color=f"C{position % 10}", alpha=0.6)
                if interval.low is not None and interval.high is not None:
                    ends = [[interval.mean - interval.low], [interval.high - interval.mean]]
                    axis.errorbar(position, interval.mean, yerr=ends, color="black", capsize=4, linewidth=1.2)
            axis.plot([position] * len(values), values, "o", color="black", markersize=3, alpha=0.6)
        axis.set_xticks(range(len(arms)), list(arms), rotation=30, ha="right")
        axis.set_ylabel((ylabels or {}).get(metric, metric))
        axis.grid(axis="y", alpha=0.3)
    figure.suptitle(title)
    return figure


def _figure(panels: int) -> tuple[Figure, list]:
    # Not pyplot: it keeps every figure alive and asks for a display.
    from matplotlib.figure import Figure

    columns = 2 if panels == 4 else min(panels, 3)
    rows = -(-panels // columns)
    figure = Figure(figsize=(1.6 + 4.4 * columns, 4.0 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.remove()
    return figure, axes[:panels]


def _trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
