"""A disk without room: nothing is half written, the message says what was wanted, and the run goes on once there is."""

import contextlib
import json
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks.kill_resume import differences
from jaxrl_llm import train
from jaxrl_llm.files import DiskFullError, append_whole, raise_if_full, write_atomically
from jaxrl_llm.models import load_params, save_params
from jaxrl_llm.train.host_state import load_host_state, save_host_state
from jaxrl_llm.train.tensorboard import EventFile

OPTIMIZER = train.make_optimizer(train.optimizer_config(0.1))


@contextlib.contextmanager
def room(num_bytes):
    """No file may grow beyond this. The system says EFBIG then, where a full disk would say ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Host:
    def __init__(self, size):
        self.state = {"rows": np.arange(size)}

    def get_state(self):
        return self.state


def figure(size):
    picture = Figure(figsize=(size, size))
    picture.subplots().plot(np.random.default_rng(0).normal(size=100))
    return picture


WRITERS = {
    "summary.json": lambda log, n: log.summary({"text": "x" * n}),
    "outcomes/a.npy": lambda log, n: log.outcomes("a", np.zeros(n)),
    "figures/a.png": lambda log, n: log.figure("a", figure(2 + n / 1000)),
    "a.safetensors": lambda log, n: save_params({"w": jnp.zeros(n)}, log.workdir / "a.safetensors"),
    "7.host": lambda log, n: save_host_state(log.workdir, 7, Host(n)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_the_old_one_or_the_new_one(tmp_path, name):
    with train.RunLog(tmp_path, {}, quiet=True) as log:
        WRITERS[name](log, 10)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with room(2000), pytest.raises(DiskFullError, match=r"could not be written .* bytes are free in") as failure:
            WRITERS[name](log, 3000)
    assert f"{tmp_path / name} could not" in str(failure.value)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if name.endswith("host"):
        np.testing.assert_array_equal(load_host_state(tmp_path, 7)["rows"], np.arange(10))
    if name.endswith("safetensors"):
        assert load_params(tmp_path / name, {"w": jax.ShapeDtypeStruct((10,), jnp.float32)})["w"].shape == (10,)


def test_a_line_is_there_or_not(tmp_path):
    path = tmp_path / "lines"
    with path.open("ab", buffering=0) as file:
        append_whole(file.fileno(), path, b"one\n")
        with room(6), pytest.raises(DiskFullError, match="it takes 4 bytes"):
            append_whole(file.fileno(), path, b"two\n")
        assert path.read_bytes() == b"one\n"
        append_whole(file.fileno(), path, b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"


def test_events_fail_where_they_are_written_and_nobody_waits(tmp_path):
    events = EventFile(tmp_path, 0)
    with room(1000), pytest.raises(DiskFullError, match=str(tmp_path)):
        for step in range(1000):
            events.add(step, {f"train/{name}": 1.0 for name in "abcdef"})
    events.close()


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "absent" / "file", "text")
    assert raise_if_full(PermissionError(13, "no"), tmp_path) is None
    with pytest.raises(DiskFullError):  # as safetensors words it
        raise_if_full(ValueError("I/O error: No space left on device (os error 28)"), tmp_path)


def run(workdir):
    def iteration(state):
        state, metrics = train.apply_gradients(state, {"w": jnp.sin(state.params["w"])}, OPTIMIZER, jnp.float32(0))
        return state, {**metrics, **{f"metric_{index}": jnp.sum(state.params["w"]) for index in range(100)}}

    with train.RunLog(workdir, {"checkpoint_every": 2}, quiet=True) as log:
        init = lambda seed: train.init_state({"w": jnp.arange(3.0)}, OPTIMIZER, seed)  # noqa: E731
        state = train.loop(init, iteration, steps=12, log=log)
        log.summary({"w": state.params["w"]})


def test_a_run_ends_clearly_and_goes_on_when_there_is_room(tmp_path):
    run(tmp_path / "whole")
    size = (tmp_path / "whole" / "metrics.jsonl").stat().st_size
    # enough for any file of a checkpoint, and for three quarters of the lines
    with room(int(size * 0.75)), pytest.raises(DiskFullError, match="goes on from the newest checkpoint"):
        run(tmp_path / "full")
    lines = (tmp_path / "full" / "metrics.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b"" and 6 <= len(lines) < 12
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert not list(Path(tmp_path).rglob("*.partial"))
    run(tmp_path / "full")
    assert differences(tmp_path / "whole", tmp_path / "full") == []
