"""R2D on requests with forbidden pairs of words.

`small` (default): under a minute an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`: LoRA of
rank 64 on Qwen2.5-7B's sizes, 32 rows an update; one of the six models of the paper stands for all.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        group_size=1,  # rows are shown, not sampled
        pivots=True,
        scheme="binary",  # of the pivots: binary, rethink, guard
        contrast=1.0,  # weight of CPO
        lora_rank=0,  # 0: all weights are trained
        lora_alpha=64.0,
        model=base_config()["model"] | {"width": 48, "ffn_width": 192},
        max_length=15,
        prompts=64,  # rows of an update
        mini_batches=1,
        steps=300,
        warm_start=base_config()["warm_start"] | {"steps": 0},
        optimizer=train.optimizer_config(1e-3),
        world={"train_problems": 1500, "test_problems": 600, "harmful": 0.08, "synonyms": 0.3},
    )
    tiny = {name: value for name, value in TINY.items() if not name.startswith("warm_start")}
    arms: dict[str, dict] = {
        "small": {},
        "tiny": tiny | {"prompts": 16, "model.width": 64, "model.ffn_width": 256},
        "paper": {
            **MODELS["qwen2.5-7b"],
            "lora_rank": 64,
            "max_length": 2048,
            "prompts": 32,
            "steps": 1000,
            "optimizer.learning_rate": 2e-4,
            "optimizer.schedule": "cosine",
            "optimizer.warmup_updates": 20,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
