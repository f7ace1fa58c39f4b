"""The whole on Ray, in one small cluster: workers that are killed, trainers that exchange samples, tool servers."""

import os
import random
import signal
import socket
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks.kill_workers import kill_one
from jaxrl_llm import distributed, train
from jaxrl_llm.distributed.cluster import check_address
from jaxrl_llm.tools import Tool, ToolError, tool
from jaxrl_llm.train.config import load_module, override

page = load_module(Path(__file__).with_name("bandit_page.py"))
two_trainers = load_module(Path(__file__).with_name("two_trainers.py"))


@pytest.fixture(scope="module")
def cluster():
    with distributed.cluster(num_cpus=4, object_store_mb=100):
        yield


def config_of(**overrides):
    config = page.get_config()
    for key, value in {"distributed__workers": 2, **overrides}.items():
        override(config, key.replace("__", "."), value)
    return config


def kill_workers(folder, after, done):
    """Kills a worker of ours as soon as the ledger has each of the numbers of lines."""
    for count in after:
        while len(distributed.read_ledger(folder)) < count and not done.is_set():
            time.sleep(0.01)
        kill_one(os.getpid(), "worker", random.Random(count))


def test_workers_are_killed_and_nothing_is_lost_or_counted_twice(cluster, tmp_path):
    config, done = config_of(steps=16, sleep=0.1), threading.Event()
    killer = threading.Thread(target=kill_workers, args=(tmp_path / "rollouts", (4, 12), done))
    killer.start()
    try:
        summary = train.run_page(page, config, tmp_path, quiet=True)
    finally:
        done.set()
        killer.join()
    assert summary["logits"][-1] > summary["logits"][0], "it learned"
    counts, wrong = distributed.audit(tmp_path / "rollouts", "train")
    assert wrong == [] and counts["fetched"] == 16 and counts["waiting"] == 0
    lines = train.read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [*range(1, 17)]
    assert all(0 <= line["staleness"] <= line["staleness_max"] <= 2 for line in lines)
    assert lines[-1]["worker_restarts"] >= 1 and lines[-1]["rollouts_dropped"] == counts["dropped"]
    ledger = distributed.read_ledger(tmp_path / "rollouts")
    assert sorted(int(id) for line in ledger if line["event"] == "fetched" for id in line["ids"]) == [*range(16)]
    assert any(line.get("version", 0) < line.get("newest_version", 0) for line in ledger), (
        "some rollout went on under weights that came while it was under way"
    )


def test_a_resumed_trainer_is_given_the_same_again(cluster, tmp_path):
    """As after a kill: step 4 is in the ledger, but not in a checkpoint."""
    whole = tmp_path / "whole"
    config = config_of(steps=4, checkpoint_every=3, distributed__workers=1)
    train.run_page(page, config, whole, quiet=True)
    lines, final = train.read_metrics(whole), train.read_summary(whole)
    for left in (whole / "checkpoints" / "train" / "4", whole / "summary.json"):
        left.rename(tmp_path / left.name)
    assert train.run_page(page, config, whole, quiet=True)
    timeless = [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]
    again = [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
        for line in train.read_metrics(whole)
    ]
    assert again == timeless and train.read_summary(whole)["logits"] == final["logits"]
    counts, wrong = distributed.audit(whole / "rollouts", "train")
    assert wrong == [] and counts["fetched"] == 4 and counts["waiting"] == 0


def test_a_rollout_that_cannot_be_made_ends_the_run(cluster, tmp_path):
    with pytest.raises(RuntimeError, match="rollout 1 of seed 0 failed 3 times.*the environment is down"):
        train.run_page(page, config_of(fail_at=1, distributed__workers=1), tmp_path, quiet=True)


def test_two_trainers_exchange_samples_and_one_is_killed(cluster, tmp_path):
    trainers = {name: partial(getattr(two_trainers, f"{name}_trainer"), str(tmp_path)) for name in ("main", "sub")}
    results = distributed.run_trainers(trainers, tmp_path / "exchange", processes=True)
    assert results == {"main": {"width": 3, "sub_updates": 3}, "sub": {"width": 5, "killed": True}}
    for key in ("main", "sub"):
        counts, wrong = distributed.audit(tmp_path / "exchange", key)
        assert wrong == [] and counts["committed"] == counts["fetched"] == 12
    with pytest.raises(KeyError, match="no such model"):
        distributed.run_trainers({"main": two_trainers.failing_trainer}, tmp_path / "other", processes=True)


def test_the_same_two_trainers_in_one_process(tmp_path):
    trainers = {name: partial(getattr(two_trainers, f"{name}_trainer"), str(tmp_path)) for name in ("main", "sub")}
    results = distributed.run_trainers(trainers, tmp_path / "exchange")
    assert results == {"main": {"width": 3, "sub_updates": 3}, "sub": {"width": 5, "killed": False}}
    with pytest.raises(ValueError, match="options for .'third'., but the trainers are main, sub"):
        distributed.run_trainers(trainers, tmp_path, options={"third": {}})


def make_tools():
    @tool
    def process(number: int) -> str:
        """The number and who says it.

        Args:
          number: any.
        """
        if number < 0:
            raise ToolError("negative numbers are not served")
        if number == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return f"{number} {os.getpid()}"

    return [process]


def test_a_tool_server(cluster):
    (served,) = distributed.served_tools(make_tools, name="numbers")
    (again,) = distributed.served_tools(make_tools, name="numbers")
    assert isinstance(served, Tool) and served.argument_errors({"number": "x"})
    first = served.call(number=1).split()
    assert first[0] == "1" and int(first[1]) != os.getpid() and again.call(number=2).split()[1] == first[1]
    with pytest.raises(ToolError, match="^negative numbers are not served$"):
        served.call(number=-1)
    with pytest.raises(ConnectionError, match="the tool server 'numbers' ended during a call of process"):
        served.call(number=13)
    assert served.call(number=3).split()[1] != first[1], "another server"


def test_tools_without_a_cluster(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    (local,) = distributed.served_tools(make_tools, name="numbers")
    assert local.call(number=1) == f"1 {os.getpid()}"


def test_ray_that_cannot_be_started_may_be_tried_again(monkeypatch):
    import ray

    def fail(**options):
        raise RuntimeError("the node timed out during startup")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(distributed.HeadLost, match="Ray does not answer .RuntimeError: the node timed out"):
        with distributed.cluster():
            pass


def test_an_address_that_does_not_answer():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"no Ray cluster answers at {address} within 1 seconds"):
            check_address(address, 1.0)
