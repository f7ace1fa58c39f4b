"""A run that hangs, or that does not end in its time of grace, ends all the same: a clear word, an exit code, a
checkpoint that stands."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from jaxrl_llm.train import RunLog, finished_steps
from jaxrl_llm.train.config import load_config
from jaxrl_llm.train.interrupts import StopRequests
from jaxrl_llm.train.watchdog import LEAST_SECONDS, STUCK, Watchdog

ROOT = Path(__file__).parents[2]

# A loop whose third batch does not come.
HANGING = """
    import sys, time
    import jax.numpy as jnp
    from jaxrl_llm import train
    from jaxrl_llm.train import watchdog
    watchdog.LEAST_SECONDS = 3.0
    watchdog.TIMES_MEDIAN = 1.0  # of the first step, which compiles: scales with how busy the machine is
    OPTIMIZER = train.make_optimizer(train.optimizer_config(0.1))

    def a_tool_that_hangs():
        print("hangs", flush=True)
        time.sleep(60)

    def batch(step):
        return jnp.zeros(()) if step < 2 else a_tool_that_hangs()

    def iteration(state, x):
        return train.apply_gradients(state, {"w": jnp.ones(3)}, OPTIMIZER, x)

    config = {"checkpoint_every": 1, "grace_seconds": 0.5, "step_timeout": float(sys.argv[2]) or None}
    with train.RunLog(sys.argv[1], config, quiet=True) as log:
        train.loop(lambda seed: train.init_state({"w": jnp.ones(3)}, OPTIMIZER, seed), iteration,
                   steps=5, log=log, batch=batch)
"""

# Code that keeps the interpreter to itself, so that no other thread of Python runs.
HOLDING = """
    import ctypes, sys
    from jaxrl_llm.train import watchdog
    watchdog.LAST_RESORT_SECONDS = 0.5

    def a_tool_that_holds_all():
        ctypes.PyDLL(None).sleep(60)

    with watchdog.Watchdog(sys.argv[1], 0.5) as dog:
        dog.expect("step", "step 1")
        a_tool_that_holds_all()
"""


def begin(code, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_hangs_is_named_and_ends_the_process(tmp_path):
    processes = begin(HANGING, tmp_path, 0), begin(HOLDING, tmp_path)
    errors, last_resort = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [STUCK, 1]
    stacks = (tmp_path / "stuck.txt").read_text()
    assert "stuck: train: step 2, with what was under way of step 1, has taken more than" in stacks
    assert "a_tool_that_hangs" in stacks and "the newest checkpoint stands" in errors
    assert "a_tool_that_holds_all" in last_resort
    assert finished_steps(tmp_path / "checkpoints" / "train")[-1] in (1, 2)


def test_a_step_longer_than_the_grace(tmp_path):
    process = begin(HANGING, tmp_path, 60)
    assert process.stdout.readline() == "hangs\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: finishing this step and saving" in errors
    assert "was not finished and saved within grace_seconds=0.5. The newest checkpoint stands (step " in errors


def test_limits_follow_the_median_of_the_same_kind(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    dog = Watchdog(tmp_path)
    monkeypatch.setattr(dog, "_arm", lambda seconds: None)
    limits = []
    for kind, seconds in (("step", 100.0), ("step", 40.0), ("evaluation", 900.0), ("step", 50.0), ("evaluation", 1.0)):
        dog.expect(kind, "")
        limits.append(dog._allowed)
        clock[0] += seconds
    assert limits == [None, 2000.0, None, 1400.0, 18_000.0]
    quick = Watchdog(tmp_path)
    monkeypatch.setattr(quick, "_arm", lambda seconds: None)
    quick.expect("step", "")
    clock[0] += 0.1
    quick.expect("step", "")
    assert quick._allowed == LEAST_SECONDS


def test_settings_of_care(tmp_path):
    with pytest.raises(ValueError, match=r"config.step_timeout must be positive seconds or None, got 0"):
        Watchdog(tmp_path, 0)
    with pytest.raises(ValueError, match=r"config.grace_seconds must be positive seconds or None, got -1"):
        StopRequests(-1)
    page = Path(__file__).with_name("bandit_page.py")
    with RunLog(tmp_path, load_config(f"{page}:small", {"step_timeout": "60"}), quiet=True):
        pass
    with RunLog(tmp_path, load_config(f"{page}:small", {"grace_seconds": "2.5"}), quiet=True) as log:
        assert (log.config.step_timeout, log.config.grace_seconds) == (None, 2.5)
