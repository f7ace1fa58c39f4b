"""Kimi k1.5 on sums with written steps and waiting.

`small` (default): a minute or two an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`: its
model is not known; Qwen2.5-32B's sizes stand in.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, SUMS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        loss="mirror_descent",  # mirror_descent, ppo_clip, reinforce
        tau=0.1,  # of the regularizer; not published
        epochs=1,  # updates on the same rollouts
        optimizer_reset=True,  # each iteration is a problem of its own
        length_weight=0.0,  # of the length reward
        length_from=0,  # the step that it starts at
        prioritized=False,  # draw problems in proportion to 1 - success
        record_decay=0.5,  # of a problem's success, each time that it is drawn
        long2short=None,  # how a short model is made afterwards: merge, rejection, dpo, rl; None: not at all
        short_steps=100,
        short_limit=12,  # tokens of a response, for rl
        dpo_beta=0.1,
        agg="seq_sum",
        mini_batches=1,
        max_length=28,
        max_turn_tokens=20,
        optimizer=train.optimizer_config(2e-4),
        world=SUMS | {"train_problems": 2000, "shown": SUMS["shown"] | {"waits": 1.5}},
    )
    arms: dict[str, dict] = {
        "small": {},
        "tiny": TINY,
        "paper": {
            **MODELS["qwen2.5-32b"],
            "max_length": 33_000,
            "max_turn_tokens": 32_768,
            "num_slots": 64,
            "prompts": 128,
            "group_size": 8,
            "micro_batches": 16,
            "length_weight": 0.5,
            "length_from": 100,
            "prioritized": True,
            "optimizer.learning_rate": 1e-6,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
