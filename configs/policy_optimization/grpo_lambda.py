"""GRPO-lambda on sums that are easier with written steps.

`small` (default): a minute an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`: Qwen2.5-7B's
sizes, as R1's distilled model of that size has them.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, SUMS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        lam=0.2,  # share of the groups that pay for length; 0: none (GRPO), 1: all
        select="top",  # the most accurate groups; "threshold": all whose accuracy reaches `threshold`
        threshold=0.8,
        alpha=0.2,  # how much of the reward length can cost
        steps=300,
        max_length=28,
        max_turn_tokens=20,
        world=SUMS | {"shown": SUMS["shown"] | {"write_steps": 0.8, "waits": 1.5}},
    )
    arms: dict[str, dict] = {
        "small": {},
        "tiny": TINY,
        "paper": {
            **MODELS["qwen2.5-7b"],
            "max_length": 12288,
            "max_turn_tokens": 10240,
            "num_slots": 512,
            "prompts": 128,
            "group_size": 16,
            "mini_batches": 1,
            "micro_batches": 128,
            "optimizer.learning_rate": 1e-6,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
