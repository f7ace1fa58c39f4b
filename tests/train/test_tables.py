"""Intervals, claims and tables on numbers that are known."""

import json

import numpy as np
import pytest

from jaxrl_llm import train
from jaxrl_llm.train.intervals import Interval, bootstrap_mean, describe, judge
from jaxrl_llm.train.tables import markdown

RUN = {"device": "cpu, 2 cores", "versions": {"jax": "0"}, "seconds": 1.0, "complete": True}


def results(values, outcomes=None):
    return [
        {"values": {"m": value}, "outcomes": {} if outcomes is None else {"m": outcomes[i]}, "seconds": 2.0, "run": RUN}
        for i, value in enumerate(values)
    ]


def test_bootstrap_over_seeds():
    interval = bootstrap_mean([0.1, 0.2, 0.6])
    assert interval.mean == pytest.approx(0.3)
    # All three draws alike have probability 1/27 each, above the 2.5% of a tail: the ends are the extremes.
    assert (interval.low, interval.high) == pytest.approx((0.1, 0.6))
    assert bootstrap_mean([0.3, 0.3, 0.3]) == (0.3, 0.3, 0.3)
    assert bootstrap_mean([0.3]) == (0.3, None, None)
    many = np.random.default_rng(1).normal(size=400)
    interval = bootstrap_mean(many)
    # The normal approximation; 10,000 resamples place a quantile within about 2% of the half width.
    half = 1.96 * many.std() / 20
    np.testing.assert_allclose(
        [interval.low, interval.high], [many.mean() - half, many.mean() + half], atol=0.06 * half
    )
    with pytest.raises(ValueError, match="finite values"):
        bootstrap_mean([0.1, np.nan])
    with pytest.raises(ValueError, match="finite values"):
        bootstrap_mean([])


def test_bootstrap_over_questions_too():
    rng = np.random.default_rng(0)
    table = (rng.random((1, 500)) < 0.4).astype(float)
    one = bootstrap_mean(table)
    half = 1.96 * np.sqrt(table.mean() * (1 - table.mean()) / 500)
    np.testing.assert_allclose([one.low, one.high], [table.mean() - half, table.mean() + half], atol=0.08 * half)
    # The same answers by each of three seeds are no more evidence about the questions than one seed's.
    three = bootstrap_mean(np.repeat(table, 3, axis=0))
    np.testing.assert_allclose(three, one, atol=0.08 * half)


def test_judgement():
    assert judge(Interval(0.2, 0.1, 0.3)) == "holds"
    assert judge(Interval(0.2, 0.1, 0.3), by=0.1) == "undecided"
    assert judge(Interval(0.2, 0.1, 0.3), by=0.3) == "does not hold"
    assert judge(Interval(0.0, 0.0, 0.0)) == "does not hold"
    assert judge(Interval(0.2, None, None)) == "undecided"
    assert "75%" in describe(3, None) and "300 held-out questions" in describe(3, 300)
    assert "no claim is decided" in describe(1, None) and "nothing about another seed" in describe(1, 9)


def test_claims_are_paired_by_seed():
    table = train.Table(
        arms={"a": {}, "b": {}, "c": {"k": 1}},
        metric="m",
        claims=[
            train.better("a", "b"),
            train.better("a", "b", by=0.15),
            train.better("b", "a"),
            train.better("b", "a", lower=True),
            train.better("a", "c"),
        ],
    )
    # Seeds differ far more than arms; the differences are 0.1, 0.1 and 0.2.
    result = train.summarize(table, {"a": results([0.2, 0.5, 0.9]), "b": results([0.1, 0.4, 0.7])}, {"steps": 5})
    claims = result["claims"]
    assert [claim["outcome"] for claim in claims.values()] == [
        "holds",
        "undecided",
        "does not hold",
        "holds",
        "not run",
    ]
    assert list(claims) == ["a > b", "a > b + 0.15", "b > a", "b < a", "a > c"]
    np.testing.assert_allclose(claims["a > b"]["differences"], [0.1, 0.1, 0.2])
    assert claims["a > b"]["mean"] == pytest.approx(0.4 / 3)
    assert result["arms"]["a"]["metrics"]["m"]["mean"] == pytest.approx(1.6 / 3)
    assert result["arms"]["a"]["seconds"] == 6.0 and result["overrides"] == {"steps": 5} and result["seeds"] == 3
    text = markdown(result, "main", "command")
    assert "| a     | 0.533 [0.200, 0.900] | 6" in text and "| a > b + 0.15 | m" in text and "steps=5" in text


def test_claims_use_outcomes_of_questions():
    rng = np.random.default_rng(0)
    base = (rng.random((2, 400)) < 0.5).astype(float)
    more = np.maximum(base, rng.random((2, 400)) < 0.1)
    table = train.Table(arms={"a": {}, "b": {}}, metric="m", claims=[train.better("a", "b"), train.better("b", "a")])
    result = train.summarize(table, {"a": results(more.mean(1), more), "b": results(base.mean(1), base)})
    claim = result["claims"]["a > b"]
    # 5% of 400 questions differ: the paired interval is far narrower than that of either arm.
    assert claim["outcome"] == "holds" and claim["high"] - claim["low"] < 0.06
    arm = result["arms"]["a"]["metrics"]["m"]
    assert arm["high"] - arm["low"] > 0.08
    assert result["claims"]["b > a"]["outcome"] == "does not hold"
    assert "400 held-out questions" in result["intervals"]
    # Without outcomes in one arm, pairs of seeds remain.
    mixed = train.summarize(table, {"a": results(more.mean(1), more), "b": results(base.mean(1))})
    assert len(mixed["claims"]["a > b"]["differences"]) == 2


