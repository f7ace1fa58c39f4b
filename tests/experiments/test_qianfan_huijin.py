"""The stages of QianfanHuijin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.policy_optimization.qianfan_huijin import get_config
from experiments.policy_optimization import qianfan_huijin
from experiments.policy_optimization._stages import stage_programs
from jaxrl_llm import ops


def test_worked_example_of_the_agentic_stage():
    rewards = jnp.array([0.9, -0.05, 1, 0])  # right with two calls, wrong with one, right without, wrong without
    advantages = ops.grpo_advantages(rewards, jnp.zeros(4, int), jnp.ones((4, 1), bool))[:, 0]
    # printed to six places; std + 1e-6 moves the last by 2e-6
    np.testing.assert_allclose(advantages, [0.774659, -0.907457, 0.951723, -0.818925], atol=3e-6)


def test_a_stage_that_imitates_traces_with_the_papers_settings():
    """The family's tests trace one that explores."""
    config = get_config("paper")
    program = stage_programs(config, qianfan_huijin.make_pipeline(config), "pretraining")["train"]
    after, metrics = jax.eval_shape(program.function, **program.arguments)
    assert jax.tree.map(jnp.shape, program.arguments["state"]) == jax.tree.map(jnp.shape, after)
    assert metrics["loss"].shape == ()


def test_only_stages_that_there_are():
    config = get_config("tiny")
    config.stages = ("pretraining", "alignment")
    with pytest.raises(ValueError, match="must be one of pretraining, sft, reasoning, agentic, general"):
        qianfan_huijin.make_pipeline(config)
