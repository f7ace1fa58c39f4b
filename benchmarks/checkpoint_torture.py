"""Kills a run again and again, spoils its checkpoints, fills its disk, and compares what it ends with to a quiet run.

    python -m benchmarks.checkpoint_torture --kills=50 --config=search_r1:tiny --config.steps=40
    python -m benchmarks.checkpoint_torture --kills=50 --config=search_r1:tiny --disk=/mnt/small

As `benchmarks.kill_resume`, with more. `kill -9` comes at random moments, every third time inside a save. Behind every
fifth kill a random byte of the largest file of the newest checkpoint is flipped. Every start must go on from the newest
checkpoint that is whole, as its output tells. Last, the run is started again on a small disk, which is filled once a
checkpoint is there: it must end with exit code 1, name the disk, leave the checkpoint, and go on from it once there is
room. What both runs end with must equal the quiet run bit for bit. The small disk is a tmpfs, which root alone may
mount; others name a folder on a file system of its own with `--disk`, or do without this part.

The exit code is 1 if anything is not so.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.kill_resume import POLL_SECONDS, count_lines, differences, is_writing, kill_when, start
from jaxrl_llm.train import finished_steps, parse_overrides, read_summary

SMALL_DISK = 256 * 2**20  # bytes
LEFT = 2**18  # bytes, enough for the lines of a step, too few for a checkpoint
RESUMED = re.compile(r"^(\w+): (?:going on from|complete at) step (\d+)", re.M)


def newest_whole(workdir: Path, spoilt: Sequence[Path]) -> dict[str, int]:
    """The newest finished step of every stage of which no file is `spoilt`. Names of files are not used again."""
    whole = {}
    for stage in sorted((workdir / "checkpoints").glob("*")):
        bad = {int(path.relative_to(stage).parts[0]) for path in spoilt if path.is_relative_to(stage) and path.exists()}
        if steps := [step for step in finished_steps(stage) if step not in bad]:
            whole[stage.name] = steps[-1]
    return whole


def flip_a_byte(workdir: Path, moments: random.Random) -> Path | None:
    """Spoils the newest checkpoint of a stage that has another one; returns the file."""
    stages = [stage for stage in (workdir / "checkpoints").glob("*") if len(finished_steps(stage)) > 1]
    if not stages:
        return None
    stage = moments.choice(sorted(stages))
    folder = stage / str(finished_steps(stage)[-1])
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
    file.write_bytes(content)
    return file


def wrong_starts(output: str, expected: dict[str, int]) -> list[str]:
    """Stages that did not go on from the step that they should have."""
    resumed = {stage: int(step) for stage, step in RESUMED.findall(output)}
    return [
        f"{stage} went on from step {step}, expected {expected.get(stage)}"
        for stage, step in resumed.items()
        if stage in expected and expected[stage] != step
    ]


def torture(config: str, overrides: dict[str, str], whole: Path, killed: Path, kills: int, seed: int) -> list[str]:
    """The run that is killed and spoilt, until it may end; returns what is wrong with it."""
    moments, total, problems, inside = random.Random(seed), count_lines(whole), [], 0
    step_seconds = (read_summary(whole) or {})["run"]["step_seconds"] / total
    log = killed.with_name(f"{killed.name}.log")
    spoilt: list[Path] = []
    for number, lines in enumerate(sorted(moments.randrange(total) for _ in range(kills)), start=1):
        writing = number % 3 == 0
        seen = log.stat().st_size if log.exists() else 0
        expected, begun = newest_whole(killed, spoilt), time.time()
        process = start(config, overrides, killed)
        ended = not kill_when(
            process,
            killed,
            lines=lines,
            writing=writing,
            delay=moments.uniform(0, 0.02 if writing else 2 * step_seconds),
        )
        problems += wrong_starts(log.read_text(errors="replace")[seen:], expected)
        in_save = not ended and is_writing(killed, begun)
        inside += in_save
        how = "had ended" if ended else "killed in a save" if in_save else "killed"
        if number % 5 == 0 and (file := flip_a_byte(killed, moments)):
            spoilt.append(file)
            how += ", a byte flipped"
        saved = newest_whole(killed, spoilt)
        print(f"{number}/{kills}: {how} at line {count_lines(killed)} of {total}; whole: {saved}", flush=True)
    expected = newest_whole(killed, spoilt)
    seen = log.stat().st_size
    if start(config, overrides, killed).wait() != 0:
        problems.append(f"the run failed, see {log}")
    problems += wrong_starts(log.read_text(errors="replace")[seen:], expected)
    print(f"{kills} kills, {inside} of them inside a save, {len(spoilt)} bytes flipped", flush=True)
    return problems + differences(whole, killed)


def fill_the_disk(config: str, overrides: dict[str, str], whole: Path, folder: Path) -> list[str]:
    """The run on a disk that fills up behind its first checkpoint; returns what is wrong with it."""
    workdir, problems = folder / "full", []
    process = start(config, overrides, workdir)
    while process.poll() is None and not newest_whole(workdir, []):
        time.sleep(POLL_SECONDS)
    with (folder / "ballast").open("wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, shutil.disk_usage(folder).free - LEFT)
    code = process.wait()
    output = (folder / "full.log").read_text(errors="replace")
    if code != 1 or "could not be written" not in output or str(workdir) not in output:
        problems.append(f"on the full disk the run ended with code {code} and said {output[-500:]!r}")
    kept = newest_whole(workdir, [])
    if not kept or is_writing(workdir):
        problems.append("the full disk has no whole checkpoint, or half a one")
    (folder / "ballast").unlink()
    if start(config, overrides, workdir).wait() != 0:
        problems.append("with room again, the run failed")
    output = (folder / "full.log").read_text(errors="replace")
    print(f"full disk: {output[output.find('error:') :].splitlines()[0]}; went on from {kept}", flush=True)
    return problems + wrong_starts(output, kept) + differences(whole, workdir)


@contextlib.contextmanager
def small_disk(disk: str | None) -> Iterator[Path | None]:
    """The folder `disk`, or a tmpfs, or None where there may be none."""
    with tempfile.TemporaryDirectory(dir=disk) as folder:
        mounted = (
            not disk
            and not subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", folder], capture_output=True
            ).returncode
        )
        try:
            yield Path(folder) if disk or mounted else None
        finally:
            if mounted:
                subprocess.run(["umount", folder], check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 all well, 1 something is wrong, 2 the quiet run failed."""
    overrides, rest = parse_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint_torture", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--config", required=True, help="config file or slug, with :arm")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--disk", help="a folder on a small file system of its own")
    parser.add_argument("--workdir", help="keeps the runs here (default: a temporary folder)")
    options = parser.parse_args(rest)
    with tempfile.TemporaryDirectory() as temporary, small_disk(options.disk) as disk:
        folder = Path(options.workdir or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        whole = folder / "whole"
        if start(options.config, overrides, whole).wait() != 0:
            print((folder / "whole.log").read_text(errors="replace"), file=sys.stderr)
            return 2
        problems = torture(options.config, overrides, whole, folder / "killed", options.kills, options.seed)
        if disk:
            problems += fill_the_disk(options.config, overrides, whole, disk)
        else:
            print("full disk: left out, no tmpfs may be mounted here; name a small file system with --disk")
    print("\n".join(problems) or "always from the newest whole checkpoint; equal bit for bit at the end", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
