"""Guide-GRPO on keys whose codes a policy does not know.

`small` (default): a minute or two an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`: the 7B
run on mathematics.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        guide="failures",  # which prompts are rolled out with a hint: failures (all rollouts wrong), always, never
        correction="shaped",  # of the ratio between contexts: shaped, clipped, none
        shape="percentile",  # percentile, constant, power
        shape_value=0.9,
        max_length=16,
        max_turn_tokens=8,
        warm_start=base_config()["warm_start"] | {"steps": 600},
        world={"num_keys": 16, "num_easy": 8, "hinted": 0.5, "train_problems": 2000, "test_problems": 256},
    )
    arms: dict[str, dict] = {
        "small": {},
        "tiny": TINY,
        "paper": {
            **MODELS["qwen2.5-7b"],
            "max_length": 4096,
            "max_turn_tokens": 3072,
            "num_slots": 512,
            "prompts": 128,
            "group_size": 8,
            "micro_batches": 64,
            "optimizer.learning_rate": 1e-6,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
