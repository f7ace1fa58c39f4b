"""The process that runs a command again when it is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxrl_llm.distributed import FAILED, supervise

ROOT = Path(__file__).parents[2]
COUNT = (
    "import os, sys, pathlib; p = pathlib.Path(sys.argv[1]); p.write_text(p.read_text() + 'x'); n = len(p.read_text());"
)


def run(tmp_path, code, progress=None, **options):
    lives = tmp_path / "lives"
    lives.write_text("")
    command = [sys.executable, "-S", "-c", COUNT + code, str(lives)]
    result = supervise(command, progress or (lambda: lives.read_text()), pause_seconds=0.01, **options)
    return result, len(lives.read_text())


@pytest.mark.parametrize("code", [0, 2, FAILED, 130, 143])
def test_some_ends_are_final(tmp_path, code):
    assert run(tmp_path, f"sys.exit({code})") == (code, 1)


def test_a_killed_command_is_run_again(tmp_path, capfd):
    assert run(tmp_path, "os.kill(os.getpid(), 9) if n < 8 else sys.exit(0)") == (0, 8), "it got on each time"
    assert capfd.readouterr().err.count("ended by SIGKILL; started again") == 7


def test_one_that_does_not_get_on_is_given_up(tmp_path, capfd):
    assert run(tmp_path, "sys.exit(1)", progress=lambda: 0, most_deaths=3) == (1, 3)
    assert run(tmp_path, "os.kill(os.getpid(), 9)", progress=lambda: 0, most_deaths=2) == (137, 2)
    assert "3 times in a row without getting on: giving up" in capfd.readouterr().err


SUPERVISED = """
import runpy, sys
supervisor = runpy.run_path("jaxrl_llm/distributed/supervisor.py")  # without all else that the package imports
command = [sys.executable, "-c", '''
import os, runpy, signal, sys, time
runpy.run_path("jaxrl_llm/distributed/supervisor.py")["die_with_supervisor"]()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print(os.getpid(), flush=True)
time.sleep(60)
''']
sys.exit(supervisor["supervise"](command, lambda: 0))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_the_command(number):
    process = subprocess.Popen([sys.executable, "-c", SUPERVISED], cwd=ROOT, stdout=subprocess.PIPE)
    child = int(process.stdout.readline())
    process.send_signal(number)
    assert process.wait(timeout=30) == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:  # a killed supervisor takes its command along
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        time.sleep(0.01)
    else:
        pytest.fail("the command outlived its supervisor")
    process.stdout.close()
