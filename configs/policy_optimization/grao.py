"""GRAO on preferred strings, from a policy that knows nothing.

`small` (default): a minute or two an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`: the
run on helpful and harmless answers with Qwen2.5-7B.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        explore=1.0,  # weight of the policy's own samples
        beta=0.5,  # of the reference answer
        lam=0.6,  # of the gap between the two
        only_imitate=False,  # supervised fine-tuning on the reference
        include_reference=False,  # in the group's mean and standard deviation
        sd_floor=0.1,
        advantage_clip=5.0,
        max_length=16,
        max_turn_tokens=8,
        mini_batches=1,
        steps=400,
        warm_start=base_config()["warm_start"] | {"steps": 0},
        optimizer=train.optimizer_config(1e-3, warmup_updates=5),
        world={"train_problems": 2000, "test_problems": 256},
    )
    arms: dict[str, dict] = {
        "small": {},
        "tiny": {name: value for name, value in TINY.items() if not name.startswith("warm_start")},
        "paper": {
            **MODELS["qwen2.5-7b"],
            "max_length": 4096,
            "max_turn_tokens": 2048,
            "decoding.temperature": 0.7,
            "num_slots": 512,
            "prompts": 64,
            "group_size": 8,
            "micro_batches": 1,
            "optimizer.learning_rate": 1e-6,
            "optimizer.weight_decay": 0.01,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
