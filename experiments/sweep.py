"""Runs the arms and seeds of a page's table and writes results/<slug>/<table>.{json,md,png}.

    python -m experiments.sweep search_r1 --table=main --seeds=3
    python -m experiments.sweep search_r1:tiny --table=main --arms=grpo,ppo --config.steps=20

Runs lie in out/sweeps/<slug>/<table>/<arm>/<seed>; a finished one is not run again, so the same command goes on after
an interruption. The config is the arm `small`; another one, and overrides, become part of the table's name
(`main-tiny-steps=20`), so that a trial never replaces the page's own table.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import ROOT, load_page, split_name
from jaxrl_llm.train import (
    CheckpointError,
    NonFiniteError,
    WorkdirError,
    enable_compilation_cache,
    load_config,
    parse_overrides,
    run_table,
    write_table,
)
from jaxrl_llm.train.config import DEFAULT_ARM
from jaxrl_llm.train.tables import markdown


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a run failed, 2 bad arguments. A signal ends with 130 or 143, after saving."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("slug", help="page, with :arm if it is not small")
    parser.add_argument("--table", default="main")
    parser.add_argument("--seeds", type=int, help="how many, from 0 (default: the table's)")
    parser.add_argument("--arms", help="some of the table's arms, with commas")
    parser.add_argument(
        "--vmap-seeds",
        action=argparse.BooleanOptionalAction,
        help="all seeds of an arm at once (default: on accelerators, not on a CPU)",
    )
    parser.add_argument("--out", default="out/sweeps", help="folder of the runs")
    parser.add_argument("--results", default=str(ROOT / "results"), help="folder of the tables")
    parser.add_argument("--quiet", action="store_true", help="no progress of single runs")
    try:
        overrides, rest = parse_overrides(arguments)
        options = parser.parse_args(rest)
        files, config_arm = split_name(options.slug)
        page = load_page(files)
        tables = getattr(page, "TABLES", {})
        if options.table not in tables:
            raise ValueError(f"{files.slug} has no table {options.table!r}; it has {', '.join(tables) or 'none'}")
        table = tables[options.table]

        def make_config(changes: Mapping[str, Any]) -> Any:
            return load_config(f"{ROOT / files.config}:{config_arm}", changes)

        for changes in table.arms.values():  # a mistyped key shows now, not after hours of other arms
            make_config({**changes, **overrides})
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    enable_compilation_cache(ROOT / ".jax_cache")
    parts = [options.table, *([] if config_arm == DEFAULT_ARM else [config_arm])]
    name = "-".join(re.sub(r"[^\w.,=+-]", "_", part) for part in [*parts, *(f"{k}={v}" for k, v in overrides.items())])
    vmap_seeds = jax.default_backend() != "cpu" if options.vmap_seeds is None else options.vmap_seeds
    try:
        result = run_table(
            page,
            make_config,
            table,
            Path(options.out) / files.slug / name,
            seeds=options.seeds,
            arms=options.arms.split(",") if options.arms else None,
            vmap_seeds=vmap_seeds,
            overrides=overrides,
            quiet=options.quiet,
        )
    except (WorkdirError, CheckpointError, NonFiniteError) as error:
        print(f"error: {error}\nThe runs that finished are kept; the same command goes on.", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = f"python -m experiments.sweep {shlex.join(arguments)}"
    paths = write_table(result, Path(options.results) / files.slug, name, command=command)
    print(f"\n{markdown(result, name, command)}\n{', '.join(str(path) for path in paths)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
