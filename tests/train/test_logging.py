"""The record of a run: lines, summary, outcomes, lock."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxrl_llm.train.logging import RunLog, WorkdirError, progress_text, read_metrics, read_outcomes, read_summary

CONFIG = ConfigDict({"steps": 3, "model": {"width": 8}, "hops": (1, 2)})


def open_log(path, config=CONFIG):
    return RunLog(path, config, quiet=True)


def test_lines_are_cut_to_the_checkpoint_and_a_torn_one_goes(tmp_path):
    with open_log(tmp_path) as log:
        for stage in ("warm_start", "train"):
            log.start_stage(stage, -1, 3)
            for step in range(4):
                log.metrics(stage, step, {"loss": np.float32(step / 3), "bad": float("nan"), "n": np.int32(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "train", "st')
    lines = read_metrics(tmp_path)
    assert len(lines) == 8
    assert lines[1] == {"stage": "warm_start", "step": 1, "loss": float(np.float32(1 / 3)), "bad": None, "n": 1}
    with open_log(tmp_path) as log:
        log.start_stage("train", 2, 3)
        log.metrics("train", 3, {"loss": 7})
        # An earlier stage that goes on again keeps its place before the later one.
        log.start_stage("warm_start", 1, 3)
        log.metrics("warm_start", 2, {"loss": 8})
        log.start_stage("train", 3, 3)
    steps = [(line["stage"], line["step"]) for line in read_metrics(tmp_path)]
    assert steps == [("warm_start", step) for step in range(3)] + [("train", step) for step in range(4)]


def test_metrics_must_be_scalars_and_a_spoilt_line_is_named(tmp_path):
    with open_log(tmp_path) as log:
        with pytest.raises(ValueError, match="metric 'x' must be a scalar, got shape \\(2,\\)"):
            log.metrics("train", 1, {"x": np.zeros(2)})
        with pytest.raises(ValueError, match="stage 'train' has no line"):
            log.last("train")
        log.metrics("train", 1, {"x": 1}, seed=0)
        log.metrics("train", 1, {"x": 2}, seed=1)
        assert [line["x"] for line in log.last("train")] == [1, 2]
    (tmp_path / "metrics.jsonl").write_text("{}\nnot json\n{}\n")
    with pytest.raises(ValueError, match="not JSON"):
        read_metrics(tmp_path)


def test_another_config_is_refused_key_by_key(tmp_path):
    open_log(tmp_path).close()
    open_log(tmp_path).close()
    with pytest.raises(
        WorkdirError, match="(?s)another config.*extra: '\\(absent\\)' there, 1 now.*model.width: 8 there, 9"
    ):
        open_log(tmp_path, ConfigDict({"steps": 3, "model": {"width": 9}, "hops": (1, 2), "extra": 1}))
    open_log(tmp_path).close()  # the refusal left no lock


def test_one_process_at_a_time(tmp_path):
    with open_log(tmp_path):
        with pytest.raises(WorkdirError, match="another process is using"):
            open_log(tmp_path)
    open_log(tmp_path).close()


def test_summary_outcomes_and_figures(tmp_path):
    from matplotlib.figure import Figure

    with open_log(tmp_path) as log:
        assert read_summary(tmp_path) is None
        log.summary({"warm_start": {"success": np.float32(0.25), 2: [np.nan, 1]}, "note": "x"})
        log.summary({"trained": {"success": np.array([0.5, np.inf]), "done": np.bool_(True)}})
        assert read_summary(tmp_path) == {
            "warm_start": {"success": 0.25, "2": [None, 1]},
            "note": "x",
            "trained": {"success": [0.5, None], "done": True},
        }
        json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
        log.outcomes("trained/success", [1, 0, 1])
        np.testing.assert_array_equal(read_outcomes(tmp_path, "trained.success"), [1, 0, 1])
        assert read_outcomes(tmp_path, "other") is None
        with pytest.raises(ValueError, match="outcomes 'x' must be finite numbers"):
            log.outcomes("x", [np.nan])
        assert log.figure("a/b", Figure()).stat().st_size > 0
    assert not list(tmp_path.glob("**/*.partial"))


def test_progress_shows_what_there_is(capsys, tmp_path):
    values = {
        "tokens_per_second": 12345.6,
        "reward": 0.5,
        "eval/success": 0.25,
        "success": 0.1,
        "kl": None,
        "skipped": 0,
    }
    assert progress_text(values) == "tokens/s 12,346  reward 0.5  success 0.1  held out 0.25"
    assert progress_text({"skipped": 2}) == "skipped 2"
    with RunLog(tmp_path, CONFIG) as log:
        log.start_stage("train", 0, 3)
        for step in (1, 2, 3):
            log.progress(step, {"reward": 0.5})
        log.info("done")
        log.end_stage()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train 1/3  reward 0.5") and lines[1:] == ["train 3/3  reward 0.5", "done"]


def test_a_terminal_gets_a_live_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with RunLog(tmp_path, CONFIG) as log:
        log.start_stage("train", 0, 3)
        log.progress(1, {"reward": 0.5})
        log.info("a line of [brackets]")
        log.end_stage()
    assert "a line of [brackets]" in capsys.readouterr().out


def test_tensorboard_drops_what_is_made_again(tmp_path):
    with open_log(tmp_path) as log:
        log.start_stage("train", -1, 3)
        log.metrics("train", 1, {"loss": 1.0})
        log.start_stage("train", 0, 3)
        log.metrics("train", 1, {"loss": 1.0})
    contents = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard" / "train").iterdir())
    assert contents.count(b"train/loss") == 2
