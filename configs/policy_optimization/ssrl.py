"""SSRL on questions of two hops about facts.

`small` (default): about a minute an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`:
Llama-3.1-8B, 256 prompts of 5 rollouts with up to 4,096 tokens.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        search="self",  # in training: self (the policy writes what it would find), real
        test_search="self",  # on held-out questions: self, real, entropy (real where the query's entropy rises)
        mask_information=True,  # leave the information that the policy wrote out of the loss
        direct=False,  # ask for an answer without searches
        kl_coefficient=0.001,
        max_length=44,
        max_turns=4,
        max_turn_tokens=14,
        steps=60,
        evaluate_every=20,
        warm_start=base_config()["warm_start"] | {"steps": 600, "row_length": 96},
        world={
            "num_entities": 64,
            "num_relations": 4,
            "train_problems": 768,
            "test_problems": 256,
            "shown": {"known": 0.85, "wrong": 0.15, "skip": 0.3, "direct": 0.5},
        },
    )
    arms: dict[str, dict] = {
        "small": {},
        "tiny": TINY,
        "paper": {
            **MODELS["llama3.1-8b"],
            "max_length": 5120,
            "max_turn_tokens": 4096,
            "num_slots": 512,
            "prompts": 256,
            "group_size": 5,
            "mini_batches": 4,
            "micro_batches": 5,
            "optimizer.learning_rate": 1e-6,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
