"""QianfanHuijin on a ledger of companies, some of whose figures only a tool tells.

`small` (default): three minutes an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`: its
model and settings are not known; Qwen2.5-7B's sizes and a common batch stand in.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        stages=("pretraining", "sft", "reasoning", "agentic", "general"),
        general_text=True,  # in pretraining, as much as of the trade's
        call_cost=0.05,  # of a call of the tool, in the agentic stage
        style_share=0.5,  # of a right answer's reward, in the general stage
        max_turns=4,
        sft_steps=100,
        sft_rows=64,
        sft_optimizer=train.optimizer_config(2e-3, warmup_updates=10),
        steps=150,  # of each stage of reinforcement learning
        prompts=8,
        mini_batches=1,
        optimizer=train.optimizer_config(3e-4, warmup_updates=5),
        warm_start=base_config()["warm_start"] | {"steps": 300},
        world={
            "num_known": 24,  # companies whose figures stand in texts
            "num_unknown": 8,
            "train_problems": 400,  # of the 576 pairs of known companies
            "train_lookups": 128,  # of the 192 pairs of a known one and another
            "shown": 100,  # sums in the demonstrations, with half as many that need the tool
            "test_problems": 128,  # of each capability
        },
    )
    tiny = {
        "stages": ("agentic",),
        "sft_steps": 2,
        "sft_rows": 16,
        "world.num_known": 9,
        "world.num_unknown": 4,
        "world.train_lookups": 8,
    }
    arms: dict[str, dict] = {
        "small": {},
        "tiny": TINY | tiny | {"prompts": 16, "world.shown": 24, "world.test_problems": 32},
        "paper": {
            **MODELS["qwen2.5-7b"],
            "max_length": 8192,
            "max_turn_tokens": 4096,
            "max_turns": 8,
            "num_slots": 512,
            "prompts": 128,
            "group_size": 8,
            "micro_batches": 64,
            "sft_rows": 128,
            "kl_coefficient": 0.001,
            "optimizer.learning_rate": 1e-6,
            "sft_optimizer.learning_rate": 1e-5,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
