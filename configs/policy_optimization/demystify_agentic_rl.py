"""GRPO-TCR on sums with a calculator.

`small` (default): a minute or two an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`: its
batch and limits, with Qwen2.5-3B's sizes in place of Qwen3-4B's.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        tool_bonus={"per_round": 0.1, "cap": -0.6},  # 0 and -1: none
        overlong={"buffer": 8, "factor": 1.0},  # buffer 0: none
        model_aware=True,  # only problems that the policy before training solves in some of its tries
        tries=8,
        clip_high=0.28,
        dual_clip=10.0,
        max_length=46,
        max_turns=5,
        max_turn_tokens=6,
        steps=100,
        world={
            "terms": (2, 3, 4, 7),  # seven terms take six calls, and there are four
            "modulus": 20,
            "train_problems": 512,
            "test_problems": 256,
            "shown": {"use_tool": 0.4, "wrong": 0.2},
        },
    )
    arms: dict[str, dict] = {
        "small": {},
        "tiny": TINY | {"tries": 2},
        "paper": {
            **MODELS["qwen2.5-3b"],
            "overlong.buffer": 4096,
            "max_length": 23040,
            "max_turns": 16,
            "max_turn_tokens": 8192,
            "num_slots": 512,
            "prompts": 64,
            "group_size": 16,
            "mini_batches": 4,
            "micro_batches": 4,
            "optimizer.learning_rate": 1e-6,
            "world.train_problems": 30_000,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
