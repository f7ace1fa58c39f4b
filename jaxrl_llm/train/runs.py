"""Running a page: its record opened, its `run` called, its result marked complete."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any, Protocol

import jax

from jaxrl_llm.train.logging import RunLog, read_metrics, read_summary
from jaxrl_llm.train.processes import wait_for_all
from jaxrl_llm.train.sharding import use_mesh


class Page(Protocol):
    """A module that holds one experiment. It may also have `TABLES: dict[str, Table]`."""

    __doc__: str | None

    def run(self, config: Any, log: RunLog) -> None: ...


def run_page(page: Page, config: Any, workdir: str | Path, *, quiet: bool = False) -> dict[str, Any]:
    """Runs a page in a workdir, or goes on with the run that is there, and returns its summary.

    It runs on the mesh that `config.mesh` describes, if there is one (`sharding.use_mesh`).

    The summary gains a part `run`: `complete`, `seconds` (of the last process), `steps` and `step_seconds` (of all
    iterations), `date`, `device` and `versions`. A complete run is not run again: its summary is returned.

    Raises:
      RuntimeError: the page wrote no summary.
      WorkdirError: see `RunLog`.
    """
    with RunLog(workdir, config, quiet=quiet) as log:
        summary = read_summary(workdir)
        if is_complete(summary):
            log.info(f"the run in {workdir} is complete; its summary:")
            return summary or {}
        with use_mesh(config):
            page.run(config, log)
        wait_for_all()  # process 0 has written what the others may now read
        if read_summary(workdir) is None:
            done = f"{log.steps_done} steps were done" if log.steps_done else "no step was left to do"
            raise RuntimeError(
                f"{done}, and run() of the page wrote no summary: it must call log.summary({{...}}) at its end"
            )
        lines = {(line["stage"], line["step"]): line.get("seconds", 0.0) for line in read_metrics(workdir)}
        log.summary(
            {
                "run": {
                    "complete": True,
                    "seconds": round(time.perf_counter() - log.opened, 2),
                    "steps": sum(seconds > 0 for seconds in lines.values()),
                    "step_seconds": round(sum(lines.values()), 2),
                    "date": time.strftime("%Y-%m-%d"),
                    "device": describe_device(),
                    "versions": versions(),
                }
            }
        )
        wait_for_all()
        return read_summary(workdir) or {}


def is_complete(summary: dict[str, Any] | None) -> bool:
    """Whether a summary is that of a run that reached its end."""
    return bool(summary and summary.get("run", {}).get("complete"))


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def describe_device() -> str:
    """The accelerator, or for a CPU its number of cores: `8 x NVIDIA H200`, `cpu, 2 cores`."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return f"cpu, {os.cpu_count()} cores"
    return f"{len(devices)} x {devices[0].device_kind}"


def enable_compilation_cache(folder: str | Path) -> None:
    """Keeps compiled programs in `folder` between processes, unless `JAX_COMPILATION_CACHE_DIR` names another."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
