"""A page on two simulated devices: the run that it is on one, killed and taken up again or not."""

import numpy as np
import pytest

from benchmarks.kill_resume import differences, kill_when, start
from jaxrl_llm.train import read_arrays, read_metrics, read_summary
from jaxrl_llm.train.logging import TIMING_KEYS

CONFIG = "search_r1:tiny"


def params_of(workdir, part=".params['policy']"):
    arrays = read_arrays(workdir / "checkpoints" / "train" / "3")
    leaves = [array.ravel() for name, array in sorted(arrays.items()) if name.startswith(part)]
    return np.concatenate(leaves).astype(np.float64)


@pytest.mark.slow
def test_two_devices_train_as_one(tmp_path, monkeypatch):
    one, two, killed = tmp_path / "one", tmp_path / "two", tmp_path / "killed"
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    assert start(CONFIG, {}, one).wait() == 0
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    overrides = {"mesh.data": "2"}
    assert start(CONFIG, overrides, two).wait() == 0

    lines, own = read_metrics(one), read_metrics(two)
    assert len(lines) == len(own) == 4
    for line, other in zip(lines, own, strict=True):
        for name in line.keys() - {"stage", *TIMING_KEYS}:
            # what was sampled is the same, so what is counted is equal; sums of float32 in another order move
            # parameters by 1e-4 of their way (below), and logarithms of small ratios by as much
            np.testing.assert_allclose(other[name], line[name], rtol=1e-3, atol=1e-5, err_msg=name)
    for name in ("warm_start", "trained", "no_search"):
        assert read_summary(one)[name]["success"] == read_summary(two)[name]["success"]
    outcomes = [sorted((workdir / "outcomes").glob("*.npy")) for workdir in (one, two)]
    assert all(np.array_equal(np.load(a), np.load(b)) for a, b in zip(*outcomes, strict=True))
    # Adam's first updates divide a gradient by its own size, which for the smallest ones is that of rounding
    way = params_of(one) - params_of(one, ".ref_params")
    assert 0 < np.linalg.norm(params_of(two) - params_of(one)) <= 1e-3 * np.linalg.norm(way)

    # on the same devices, bit for bit
    assert kill_when(start(CONFIG, overrides, killed), killed, lines=3)
    assert start(CONFIG, overrides, killed).wait() == 0
    assert differences(two, killed) == []
