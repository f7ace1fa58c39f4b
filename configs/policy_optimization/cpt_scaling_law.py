"""Continual pre-training on chunks of known rules, new rules and noise.

`small` (default): a minute or two an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`:
Qwen2.5-7B's sizes; the paper's model and constants are not known.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        group_size=1,  # rows are shown, not sampled
        selection="dos",  # dos, dos_spread (with the optimum's spread), random, lowest, middle, highest
        law="perplexity",  # to fit: none, classical, perplexity
        marks=(32, 64, 128),  # steps of a small run, after each of which its loss is taken
        prompts=32,  # chunks of an update
        mini_batches=1,
        steps=128,
        warm_start=base_config()["warm_start"] | {"steps": 400},
        optimizer=train.optimizer_config(1e-3),
        world={"train_problems": 16_384, "test_problems": 512},
    )
    arms: dict[str, dict] = {
        "small": {},
        "tiny": TINY | {"prompts": 16, "marks": (1, 2)},
        "paper": {**MODELS["qwen2.5-7b"], "prompts": 512, "steps": 1000, "optimizer.learning_rate": 1e-5},
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
