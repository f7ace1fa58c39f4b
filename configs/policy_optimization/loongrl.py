"""LoongRL on windows of 64 tokens, tested on up to 256.

`small` (default): a minute or two an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`:
Qwen2.5-7B, windows of 16K tokens; the window of our world ends at 256, prompts are padded to the paper's.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import LONG_MODEL, MODELS, TINY, base_config
from jaxrl_llm import train

ALL = {"keychain": 0.4, "qa": 0.4, "needle": 0.2}


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        warmup_steps=15,  # without KeyChain
        hard_from=45,  # from here on only problems that are not always solved
        kl_coefficient=0.001,
        model=LONG_MODEL,
        max_length=264,
        max_turn_tokens=8,
        prompts=8,
        mini_batches=1,
        steps=60,
        evaluate_every=30,
        optimizer=train.optimizer_config(5e-4, warmup_updates=3),
        warm_start=base_config()["warm_start"] | {"steps": 200, "rows": 16, "row_length": 136},
        world={
            "train": {"windows": (64,), "mix": {"keychain": 0.45, "qa": 0.45, "needle": 0.1}},
            "test": {"windows": (64, 128, 256), "mix": {"keychain": 0.5, "qa": 0.5}},
            "shown": {"windows": (20, 40, 64), "mix": ALL},
            "stop": 0.4,
            "train_problems": 128,
            "test_problems": 384,
        },
    )
    arms: dict[str, dict] = {
        "small": {},
        "tiny": TINY | {"model.num_layers": 2},  # an induction head has two
        "paper": {
            **MODELS["qwen2.5-7b"],
            "max_length": 20_480,
            "max_turn_tokens": 4096,
            "num_slots": 256,
            "prompts": 256,
            "world.train_problems": 1024,
            "group_size": 8,
            "mini_batches": 2,
            "micro_batches": 64,
            "optimizer.learning_rate": 1e-6,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
