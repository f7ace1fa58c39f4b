"""FunReason on calls of eight functions behind long thoughts.

`small` (default): a minute or two an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`:
Qwen2.5-Coder-7B's sizes, 512 rows an update, ten rounds; number of updates and length of rows are ours.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        group_size=1,  # rows are shown, not sampled
        balance="fixed",  # token (plain fine-tuning), fixed, learned, length
        alpha=0.7,  # weight of the thoughts
        rounds=0,  # on the hard pool, behind the fine-tuning
        round_steps=67,
        candidates=4,  # calls written for a query and round
        judge_error=0.1,  # how often each of the three judges errs
        max_length=44,
        max_turn_tokens=39,
        prompts=64,  # rows of an update
        mini_batches=1,
        steps=300,
        optimizer=train.optimizer_config(1e-3, warmup_updates=20),
        warm_start=base_config()["warm_start"] | {"steps": 300, "rows": 16},
        world={"train_problems": 2000, "test_problems": 256},
    )
    arms: dict[str, dict] = {
        "small": {},
        "tiny": TINY | {"prompts": 16, "rounds": 1, "round_steps": 1},
        "paper": {
            **MODELS["qwen2.5-7b"],
            "max_length": 2048,
            "max_turn_tokens": 1024,
            "num_slots": 512,
            "prompts": 512,
            "micro_batches": 8,
            "steps": 500,
            "rounds": 10,
            "optimizer.learning_rate": 4e-5,
            "optimizer.warmup_updates": 25,
            "world.train_problems": 1000,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
