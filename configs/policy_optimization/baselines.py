"""The standard algorithms on sums modulo a number.

`small` (default): an arm takes about a minute on two CPU cores for three seeds. `tiny`: seconds, for tests. `paper`: a
run of GRPO as verl's examples have it, with Qwen2.5-7B's sizes.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, SUMS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        advantages="grpo",  # grpo, rloo, remax, reinforce_pp, reinforce_pp_baseline, gae
        std="group",  # what grpo divides by: group, batch, none
        loss="ppo_clip",  # ppo_clip, gspo, cispo, reinforce
        dynamic_sampling=False,  # groups without spread are left out
        overlong={"buffer": 0, "factor": 1.0},  # DAPO's length penalty; buffer 0: none
        value_clip=0.2,
        lam=1.0,
        critic_optimizer=train.optimizer_config(1e-3, warmup_updates=5),
        sampler_noise=0.0,  # relative size of a disturbance of the sampler's weights
        importance_cap=None,  # truncated importance weights against the sampler's log-probs
        world=SUMS,
    )
    arms: dict[str, dict] = {
        "small": {},
        "tiny": TINY,
        "paper": {
            **MODELS["qwen2.5-7b"],
            "max_length": 3072,
            "max_turn_tokens": 2048,
            "num_slots": 1024,
            "prompts": 1024,
            "group_size": 5,
            "mini_batches": 4,
            "micro_batches": 16,
            "kl_coefficient": 0.001,
            "optimizer.learning_rate": 1e-6,
            "critic_optimizer.learning_rate": 1e-5,
        },
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
