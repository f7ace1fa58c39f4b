"""DRIVE on stack programs.

`small` (default): about a minute an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`:
Qwen2.5-32B's sizes, stages of 32 and 128 steps with phases of 72, 50 and 25 problems; the learning rate and the number
of rollouts a step are ours.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        sft="doubled",  # what fine-tuning sees: hard samples doubled, plain, filtered (by the arena)
        folds=5,  # of the arena
        stage_1_steps=30,  # on all problems, group_size rollouts of each
        focus_prompts=4,  # problems a step in stage 2, with as many rollouts in all
        phases={"keep": (60, 40, 20), "steps": (20, 15, 10)},
        # the demonstrator's errors by level: easy, middle, hard
        world={"modulus": 13, "wrong": (0.3, 0.5, 0.8)},
        **{"steps": 75},
    )
    no_sizes = {key: value for key, value in TINY.items() if not key.startswith("world.")}
    arms: dict[str, dict] = {
        "small": {},
        "tiny": no_sizes | {"stage_1_steps": 1, "phases.keep": (20,), "phases.steps": (1,)},
        "paper": {
            **MODELS["qwen2.5-32b"],
            "world.modulus": 61,  # 7,259 problems; 9,000 there
            "max_length": 32768,
            "max_turn_tokens": 30000,
            "num_slots": 64,
            "prompts": 128,
            "group_size": 8,
            "focus_prompts": 16,
            "mini_batches": 1,
            "micro_batches": 16,
            "stage_1_steps": 32,
            "phases.keep": (72, 50, 25),
            "phases.steps": (64, 32, 32),
            "steps": 160,
            "optimizer.learning_rate": 1e-6,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
