"""Sources of rollouts, without Ray: the in-process form, what goes with both, and the bookkeeping of the other."""

import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import distributed, train
from jaxrl_llm.distributed import rollout_capacity
from jaxrl_llm.sampling import join_rollouts
from jaxrl_llm.train.config import load_module, override

page = load_module(Path(__file__).with_name("bandit_page.py"))


def config_of(**overrides):
    config = page.get_config()
    for key, value in overrides.items():
        override(config, key.replace("__", "."), value)
    return config


def test_a_page_runs_in_one_process(tmp_path):
    summary = train.run_page(page, config_of(steps=30, checkpoint_every=15), tmp_path, quiet=True)
    assert np.argmax(summary["logits"]) == page.ARMS - 1
    lines = train.read_metrics(tmp_path)
    assert [line["staleness_max"] for line in lines] == [0] * 30, "each step samples under its own weights"
    assert not (tmp_path / "rollouts").exists()


def test_several_seeds_in_one_run(tmp_path):
    def make_sample(config):
        def play(params, seed, number):
            return page.play(params, jax.random.fold_in(jax.random.key(seed), number), 0)

        return distributed.device_sampler(play, config.seed)

    config = config_of(seed=(0, 1))
    with train.RunLog(tmp_path, config, quiet=True) as log, distributed.source(make_sample, steps=2, log=log) as found:
        found.publish({"logits": jnp.zeros((2, page.ARMS))}, 3)
        taken = found.take(0)
    assert taken.samples.tokens.shape == (2, page.ROWS, 2)
    assert not np.array_equal(taken.samples.tokens[0], taken.samples.tokens[1])
    assert np.array_equal(np.unique(taken.samples.versions), [-1, 3])


def test_rollouts_of_a_step_are_joined(tmp_path):
    config = config_of(distributed__rollouts_per_step=3)
    with (
        train.RunLog(tmp_path, config, quiet=True) as log,
        distributed.source(page.make_sample, steps=2, log=log) as it,
    ):
        it.publish({"logits": jnp.zeros(page.ARMS)}, 0)
        joined = it.take(1).samples
        sample = page.make_sample(config)
        parts = [sample(lambda: ({"logits": jnp.zeros(page.ARMS)}, 0), 0, number) for number in (3, 4, 5)]
    assert np.array_equal(joined.tokens, np.concatenate([part.tokens for part in parts]))
    assert np.array_equal(joined.group_ids, np.repeat([0, 1, 2], page.ROWS)), "each keeps its groups"
    pair = distributed.join_samples([(parts[0], jnp.arange(2)), (parts[1], jnp.arange(3))])
    assert pair[0].tokens.shape == (2 * page.ROWS, 2) and np.array_equal(pair[1], [0, 1, 0, 1, 2])


def test_parents_and_episodes_of_joined_rollouts_keep_to_their_own():
    one = page.play({"logits": jnp.zeros(page.ARMS)}, jax.random.key(0), 0)
    parent = jnp.array([-1, 0] * (page.ROWS // 2))
    one = one.__class__(**{**vars(one), "parent": parent, "rollout_ids": jnp.arange(page.ROWS)})
    joined = join_rollouts([one, one])
    assert np.array_equal(joined.parent, [-1, 0] * (page.ROWS // 2) + [-1, page.ROWS] * (page.ROWS // 2))
    assert np.array_equal(joined.rollout_ids, np.arange(2 * page.ROWS))
    with pytest.raises(ValueError, match="some of the rollouts have parent"):
        join_rollouts([one, one.__class__(**{**vars(one), "parent": None})])


def test_staleness_counts_the_tokens_of_the_policy():
    rollout = page.play({"logits": jnp.zeros(page.ARMS)}, jax.random.key(0), jnp.arange(page.ROWS)[:, None])
    ages = distributed.staleness((rollout, jnp.zeros(3)), 8)
    assert ages["staleness"] == np.mean(8 - np.arange(page.ROWS)) and ages["staleness_max"] == 8
    assert distributed.staleness(jnp.zeros(3), 8) == {}


def test_capacity_by_hand():
    limits = {"max_staleness": 2, "batch": 4, "max_concurrent": 16}
    assert rollout_capacity(0, 0, 0, **limits) == 12  # the updates 0, 1 and 2
    assert rollout_capacity(0, 8, 3, **limits) == 1
    assert rollout_capacity(0, 8, 4, **limits) == 0
    assert rollout_capacity(1, 8, 4, **limits) == 4
    assert rollout_capacity(9, 0, 10, **limits) == 6  # no more than 16 at a time


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_no_rollout_gets_older_than_the_bound(max_staleness):
    """Workers of random speed, a trainer that takes what began first: nothing is ever too old, and nobody is stuck."""
    rng, batch, steps = random.Random(max_staleness), 2, 40
    running, ready, accepted, version = [], [], 0, 0
    while version < steps:
        while rollout_capacity(
            version, accepted, len(running), max_staleness=max_staleness, batch=batch, max_concurrent=5
        ):
            running.append(version)
        if running and rng.random() < 0.7:
            ready.append(running.pop(0))
            accepted += 1
        if len(ready) >= batch:
            taken, ready = sorted(ready)[:batch], sorted(ready)[batch:]
            assert version - min(taken) <= max_staleness
            version += 1


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"distributed__workers": -1}, "config.distributed.workers must be at least 0, got -1"),
        ({"distributed__rollouts_per_step": 0}, "rollouts_per_step must be at least 1"),
        ({"seed": (0, 1), "distributed__workers": 2}, "several seeds in one run need config.distributed.workers=0"),
    ],
)
def test_bad_settings(tmp_path, overrides, message):
    with train.RunLog(tmp_path, config_of(**overrides), quiet=True) as log, pytest.raises(ValueError, match=message):
        distributed.source(page.make_sample, steps=1, log=log)


def test_unknown_setting():
    with pytest.raises(ValueError, match=r"unknown settings \['worker_count'\] of distributed; there are workers"):
        distributed.settings(worker_count=2)
