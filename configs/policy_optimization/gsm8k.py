"""GRPO on GSM8K.

`small` (default): a policy made here learns the problems in the checkout; minutes on two CPU cores. `tiny`: seconds,
for tests. `paper`: no paper's, but the recipe that verl publishes for GSM8K (Qwen2.5-7B-Instruct in place of
Qwen2-7B's), with the model and the data from the hub.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        checkpoint=None,  # a folder or a hub id; None: a policy of `model`'s sizes is made
        dtype="float32",  # of parameters and cache
        vocab_size=1024,  # of the policy made here, and of what `experiments.plan` compiles
        train_data=None,  # a file, a folder, or a hub id; None: what is in the checkout
        test_data=None,
        data_config=None,  # of the data set on the hub
        eval_problems=64,
        max_length=384,
        max_turn_tokens=160,
        num_slots=64,
        steps=40,
        optimizer=train.optimizer_config(3e-4, warmup_updates=5),
        warm_start={
            "seed": 0,
            "steps": 200,
            "rows": 8,
            "optimizer": train.optimizer_config(3e-3, schedule="cosine", warmup_updates=20, final_fraction=0.1),
        },
    )
    arms: dict[str, dict] = {
        "small": {},
        "tiny": {key: value for key, value in TINY.items() if not key.startswith("world.")}
        | {
            "eval_problems": 4,
            "prompts": 4,
            "group_size": 2,
            "model.num_layers": 1,
            "max_length": 640,
            "max_turn_tokens": 16,
        },
        "paper": {
            **MODELS["qwen2.5-7b"],
            "checkpoint": "Qwen/Qwen2.5-7B-Instruct",
            "dtype": "bfloat16",
            "train_data": "openai/gsm8k",
            "test_data": "openai/gsm8k",
            "data_config": "main",
            "eval_problems": 1319,
            "max_length": 1536,
            "max_turn_tokens": 1024,
            "num_slots": 1024,
            "steps": 105,
            "prompts": 1024,
            "group_size": 5,
            "mini_batches": 4,
            "micro_batches": 20,
            "kl_coefficient": 0.001,
            "optimizer.learning_rate": 1e-6,
            "warm_start.steps": 0,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
