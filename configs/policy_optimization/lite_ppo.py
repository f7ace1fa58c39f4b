"""Lite PPO on sums of which most are easy.

`small` (default): under a minute an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`:
Qwen2.5-7B's sizes in place of Qwen3-8B's base model, 128 prompts of 8 rollouts.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, SUMS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        mean_level="group",  # none, group, batch
        std_level="batch",  # none, group, batch
        reward_scale=1.0,
        drop_truncated=False,  # overlong filtering: a response that did not end is left out of the loss
        # three in four sums have two terms, which the warm start mostly gets right
        world=SUMS | {"terms": (2, 2, 2, 4), "shown": SUMS["shown"] | {"wrong": 0.2}},
    )
    arms: dict[str, dict] = {
        "small": {},
        "tiny": TINY,
        "paper": {
            **MODELS["qwen2.5-7b"],
            "max_length": 6144,
            "max_turn_tokens": 4096,
            "num_slots": 1024,
            "prompts": 128,
            "group_size": 8,
            "mini_batches": 1,
            "micro_batches": 64,
            "optimizer.learning_rate": 1e-6,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
