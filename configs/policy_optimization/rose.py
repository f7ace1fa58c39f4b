"""ROSE on ways from 0 to a number.

`small` (default): a minute or two an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`:
Qwen2.5-7B's sizes in place of Qwen3-8B.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        branching="dissimilarity",  # what a branch is chosen by: dissimilarity, released, entropy; none: no branches
        eps=0.5,  # chance that a rollout begins anew
        candidates=20,  # likeliest tokens that a score looks at
        advantages="tree",  # tree, grpo
        length_exponent=0.0,  # lambda of the length term; 0: none
        power_outside=False,  # (1 - ratio)^lambda, as the paper has it, for 1 - ratio^lambda
        agg="const",
        kl_coefficient=0.001,
        group_size=10,
        max_length=12,
        world={"train_problems": 2000, "test_problems": 256, "wrong": 0.6},
        **{"steps": 80},
    )
    arms: dict[str, dict] = {
        "small": {},
        "tiny": TINY | {"group_size": 4},
        "paper": {
            **MODELS["qwen2.5-7b"],
            "max_length": 6144,
            "max_turn_tokens": 4096,
            "num_slots": 512,
            "prompts": 512,
            "group_size": 8,
            "mini_batches": 64,
            "micro_batches": 1,
            "length_exponent": 1.0,
            "optimizer.learning_rate": 1e-6,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
