"""Runs one experiment, or goes on with it: the same command again resumes.

    python -m experiments.run --config=configs/agentic_search/search_r1.py --workdir=out/search_r1
    python -m experiments.run --config=search_r1:tiny --config.steps=20

`--config` takes a config file or a slug, with `:arm` behind it (tiny, small, paper; default small). The workdir gets
config.json, metrics.jsonl, summary.json, checkpoints/, figures/ and TensorBoard events; without `--workdir` it is
out/<slug>-<arm>. `--config.key=value` changes the config.

With `--config.distributed.workers=2` the page runs in a process of its own, which is started again if it is killed.

One run by several processes is the same command once a process, with a mesh of all their devices and a workdir that all
of them see:

    python -m experiments.run --config=search_r1 --config.mesh.data=2 --coordinator=HOST:PORT --processes=2 --process=0
    python -m experiments.run --config=search_r1 --config.mesh.data=2 --coordinator=HOST:PORT --processes=2 --process=1

HOST is where process 0 runs. On a TPU pod, and under Slurm, Open MPI or Kubernetes, `--coordinator=auto` is enough.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence

from experiments import ROOT, load_page, split_name
from jaxrl_llm.distributed import FAILED, HeadLost, die_with_supervisor, supervise, workdir_progress
from jaxrl_llm.files import DiskFullError
from jaxrl_llm.train import (
    CheckpointError,
    NonFiniteError,
    WorkdirError,
    enable_compilation_cache,
    is_writer,
    load_config,
    parse_overrides,
    run_page,
    start_processes,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 the run failed, 2 bad arguments. A signal ends with 130 or 143, after saving,
    and what hangs with 75."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file or slug, with :arm")
    parser.add_argument("--workdir", help="folder of the run")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--once", action="store_true", help="in this process, whatever becomes of it")
    parser.add_argument("--coordinator", help="host:port of process 0 of several, or auto")
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--process", type=int, help="which of them this is, from 0")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        overrides, rest = parse_overrides(arguments)
        options = parser.parse_args(rest)
        files, arm = split_name(options.config)
        config = load_config(f"{ROOT / files.config}:{arm}", overrides)
        page = load_page(files)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    workdir = options.workdir or f"out/{files.slug}-{arm}"
    if config.get("distributed", {}).get("workers") and not options.once:
        command = [sys.executable, "-m", "experiments.run", *arguments, "--once"]
        code = supervise(command, lambda: workdir_progress(workdir))
        return 1 if code == FAILED else code
    die_with_supervisor()
    if options.coordinator or options.processes or options.process:
        try:
            start_processes(options.coordinator or "", options.processes, options.process)
        except (ValueError, TimeoutError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    enable_compilation_cache(ROOT / ".jax_cache")
    failed = FAILED if options.once else 1
    try:
        summary = run_page(page, config, workdir, quiet=options.quiet)
    except WorkdirError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except HeadLost as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (CheckpointError, NonFiniteError, DiskFullError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return failed
    except Exception:  # What a page raises is no kill: the supervisor must not start it again.
        traceback.print_exc()
        return failed
    if is_writer():
        print(json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
