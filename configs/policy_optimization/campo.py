"""CAMPO on sums after which a policy may wait for ever.

`small` (default): a minute or two an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`: the 7B
run's batch and limits.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, SUMS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        repetition="subtract",  # subtract, fixed_if_truncated, none
        fixed=0.2,  # the penalty of fixed_if_truncated
        limits=(12, 24),  # of response tokens, stage by stage; the last is max_turn_tokens
        patience=30,  # steps without longer responses, until the next stage
        clip_high=0.28,
        dual_clip=10.0,
        mini_batches=1,
        max_length=32,
        max_turn_tokens=24,
        world=SUMS | {"shown": SUMS["shown"] | {"waits": 2.0, "wait_first": False, "endless": 0.2}},
    )
    arms: dict[str, dict] = {
        "small": {},
        "tiny": TINY,
        "paper": {
            **MODELS["qwen2.5-7b"],
            "limits": (16384, 32768),
            "max_length": 34816,
            "max_turn_tokens": 32768,
            "num_slots": 256,
            "prompts": 256,
            "group_size": 16,
            "micro_batches": 64,
            "optimizer.learning_rate": 1e-6,
            "optimizer.warmup_updates": 10,
            "optimizer.weight_decay": 0.1,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
