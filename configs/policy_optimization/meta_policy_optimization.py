"""MPO on essays of a few words.

`small` (default): about a minute and a half an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests.
`paper`: Qwen2.5-1.5B's sizes, 1,000 tokens an answer, the learning rate and epochs of the released code.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        rubric="praise",  # that the run starts with: praise, oracle
        meta=True,  # whether it is rewritten
        interval=20,  # updates between meta steps
        num_samples=16,  # rollouts that a meta step sees
        max_items=5,
        tau=0.2,  # correlation with the quality from which a feature is worth counting
        total_points=4.0,
        beta=0.02,
        lam=0.95,
        value_clip=0.2,
        critic_optimizer=train.optimizer_config(1e-3, warmup_updates=5),
        world={"train_problems": 2000, "test_problems": 256},
        **{"steps": 150},
    )
    arms: dict[str, dict] = {
        "small": {"warm_start.steps": 300},
        "tiny": TINY,
        "paper": {
            **MODELS["qwen2.5-1.5b"],
            "max_length": 1512,
            "max_turn_tokens": 1000,
            "num_slots": 64,
            "prompts": 64,
            "group_size": 1,
            "mini_batches": 4,
            "micro_batches": 1,
            "optimizer.learning_rate": 3e-6,
            "critic_optimizer.learning_rate": 3e-6,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
