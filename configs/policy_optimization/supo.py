"""SUPO on a ledger of 20 updates, in a window of 32 tokens.

`small` (default): a minute or two an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`:
CodeGym's window of 4K and up to 8 pieces, with Qwen2.5-32B's sizes.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        memory="summary",  # what the next context begins with: summary, truncate (the newest updates)
        max_summaries=5,  # in an episode; a ledger of 20 updates takes four
        test_summaries=5,
        train_summaries=True,
        mask_unfinished=True,
        mask_from_baseline=False,
        loss_norm="token",  # token, rollout
        max_length=32,  # the window
        max_turns=8,
        max_turn_tokens=10,
        prompts=8,
        num_slots=64,
        mini_batches=1,
        optimizer=train.optimizer_config(5e-4, warmup_updates=5),
        warm_start=base_config()["warm_start"] | {"row_length": 96},
        steps=60,
        evaluate_every=20,
        world={"updates": 20, "test_updates": 20, "train_problems": 4096, "test_problems": 256, "wrong": 0.2},
    )
    arms: dict[str, dict] = {
        "small": {},
        "tiny": TINY,
        "paper": {
            **MODELS["qwen2.5-32b"],
            "max_summaries": 7,
            "test_summaries": 7,
            "max_length": 4096,
            "max_turns": 64,
            "max_turn_tokens": 512,
            "num_slots": 64,
            "prompts": 32,
            "micro_batches": 16,  # of 128 pieces
            "optimizer.learning_rate": 1e-6,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
