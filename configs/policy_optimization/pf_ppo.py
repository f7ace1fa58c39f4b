"""PF-PPO on sums with a reward model that errs in the middle of its range.

`small` (default): a minute or two an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`:
Qwen2.5-7B's sizes in place of deepseek-coder-6.7B, 5 responses a prompt.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, SUMS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        strategy="best_worst",  # best_worst, best_random, best, power, all
        group_size=5,
        keep=5,  # responses of a prompt that are trained on, drawn with the strategy's weights
        error=0.5,  # size of the reward model's error where it is largest; at 1 a wrong answer may please it most
        lam=1.0,
        value_clip=0.2,
        critic_optimizer=train.optimizer_config(1e-3, warmup_updates=5),
        world=SUMS,
    )
    arms: dict[str, dict] = {
        "small": {},
        "tiny": TINY,
        "paper": {
            **MODELS["qwen2.5-7b"],
            "max_length": 2048,
            "max_turn_tokens": 1024,
            "num_slots": 512,
            "prompts": 512,
            "mini_batches": 4,
            "micro_batches": 20,
            "optimizer.learning_rate": 5e-7,
            "critic_optimizer.learning_rate": 9e-6,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
