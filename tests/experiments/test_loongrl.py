"""The stages of LoongRL."""

import jax.numpy as jnp

from configs.policy_optimization.loongrl import get_config
from experiments.policy_optimization.loongrl import hard_subset, stage_of


def test_hard_subset_and_stages():
    assert hard_subset(jnp.array([0, 0.5, 7 / 8, 1.0, -1.0])).tolist() == [True, True, True, False, True]
    assert hard_subset(jnp.array([0, 0.5, 1.0]), keep_below=0.5).tolist() == [True, False, False]
    config = get_config()
    assert stage_of(config, jnp.array([0, 14, 15, 44, 45, 59])).tolist() == [0, 0, 1, 1, 2, 2]
