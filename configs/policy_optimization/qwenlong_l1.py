"""QwenLong-L1 on windows of 64, then 192 tokens.

`small` (default): a minute or two an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`:
Qwen2.5-32B's sizes (R1-Distill-Qwen-32B), 128 prompts of 8 rollouts with 10,000 tokens behind up to 60K of input; the
windows of our world are shorter.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import LONG_MODEL, MODELS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        limits=(64, 192),  # longest input of each phase
        phase_starts=(0, 30),  # the step that each begins with
        past_fraction=0.25,  # of a batch: samples of earlier phases
        model=LONG_MODEL,
        max_length=200,
        max_turn_tokens=8,
        prompts=8,
        mini_batches=1,
        steps=60,
        evaluate_every=15,
        optimizer=train.optimizer_config(1e-4, warmup_updates=3),
        warm_start=base_config()["warm_start"] | {"steps": 200, "rows": 16, "row_length": 136},
        world={
            "train": {"windows": (64, 192), "mix": {"qa": 1.0}},
            "test": {"windows": (64, 192), "mix": {"qa": 1.0}},
            "shown": {"windows": (20, 40, 64), "mix": {"qa": 0.7, "needle": 0.3}},
            "stop": 0.6,
            "train_problems": 256,
            "test_problems": 256,
        },
    )
    arms: dict[str, dict] = {
        "small": {},
        "tiny": TINY | {"phase_starts": (0, 1), "model.num_layers": 2},  # an induction head has two
        "paper": {
            **MODELS["qwen2.5-32b"],
            "max_length": 70_000,
            "max_turn_tokens": 10_000,
            "num_slots": 256,
            "decoding.temperature": 0.7,
            "decoding.top_p": 0.95,
            "prompts": 128,
            "group_size": 8,
            "mini_batches": 4,
            "micro_batches": 1,
            "optimizer.learning_rate": 2e-6,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