def test_a_missing_number_decides_nothing():
    table = train.Table(arms={"a": {}, "b": {}}, metric="m", claims=[train.better("a", "b")])
    result = train.summarize(table, {"a": results([0.5, None]), "b": results([0.1, 0.2])})
    assert result["claims"]["a > b"]["outcome"] == "undecided"
    assert result["arms"]["a"]["metrics"]["m"] == {"values": [0.5, None], "mean": None, "low": None, "high": None}
    assert "not finite" in markdown(result, "main", "command")


def test_metric_paths():
    summary = {"trained": {"success": {"2": 0.5}, "success/1": 0.25}, "success/2": 0.75, "list": [1, 2]}
    assert train.find_metric(summary, "trained.success.2") == 0.5
    assert train.find_metric(summary, "trained.success/1") == 0.25
    assert train.find_metric(summary, "success/2") == 0.75
    assert train.find_metric(summary, "list") == [1, 2]
    with pytest.raises(ValueError, match="no metric 'trained.reward'; there is trained, success/2, list"):
        train.find_metric(summary, "trained.reward")
    with pytest.raises(ValueError, match="no metric 'trained'; there is success, success/1"):
        train.find_metric(summary, "trained")


def test_bad_tables():
    with pytest.raises(ValueError, match="claim 'a > x' is about 'x'; the table has the arms a"):
        train.Table(arms={"a": {}}, metric="m", claims=[train.better("a", "x")])
    with pytest.raises(ValueError, match="needs the metric 'n'; the table has m"):
        train.Table(arms={"a": {}, "b": {}}, metric="m", claims=[train.better("a", "b", metric="n")])
    with pytest.raises(ValueError, match="a table needs arms, a metric"):
        train.Table(arms={"a": {}})


def test_a_sweep_resumes_and_seeds_may_run_at_once(tmp_path, page, make_config, monkeypatch):
    table = page.TABLES["main"]
    arguments = (page, lambda changes: make_config(**changes), table, tmp_path / "runs")
    quiet = {"quiet": True, "report": lambda text: None}
    first = train.run_table(*arguments, arms=["trained"], **quiet)
    assert list(first["arms"]) == ["trained"] and first["claims"]["trained > frozen + 0.05"]["outcome"] == "not run"
    whole = train.run_table(*arguments, arms=["frozen"], **quiet)
    assert whole["arms"]["trained"] == first["arms"]["trained"]
    assert [claim["outcome"] for claim in whole["claims"].values()] == ["holds", "does not hold"]
    assert whole["metrics"] == ["trained/success", "warm_start.success"] and whole["seeds"] == 2
    assert whole["arms"]["frozen"]["overrides"] == {"optimizer.learning_rate": 0.0}

    at_once = train.run_table(*arguments, vmap_seeds=True, **quiet)
    assert (tmp_path / "runs" / "frozen" / "seeds_0_1" / "summary.json").exists()
    for arm in table.arms:
        for metric in table.columns:
            one, other = (result["arms"][arm]["metrics"][metric]["values"] for result in (whole, at_once))
            np.testing.assert_allclose(one, other, atol=1e-4)  # see test_loops: batched products round differently

    with monkeypatch.context() as patch:
        patch.setattr(page, "run", lambda config, log: pytest.fail("a finished run was run again"))
        assert train.run_table(*arguments, **quiet) == whole
    with pytest.raises(ValueError, match="the table has no arm 'x'"):
        train.run_table(*arguments, arms=["x"], **quiet)

    paths = train.write_table(whole, tmp_path / "results" / "bandit", "main", command="make it")
    assert [path.name for path in paths] == ["main.json", "main.md", "main.png"]
    assert json.loads(paths[0].read_text()) == {"command": "make it", **json.loads(json.dumps(whole))}
    assert paths[2].read_bytes()[:4] == b"\x89PNG"


def test_learning_curves_over_seeds(tmp_path):
    for name, seeds in {"0": (None,), "1": (None,), "both": (2, 3)}.items():
        with train.RunLog(tmp_path / name, {}, quiet=True) as log:
            for step in range(5):
                for seed in seeds:
                    log.metrics("train", step, {"reward": step * (1 + int(name == "1"))} if step else {}, seed)
    steps, values = train.read_curve([tmp_path / "0", tmp_path / "1"], "reward")
    assert steps.tolist() == [1, 2, 3, 4] and values.tolist() == [[1, 2, 3, 4], [2, 4, 6, 8]]
    assert train.read_curve([tmp_path / "both"], "reward")[1].shape == (2, 4)
    figure = train.learning_curves({"one": tmp_path / "0", "two": [tmp_path / "0", tmp_path / "1"]}, "reward", smooth=2)
    axis = figure.axes[0]
    assert (figure.get_suptitle(), axis.get_ylabel()) == ("reward during train", "reward")
    assert axis.get_xlabel() == "step (mean of the last 2)"
    assert axis.lines[0].get_ydata().tolist() == [1, 1.5, 2.5, 3.5]
    assert axis.lines[1].get_ydata().tolist() == [1.5, 2.25, 3.75, 5.25]
    assert len(axis.collections) == 1  # a band for the label with two seeds only
    figure = train.learning_curves({"one": tmp_path / "0"}, ["reward", "reward"], ylabels={"reward": "mean reward"})
    assert [axis.get_ylabel() for axis in figure.axes] == ["mean reward", "mean reward"]
    figure.savefig(tmp_path / "curve.png")
    with pytest.raises(ValueError, match="no step of stage 'train' has the metric 'nothing'"):
        train.read_curve([tmp_path / "0"], "nothing")
