"""M-GRPO on sums of values that have to be looked up.

`small` (default): a minute an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`: the released
code's groups and optimizer, with Qwen2.5-32B's sizes for each of the two agents, in place of Qwen3-30B-A3B's.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        agents="both",  # are trained; or frozen_sub, single
        aligned=2,  # calls of each rollout that the sub-agent is trained on; 0: those that there were
        clip_high=0.28,
        max_length=24,
        max_turn_tokens=6,
        prompts=8,
        mini_batches=1,
        steps=100,
        optimizer=train.optimizer_config(5e-4, warmup_updates=5),
        world={"train_problems": 4096, "test_problems": 256, "wrong": 0.25},
    )
    arms: dict[str, dict] = {
        "small": {},
        "tiny": TINY,
        "paper": {
            **MODELS["qwen2.5-32b"],
            "max_length": 16384,
            "max_turn_tokens": 8192,
            "num_slots": 64,
            "prompts": 32,
            "group_size": 8,
            "micro_batches": 8,
            "optimizer.learning_rate": 1e-6,
            "optimizer.b2": 0.98,
            "optimizer.weight_decay": 0.1,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
