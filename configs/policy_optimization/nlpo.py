"""NLPO on reviews in a small grammar.

`small` (default): about a minute and a half an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests.
`paper`: GPT-2's sizes in this library's decoder, and the settings of the IMDB task.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        top_p=0.9,  # the masking policy's nucleus; 1: no mask, PPO
        refresh=10,  # iterations between copies of the policy into the masking policy; 0: never
        beta=0.1,  # of the KL in the reward, at the start
        target_kl=0.1,  # nats a token
        lam=0.95,
        value_clip=None,
        critic_optimizer=train.optimizer_config(1e-3, warmup_updates=5),
        world={"train_problems": 1000, "test_problems": 256},
        **{"steps": 150},
    )
    arms: dict[str, dict] = {
        "small": {"warm_start.steps": 500},
        "tiny": TINY,
        "paper": {
            "vocab_size": 50257,
            "model.width": 768,
            "model.num_layers": 12,
            "model.num_heads": 12,
            "model.num_kv_heads": 12,
            "model.ffn_width": 3072,
            "max_length": 112,
            "max_turn_tokens": 48,
            "prompts": 32,
            "group_size": 1,
            "mini_batches": 1,
            "num_slots": 32,
            "refresh": 5,
            "optimizer.learning_rate": 1e-6,
            "critic_optimizer.learning_rate": 1e-6,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
