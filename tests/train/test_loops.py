"""The loop: resume bit for bit, one compilation, several seeds, updates that fail."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.kill_resume import differences
from jaxrl_llm import train
from jaxrl_llm.train.logging import TIMING_KEYS

OPTIMIZER = train.make_optimizer(train.optimizer_config(0.1))
CONFIG = {"seed": 0, "checkpoint_every": 3}


def init(seed):
    return train.init_state({"w": jnp.arange(3.0) + seed, "b": jnp.zeros(())}, OPTIMIZER, seed)


def iteration(state):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), state.seed), state.step)
    target = jax.random.normal(key, (3,))
    loss, grads = jax.value_and_grad(lambda p: jnp.sum((p["w"] + p["b"] - target) ** 2))(state.params)
    state, metrics = train.apply_gradients(state, grads, OPTIMIZER, loss)
    return state, {"loss": loss, **metrics}


def evaluate(state):
    return {"size": jnp.sum(jnp.abs(state.params["w"]))}


def run(workdir, config=CONFIG, **changes):
    options = {"steps": 8, "evaluate": evaluate, "evaluate_every": 4, **changes}
    with train.RunLog(workdir, config, quiet=True) as log:
        return train.loop(options.pop("init", init), options.pop("iteration", iteration), log=log, **options)


class Crash(Exception):
    pass


@pytest.mark.parametrize("crash_at", [(5,), (1, 10)])
def test_a_crashed_run_ends_like_a_whole_one(tmp_path, page, make_config, crash_at):
    """Ten steps at once against ten with crashes, each iteration with two inner updates and a stage before."""
    config = make_config(checkpoint_every=2)
    train.run_page(page, config, tmp_path / "whole", quiet=True)

    for crash in crash_at:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
            original = train.RunLog.metrics

            def metrics(self, stage, step, values, seed=None, crash=crash, original=original):
                if stage == "train" and step == crash:
                    raise Crash
                original(self, stage, step, values, seed)

            patch.setattr(train.RunLog, "metrics", metrics)
            train.run_page(page, config, tmp_path / "crashed", quiet=True)
    train.run_page(page, config, tmp_path / "crashed", quiet=True)
    assert differences(tmp_path / "whole", tmp_path / "crashed") == []
    lines = train.read_metrics(tmp_path / "crashed")
    assert [line["step"] for line in lines if line["stage"] == "train"] == list(range(11))


def test_one_compilation_per_shape_and_none_for_the_host(tmp_path, monkeypatch):
    traces = []
    made = []
    original = train.loops.over_seeds

    def counted(state, batch):
        traces.append(1)
        return iteration(state)

    def over_seeds(function, *arguments, **options):
        made.append(original(function, *arguments, **options))
        return made[-1]

    monkeypatch.setattr(train.loops, "over_seeds", over_seeds)
    batch = lambda step: {"x": np.arange(4) + step, "y": np.float64(0.5)}  # noqa: E731
    for steps in (4, 8):  # fresh, then resumed: a restored state must look like a fresh one to jit
        traces.clear()
        made.clear()
        with train.RunLog(tmp_path, CONFIG, quiet=True) as log:
            train.loop(init, counted, steps=steps, log=log, batch=batch, evaluate=evaluate, evaluate_every=1)
        assert len(traces) == 1
        assert [function.jitted._cache_size() for function in made] == [1, 1, 1]  # init, iteration, evaluate


def test_lines_hold_what_the_loop_adds(tmp_path):
    run(tmp_path, iteration=lambda state: (iteration(state)[0], {"tokens": 100, "bad": jnp.nan}))
    lines = train.read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(9))
    assert [line["step"] for line in lines if "eval/size" in line] == [0, 4, 8]
    assert lines[0].keys() == {"stage", "step", "eval/size"}
    assert all(line["seconds"] > 0 and line["bad"] is None and line["skipped"] == 0 for line in lines[1:])
    np.testing.assert_allclose([line["tokens_per_second"] * line["seconds"] for line in lines[1:]], 100)
    assert train.finished_steps(tmp_path / "checkpoints" / "train") == [6, 8]


def test_bound_arrays_are_arguments_not_constants():
    table = jnp.arange(10_000.0)
    bound = train.over_seeds(jax.tree_util.Partial(lambda table, x: table.sum() + x, table), 0)
    text = bound.jitted.lower(jax.tree_util.Partial(lambda table, x: table.sum() + x, table), 1.0).as_text()
    assert "dense<" not in text.replace("dense<0.0", "").replace("dense<0>", "")
    assert bound(1.0) == table.sum() + 1


def test_seeds_at_once_equal_seeds_one_by_one(tmp_path, page, make_config):
    """Batched matrix products add in another order; over 14 AdamW steps of size 0.05 that stays below 1e-4."""
    both = train.run_page(page, make_config(seed=(0, 5)), tmp_path / "both", quiet=True)
    lines = train.read_metrics(tmp_path / "both")
    assert [(line["step"], line["seed"]) for line in lines if line["stage"] == "train"] == [
        (step, seed) for step in range(11) for seed in (0, 5)
    ]
    for index, seed in enumerate((0, 5)):
        alone = train.run_page(page, make_config(seed=seed), tmp_path / str(seed), quiet=True)
        for part in ("warm_start", "trained"):
            np.testing.assert_allclose(both[part]["success"][index], alone[part]["success"], atol=1e-4)
        for one, other in zip(
            train.read_metrics(tmp_path / str(seed)), (line for line in lines if line["seed"] == seed), strict=True
        ):
            keys = one.keys() - {"stage", *TIMING_KEYS}
            np.testing.assert_allclose([one[key] for key in keys], [other[key] for key in keys], rtol=1e-3, atol=1e-4)
    assert train.run_page(page, make_config(seed=(0, 5)), tmp_path / "both", quiet=True) == both


def test_resume_of_several_seeds(tmp_path):
    config = {**CONFIG, "seed": (0, 1)}
    whole = run(tmp_path / "whole", config)
    run(tmp_path / "parts", config, steps=5)
    parts = run(tmp_path / "parts", config)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_earlier_stage_survives_donation(tmp_path):
    with train.RunLog(tmp_path, CONFIG, quiet=True) as log:
        warm = train.loop(init, iteration, steps=2, log=log, stage="warm_start")
        start = jax.tree.map(np.array, warm.params)
        state = train.loop(
            lambda seed, warm: train.init_state(warm.params, OPTIMIZER, seed, ref_params=warm.params),
            iteration,
            steps=2,
            log=log,
            stage="train",
            previous=warm,
        )
    np.testing.assert_array_equal(warm.params["w"], start["w"])
    np.testing.assert_array_equal(state.ref_params["w"], start["w"])
    assert not np.array_equal(state.params["w"], start["w"])


def failing(bad_steps, bad_leaf="b"):
    def iterate(state):
        bad = jnp.isin(state.step, jnp.array(bad_steps))

        def loss_fn(params):
            return jnp.sum(params["w"] ** 2) + jnp.where(bad, jnp.nan, 1.0) * params[bad_leaf]

        grads = jax.grad(loss_fn)(state.params)
        state, metrics = train.apply_gradients(state, grads, OPTIMIZER, jnp.float32(1))
        return state, metrics

    return iterate


def test_skipped_updates_are_counted_and_named(tmp_path):
    with pytest.warns(
        RuntimeWarning, match=r"update at step 3 was skipped, it is not finite \(gradient of params\['b'\]\)"
    ):
        state = run(tmp_path, iteration=failing([2, 5]))
    assert (state.skipped, state.skipped_in_row, state.step) == (2, 0, 8)
    assert [line["skipped"] for line in train.read_metrics(tmp_path)[1:]] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert np.isfinite(state.params["w"]).all()


@pytest.mark.parametrize("max_in_row", [1, 2, 3])
def test_too_many_in_a_row_stop_the_run_with_the_good_state_saved(tmp_path, max_in_row):
    config = {**CONFIG, "max_skipped_in_row": max_in_row, "checkpoint_every": 100}
    bad = failing([0, 4, 5, 6, 7, 8]) if max_in_row > 1 else failing([4, 5])
    words = (
        rf"{max_in_row} updates in a row were not finite, the last at step {4 + max_in_row} \(gradient of params\['b'\]"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(train.NonFiniteError, match=words):
            run(tmp_path / "bad", config, iteration=bad, steps=20)
        good = run(tmp_path / "good", config, iteration=bad, steps=4)
    assert train.read_metrics(tmp_path / "bad")[-1]["step"] == 4 + max_in_row
    saved = train.read_arrays(tmp_path / "bad" / "checkpoints" / "train" / str(4 + max_in_row))
    np.testing.assert_array_equal(saved[".params['w']"], good.params["w"])
    with pytest.raises(train.NonFiniteError, match="found when the run was taken up again"):
        run(tmp_path / "bad", config, iteration=bad, steps=20)


def test_a_bad_seed_among_several_is_named(tmp_path):
    def iterate(state):
        state = dataclasses.replace(state, step=jnp.where(state.seed == 7, state.step, -1))
        return failing([2])(state)

    with pytest.warns(RuntimeWarning, match="the update of seed 7 at step 3 was skipped"):
        state = run(tmp_path, {**CONFIG, "seed": (3, 7)}, iteration=iterate, steps=4)
    np.testing.assert_array_equal(state.skipped, [0, 1])
    np.testing.assert_array_equal(state.step, [4, 4])


def test_bad_settings(tmp_path):
    with pytest.raises(ValueError, match="steps of stage 'train' must not be negative, got -1"):
        run(tmp_path, steps=-1)
    with pytest.raises(ValueError, match="config.checkpoint_every must be at least 1, got 0"):
        run(tmp_path / "a", {"checkpoint_every": 0})
    with pytest.raises(ValueError, match="evaluate_every must be at least 1, got 0"):
        run(tmp_path, evaluate_every=0)

    def drifting(state):
        return dataclasses.replace(state, params={**state.params, "w": state.params["w"].astype(jnp.bfloat16)}), {}

    with pytest.raises(ValueError, match=r"state.params\['w'\] goes in as float32\[3\], comes out as bfloat16\[3\]"):
        run(tmp_path, iteration=drifting)
    run(tmp_path / "b", steps=5)
    with pytest.raises(ValueError, match="checkpoint at step 5, beyond its 4 steps"):
        run(tmp_path / "b", steps=4)


def test_no_steps_evaluates_and_saves_the_start(tmp_path):
    for _ in range(2):
        state = run(tmp_path, steps=0)
        assert state.step == 0
        assert [line["step"] for line in train.read_metrics(tmp_path)] == [0]


def test_a_page_that_does_nothing_is_an_error(tmp_path, page, make_config):
    class Silent:
        @staticmethod
        def run(config, log):
            train.loop(init, iteration, steps=2, log=log)

    with pytest.raises(RuntimeError, match="2 steps were done, and run\\(\\) of the page wrote no summary"):
        train.run_page(Silent, CONFIG, tmp_path, quiet=True)
    with pytest.raises(RuntimeError, match="no step was left to do"):
        train.run_page(Silent, CONFIG, tmp_path, quiet=True)


def test_killed_before_the_summary_only_the_summary_is_made(tmp_path, page, make_config):
    config = make_config()
    summary = train.run_page(page, config, tmp_path, quiet=True)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "summary.json").unlink()
    again = train.run_page(page, config, tmp_path, quiet=True)
    assert again["trained"] == summary["trained"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
