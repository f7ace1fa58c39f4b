"""Real processes that are killed or asked to stop, and started again."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.kill_resume import count_lines, differences, final_arrays, kill_when, start
from jaxrl_llm.train import finished_steps, read_metrics

ROOT = Path(__file__).parents[2]
CONFIG = "tests/train/bandit_page.py"
OVERRIDES = {"steps": "12", "sleep": "0.03", "checkpoint_every": "2", "own_rows": "True"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert start(CONFIG, OVERRIDES, workdir).wait() == 0
    return workdir


def test_kill_9_in_a_step_and_in_a_checkpoint_write(whole, tmp_path):
    workdir = tmp_path / "run"
    assert kill_when(start(CONFIG, OVERRIDES, workdir), workdir, lines=4)
    assert kill_when(start(CONFIG, OVERRIDES, workdir), workdir, lines=8, writing=True)
    assert kill_when(start(CONFIG, OVERRIDES, workdir), workdir, lines=13, delay=0.04)
    assert count_lines(workdir) < count_lines(whole)
    assert start(CONFIG, OVERRIDES, workdir).wait() == 0
    assert differences(whole, workdir) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_and_saves(whole, tmp_path, number, code):
    workdir = tmp_path / "run"
    process = start(CONFIG, OVERRIDES, workdir)
    while count_lines(workdir) < 8 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait() == code
    last = read_metrics(workdir)[-1]["step"]
    assert finished_steps(workdir / "checkpoints" / "train")[-1] == last < 12
    output = (tmp_path / "run.log").read_text()
    assert f"stopped after step {last} of 12, saved; the same command goes on from there" in output
    assert "Traceback" not in output
    if number == signal.SIGTERM:
        assert start(CONFIG, OVERRIDES, workdir).wait() == 0
        assert differences(whole, workdir) == []


def start_two(config, overrides, workdir):
    """One run by two processes, each with one device."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        at = f"--coordinator=localhost:{free.getsockname()[1]}"
    return [start(config, overrides, workdir, at, "--processes=2", f"--process={index}") for index in range(2)]


def test_two_processes_stop_at_one_step_and_one_goes_on(whole, tmp_path):
    """The state lies in both, a signal comes to the one that writes no record; then a single device takes over."""
    workdir = tmp_path / "run"
    processes = start_two(CONFIG, OVERRIDES | {"mesh.fsdp": "2"}, workdir)
    while count_lines(workdir) < 8 and processes[1].poll() is None:
        time.sleep(0.005)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait() for process in processes] == [143, 143], (tmp_path / "run.log").read_text()
    step = finished_steps(workdir / "checkpoints" / "train")[-1]
    assert read_metrics(workdir)[-1]["step"] == step < 12
    state = workdir / "checkpoints" / "train" / str(step) / "state"
    assert all(any((state / f"ocdbt.process_{index}" / "d").iterdir()) for index in range(2)), "each wrote its part"
    assert start(CONFIG, OVERRIDES, workdir).wait() == 0, (tmp_path / "run.log").read_text()
    assert count_lines(workdir) == count_lines(whole)
    expected, got = final_arrays(whole), final_arrays(workdir)
    assert expected.keys() == got.keys()
    for name, array in expected.items():
        # float32: sums over the halves of 32 rows come out in another order, then 16 updates of Adam at rate 0.05
        np.testing.assert_allclose(got[name], array, atol=1e-4, err_msg=name)


def test_the_second_ctrl_c_ends_at_once():
    code = """
import time
from jaxrl_llm.train.interrupts import StopRequests
with StopRequests() as stop:
    print("ready", flush=True)
    begun = time.time()
    while time.time() - begun < 30:  # a step that does not end
        sum(range(1000))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert b"finishing this step" in process.stderr.readline() + process.stderr.readline()
    assert process.poll() is None
    begun = time.time()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert time.time() - begun < 5
    process.stdout.close()
    process.stderr.close()
