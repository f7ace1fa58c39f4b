"""The page of Search-R1 at tiny size."""

import hashlib
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.kill_resume import final_arrays, start
from configs.agentic_search.search_r1 import get_config
from experiments import export
from experiments.agentic_search import _geography, search_r1
from jaxrl_llm import models, train
from jaxrl_llm.train.config import override
from tests.train.test_kill import start_two


def config_of(arm="tiny", **overrides):
    config = get_config(arm)
    for key, value in overrides.items():
        override(config, key.replace("__", "."), value)
    return config


def shapes_of_an_iteration(config):
    """Traces one iteration without running it."""
    agent, optimizer = _geography.make_agent(config), search_r1.make_optimizers(config)
    sample, update = search_r1.make_sample(config), search_r1.make_update(config, agent, optimizer)

    def start_and_iterate(key):
        policy = agent.policy.init(key)
        params = {"policy": policy}
        if config.algorithm == "ppo":
            params["critic"] = {"decoder": policy, "head": agent.init_head(key)}
        state = train.init_state(params, optimizer, 0, ref_params=policy)
        return state, update(state, sample(lambda: (policy, 0), 0, 0))

    return jax.eval_shape(start_and_iterate, jax.random.key(0))


def test_run(tmp_path):
    config = config_of()
    summary = train.run_page(search_r1, config, tmp_path / "run", quiet=True)
    for name in ("warm_start", "trained", "no_search"):
        assert set(summary[name]["success"]) == {"1", "2"}
        assert all(0 <= value <= 1 for value in summary[name]["success"].values())
    assert summary["minutes"] > 0 and summary["warm_start"]["kl"] == 0
    lines = train.read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines[1:]:
        assert line["sampler_mismatch"] < 1e-3, "sampler and trainer are one model: the first ratio is 1"
        assert np.isfinite(line["loss"]) and line["skipped"] == 0 and line["grad_norm"] >= 0
    assert lines[-1]["eval/success/2"] == pytest.approx(summary["trained"]["success"]["2"])
    rollouts = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 16 and {span["role"] for r in rollouts for span in r["spans"]} == {
        "prompt",
        "policy",
        "observation",
    }
    assert np.mean([r["reward"] for r in rollouts if r["hops"] == 2]) == pytest.approx(
        summary["trained"]["success"]["2"]
    )
    assert (tmp_path / "run" / "figures" / "learning_curve.png").stat().st_size > 10_000

    assert export.main([f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'policy'}"]) == 0
    exported = models.load(tmp_path / "policy")
    trained = export.read_policy(tmp_path / "run" / "checkpoints" / "train" / "3")
    jax.tree.map(np.testing.assert_array_equal, exported.params, trained)
    assert json.loads((tmp_path / "policy" / "config.json").read_text())["model_type"] == "qwen2"
    assert export.main([f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'other'}", "--step=1"]) == 2


@pytest.mark.slow
def test_two_processes_train_to_the_parameters_of_one(tmp_path):
    overrides = {"mesh.data": "2"}
    assert start("search_r1:tiny", {}, tmp_path / "one").wait() == 0
    processes = start_two("search_r1:tiny", overrides, tmp_path / "two")
    assert [process.wait() for process in processes] == [0, 0], (tmp_path / "two.log").read_text()
    lines = [train.read_metrics(tmp_path / name) for name in ("one", "two")]
    for one, two in zip(*lines, strict=True):
        for name in ("reward", "turns", "tokens", "eval/success"):  # the very same episodes
            assert one.get(name) == two.get(name)
    expected, got = final_arrays(tmp_path / "one"), final_arrays(tmp_path / "two")
    assert expected.keys() == got.keys()
    for name, array in expected.items():
        # Adam moves a parameter by its rate, here 6e-4 in all, whatever the size of its gradient: where that is near
        # 0 the rounding of float32 sums in another order shows. 2e-5 was seen.
        np.testing.assert_allclose(got[name], array, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("arm", [name for name in search_r1.TABLES["main"].arms if name not in ("grpo", "warm_start")])
def test_arms_trace(arm):
    overrides = dict(search_r1.TABLES["main"].arms[arm])
    if arm == "ppo":
        overrides["prompts"] = 16
    before, (after, metrics) = shapes_of_an_iteration(
        config_of(**{key.replace(".", "__"): v for key, v in overrides.items()})
    )
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
    assert {"loss", "kl", "entropy", "clip_fraction", "success/1", "success/2"} <= metrics.keys()


def test_paper_settings_trace():
    """Two layers of the 36, which are all alike; the size is that of all."""
    _, (_, metrics) = shapes_of_an_iteration(config_of("paper", model__num_layers=2))
    assert metrics["loss"].shape == ()
    params = jax.eval_shape(_geography.make_agent(config_of("paper")).policy.init, jax.random.key(0))
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) > 2e9


def test_rollouts_of_older_weights_are_weighted():
    """The ratio is taken to the weights of now, and a truncated weight stands for the step from then to now."""
    config = config_of(distributed__workers=2, distributed__importance_cap=1.01)
    agent = _geography.make_agent(config)
    then = _geography.warm_start(config, agent.policy, None)
    now = jax.tree.map(lambda leaf: leaf * 1.03, then)
    sampled, _ = search_r1.make_sample(config)(lambda: (then, 4), 0, 7)
    state = train.init_state({"policy": now}, search_r1.make_optimizers(config), 0, ref_params=then)
    batch = jax.jit(partial(search_r1.make_batch, config, agent))(state, sampled)
    ratio = np.exp(np.asarray(batch.old_logprobs) - np.asarray(sampled.logprobs))[sampled.mask]
    weights = np.asarray(batch.weights)[sampled.mask]
    np.testing.assert_allclose(weights, np.minimum(ratio, 1.01), rtol=1e-5)  # an exponential in float32
    assert np.any(ratio > 1.01) and np.any(ratio < 0.9) and np.all(sampled.versions[sampled.mask] == 4)
    fresh = jax.jit(partial(search_r1.make_batch, config, agent))(
        train.init_state({"policy": then}, search_r1.make_optimizers(config), 0, ref_params=then), sampled
    )
    # sampler and trainer are the same model: what is left is the rounding of two orders of summation
    np.testing.assert_allclose(np.asarray(fresh.weights)[sampled.mask], 1, atol=1e-4)


def test_warm_start_from_scratch(tmp_path):
    """What is trained, what its file holds and what a later run reads are the same numbers."""
    scratch = {"warm_start__from_scratch": True, "warm_start__steps": 2, "warm_start__rows": 4}
    config = config_of(**scratch, warm_start__optimizer__warmup_updates=0)
    model = _geography.make_agent(config).policy
    with train.RunLog(tmp_path, config, quiet=True) as log:
        made = _geography.warm_start(config, model, log)
        read = _geography.warm_start(
            config_of(warm_start__weights=str(tmp_path / "warm_start.safetensors")), model, log
        )
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(read), strict=True))


def test_shipped_weights_are_those_recorded():
    record = json.loads(_geography.WEIGHTS.with_suffix(".json").read_text())
    assert hashlib.sha256(_geography.WEIGHTS.read_bytes()).hexdigest() == record["sha256"]
    assert _geography.WEIGHTS.stat().st_size <= 4_000_000
    assert "--config.warm_start.from_scratch=True" in record["command"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"algorithm": "dpo"}, "algorithm must be 'grpo' or 'ppo', got 'dpo'"),
        ({"group_size": 1}, "group_size=1 with algorithm='grpo'"),
        ({"mini_batches": 3}, "mini_batches=3 must divide prompts=4"),
        ({"micro_batches": 3}, "micro_batches=3 must divide the 2 prompts"),
        ({"seed": (0, 1), "warm_start__from_scratch": True}, "run it once with one seed"),
    ],
)
def test_bad_settings(overrides, message):
    with pytest.raises(ValueError, match=message):
        search_r1.check_config(config_of(**overrides))


def test_prompt_longer_than_the_context():
    with pytest.raises(ValueError, match="leave no room in max_length=20"):
        shapes_of_an_iteration(config_of(max_length=20))
