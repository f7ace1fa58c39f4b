"""Our side of `benchmarks.peers`, at a tiny size; the peers' environments are not needed."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.peers import __main__ as driver
from benchmarks.peers import ours
from benchmarks.peers.works import WORKS, Sizes, Work

ROOT = Path(__file__).resolve().parents[1]
TINY = Sizes(vocab=64, width=16, layers=1, heads=2, kv_heads=1, ffn=16)
WORK = Work(TINY, prompts=16, group=8, prompt_tokens=4, turn_tokens=20, mean=5, turns=2, observation=3)


def test_lengths_are_geometric_and_the_tool_answers() -> None:
    sample = ours.sampler(WORK)
    rollout = jax.tree.map(np.asarray, sample(32))
    lengths = ours.turn_lengths(rollout)
    assert lengths.shape == (WORK.sequences, WORK.turns) and lengths.min() == 1 and lengths.max() <= WORK.turn_tokens
    # 5 (1 - 0.8**20) = 4.94; four standard errors of 256 draws with a deviation of at most sqrt(20)
    assert abs(lengths.mean() - 4.94) < 4 * (20 / lengths.size) ** 0.5
    assert (rollout.lengths == WORK.prompt_tokens + lengths.sum(1) + WORK.observation).all()
    first = rollout.tokens[:, WORK.prompt_tokens]
    behind = WORK.prompt_tokens + lengths[:, :1] + np.arange(WORK.observation)
    np.testing.assert_array_equal(np.take_along_axis(rollout.tokens, behind, axis=1), WORK.tool()[first])
    np.testing.assert_array_equal(ours.turn_lengths(sample(64)), lengths)  # whatever the number of slots


def test_driver_measures_a_worker(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The real driver and the protocol, with a worker that sleeps in the place of a library."""
    code = (
        "import sys, time, numpy as np; from benchmarks.peers.works import Prepared, serve\n"
        "def prepare(work, lengths):\n"
        "    print('noise')\n"
        "    lengths = np.full((2, 1), 5) if lengths is None else lengths\n"
        "    return Prepared(lambda: time.sleep(float(sys.argv[1])), 'none', lengths)\n"
        "serve(prepare, {'library': sys.argv[1], 'version': '1'})"
    )
    popen = subprocess.Popen
    seconds = {"ours": "0.05", "trl_worker": "0.2"}

    def fake(command: list[str], **options: object) -> subprocess.Popen[str]:
        name = command[-1].removeprefix("benchmarks.peers.")
        return popen([sys.executable, "-c", code, seconds[name]], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(driver.subprocess, "Popen", fake)
    monkeypatch.setattr(driver, "install", lambda peer: sys.executable)
    monkeypatch.setattr(sys, "argv", ["peers", "--only", "multi_turn", "--repeats", "3", "--json"])
    driver.main()
    *records, ratios = map(json.loads, capsys.readouterr().out.splitlines())
    assert [record["tokens"] for record in records] == [10, 10]
    # 4, less what a sleep overshoots on a busy machine
    assert ratios == {"multi_turn_ratio": records[1]["ratio"]} and 1.5 < records[1]["ratio"] < 6


def test_works_and_locks() -> None:
    assert set(driver.PEERS) == set(WORKS)
    for peer in ("trl", "tunix"):
        lines = (driver.HERE / f"requirements-{peer}.lock").read_text().splitlines()
        assert all(line.startswith("#") or line.count("==") == 1 and "/" not in line for line in lines)


def test_workers_of_peers_import_nothing_of_ours() -> None:
    for name in ("works", "trl_worker", "tunix_worker"):
        tree = ast.parse((ROOT / f"benchmarks/peers/{name}.py").read_text(encoding="utf-8"))
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not [module for module in modules if module and module.startswith("jaxrl")]
