"""Facial-R1 on noisy activations of action units.

`small` (default): a minute or two an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`:
Qwen2.5-7B's sizes for the language model of Qwen2.5-VL-7B.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        stages=("sft", "grpo", "synthesis"),
        unit_weight=1.0,  # of the reward for the units that are named
        agreement=0.75,  # share of a new face's labels that must be alike
        kl_coefficient=0.04,
        sft_steps=150,
        sft_rows=64,
        sft_optimizer=train.optimizer_config(2e-3, warmup_updates=10),
        steps=150,  # of GRPO, and of the synthesis
        prompts=8,
        mini_batches=1,
        optimizer=train.optimizer_config(3e-4, warmup_updates=5),
        warm_start=base_config()["warm_start"] | {"steps": 0},
        world={
            "shown": 400,  # instructions
            "wrong": 0.15,  # how often a unit in them is
            "noise": 0.3,  # of an activation
            "train_problems": 2000,
            "new_faces": 2000,  # without labels
            "test_problems": 256,
        },
    )
    tiny = {name: value for name, value in TINY.items() if not name.startswith("warm_start")}
    arms: dict[str, dict] = {
        "small": {},
        "tiny": tiny | {"stages": ("synthesis",), "prompts": 16, "sft_steps": 2, "world.new_faces": 64},
        "paper": {
            **MODELS["qwen2.5-7b"],
            "max_length": 2048,
            "max_turn_tokens": 1024,
            "prompts": 32,
            "group_size": 8,
            "micro_batches": 4,
            "sft_rows": 32,
            "optimizer.learning_rate": 2e-5,
            "sft_optimizer.learning_rate": 2e-5,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
