"""Which policy acts in NLPO."""

import pytest

from configs.policy_optimization.nlpo import get_config
from experiments.policy_optimization.nlpo import acting_policy, build
from jaxrl_llm.train.config import override


def test_without_a_mask_the_policy_itself_acts():
    config, model, policy, masking = get_config("tiny"), object(), object(), object()
    override(config, "top_p", 1.0)
    assert acting_policy(config, model, policy, masking) == (model, policy)


def test_bad_refresh():
    config = get_config("tiny")
    override(config, "refresh", -1)
    with pytest.raises(ValueError, match="refresh must be a number of iterations, 0 for never, got -1"):
        build(config)
