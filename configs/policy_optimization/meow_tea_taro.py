"""Multi-turn agents in houses of two rooms.

`small` (default): a minute or two an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`: the
batch, rates and turns of its TextWorld runs, with Qwen2.5-1.5B's sizes.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    sizes = {"width": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "ffn_width": 128}
    defaults = base_config()
    base = base_config(
        algorithm="ppo",  # ppo, grpo, rloo
        reward="dense",  # dense, single
        win_bonus=True,  # 1 on the last turn of a win in which no turn gained
        kl_reward=0.01,  # off each token's reward; RLOO's is 0.001 in the paper
        lam=1.0,  # of GAE
        value_clip=None,
        critic_optimizer=train.optimizer_config(1e-3, warmup_updates=5),
        model=defaults["model"] | sizes,
        max_length=72,
        max_turns=12,
        max_turn_tokens=2,
        test_limits={"max_turns": 12, "max_length": 72},
        prompts=8,
        num_slots=64,
        optimizer=train.optimizer_config(5e-4, warmup_updates=5),
        demos=76,  # episodes to imitate before
        warm_start=defaults["warm_start"] | {"steps": 400, "rows": 16, "row_length": 144},
        steps=60,
        evaluate_every=15,
        world={
            "sizes": {"rooms": 2, "objects": 3, "quest": 4},
            "test": {"rooms": 2, "objects": 3, "quest": 4},
            "wrong": 0.1,  # chance of a random turn in a demonstration
            "train_problems": 64,
            "test_problems": 256,
        },
    )
    arms: dict[str, dict] = {
        "small": {},
        "tiny": TINY,
        "paper": {
            **MODELS["qwen2.5-1.5b"],
            "max_length": 8192,
            "max_turn_tokens": 512,
            "test_limits.max_length": 8192,
            "num_slots": 256,
            "prompts": 32,
            "mini_batches": 1,
            "micro_batches": 64,
            "optimizer.learning_rate": 1e-6,
            "critic_optimizer.learning_rate": 1e-5,
            "demos": 0,
            "warm_start.steps": 0,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
