"""The stages of QianfanHuijin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.policy_optimization.qianfan_huijin import get_config
from experiments.policy_optimization import qianfan_huijin
from jaxrl_llm import ops, train


def test_worked_example_of_the_agentic_stage():
    rewards = jnp.array([0.9, -0.05, 1, 0])  # right with two calls, wrong with one, right without, wrong without
    advantages = ops.grpo_advantages(rewards, jnp.zeros(4, int), jnp.ones((4, 1), bool))[:, 0]
    # printed to six places; std + 1e-6 moves the last by 2e-6
    np.testing.assert_allclose(advantages, [0.774659, -0.907457, 0.951723, -0.818925], atol=3e-6)


def test_stages_trace_with_the_papers_settings():
    pipeline = qianfan_huijin.make_pipeline(get_config("paper"))
    assert [stage.name for stage in pipeline.stages] == list(qianfan_huijin.STAGES)
    for stage in pipeline.stages[1:3]:  # one that imitates and one that explores; the others differ in their data

        def start_and_iterate(key, stage=stage):
            params = {"policy": pipeline.model.init(key)}
            state = train.init_state(params, stage.optimizer, 0, ref_params=params if stage.reference else None)
            return state, stage.iteration(state, stage.data)

        before, (after, metrics) = jax.eval_shape(start_and_iterate, jax.random.key(0))
        assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
        assert metrics["loss"].shape == ()
        assert ("kl" in metrics) == (stage.name == "reasoning")


def test_only_stages_that_there_are():
    config = get_config("tiny")
    config.stages = ("pretraining", "alignment")
    with pytest.raises(ValueError, match="must be one of pretraining, sft, reasoning, agentic, general"):
        qianfan_huijin.make_pipeline(config)
