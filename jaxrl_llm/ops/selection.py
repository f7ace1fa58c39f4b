"""Which samples to train on."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.ops._checks import check_shapes
from jaxrl_llm.ops.groups import group_spread_mask


def dynamic_sampling_mask(
    rewards: Float[Array, "B"], group_ids: Int[Array, "B"], valid: Bool[Array, "B"] | None = None
) -> Bool[Array, "B"]:
    """DAPO's dynamic sampling (Yu et al. 2025, section 3.2): true for the members of a group whose rewards are not all
    equal, the others having no gradient to give. A sample that is not valid decides nothing and is not kept."""
    check_shapes(rewards=(rewards, "B"), group_ids=(group_ids, "B"), valid=(valid, "B"))
    return group_spread_mask(rewards, group_ids, valid)
