"""The standard algorithms on sums modulo a number.

`small` (default): an arm takes about a minute on two CPU cores for three seeds. `tiny`: seconds, for tests. `paper`: a
run of GRPO as verl's examples have it, with Qwen2.5-7B's sizes.
"""

from ml_collections import ConfigDict

from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = {
        "seed": 0,
        # the algorithm
        "advantages": "grpo",  # grpo, rloo, remax, reinforce_pp, reinforce_pp_baseline, gae
        "std": "group",  # what grpo divides by: group, batch, none
        "loss": "ppo_clip",  # ppo_clip, gspo, cispo, reinforce
        "agg": "token",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "kl_coefficient": 0.0,
        "entropy_coefficient": 0.0,
        "dynamic_sampling": False,  # groups without spread are left out
        "overlong": {"buffer": 0, "factor": 1.0},  # DAPO's length penalty; buffer 0: none
        "value_clip": 0.2,
        "lam": 1.0,
        "sampler_noise": 0.0,  # relative size of a disturbance of the sampler's weights
        "importance_cap": None,  # truncated importance weights against the sampler's log-probs
        # the world
        "world": {
            "terms": (2, 3, 4),
            "modulus": 10,
            "train_problems": 20_000,
            "test_problems": 256,
            "shown": {"write_steps": 0.5, "wrong": 0.4, "waits": 0.0, "wait_first": True},
        },
        "vocab_size": None,  # None: the world's
        # the policy
        "model": {"width": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "ffn_width": 256},
        "decoding": {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0},
        "max_length": 16,
        "max_turns": 1,
        "max_turn_tokens": 10,
        "num_slots": 128,
        "warm_start": {
            "seed": 0,
            "steps": 1000,
            "rows": 32,
            "row_length": 64,
            "optimizer": train.optimizer_config(3e-3, schedule="cosine", warmup_updates=20, final_fraction=0.1),
        },
        # the run
        "steps": 200,
        "prompts": 16,
        "group_size": 8,
        "mini_batches": 2,
        "micro_batches": 1,
        "optimizer": train.optimizer_config(2e-4, warmup_updates=5),
        "critic_optimizer": train.optimizer_config(1e-3, warmup_updates=5),
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1, "expert": 1},
        "evaluate_every": 25,
        "checkpoint_every": 100,
        "keep_checkpoints": 1,
        "max_skipped_in_row": 10,
    }
    arms: dict[str, dict] = {
        "small": {},
        "tiny": {
            "steps": 2,
            "warm_start.steps": 2,
            "warm_start.optimizer.warmup_updates": 0,
            "evaluate_every": 2,
            "world.train_problems": 64,
            "world.test_problems": 8,
        },
        "paper": {
            "vocab_size": 152064,
            "model.width": 3584,
            "model.num_layers": 28,
            "model.num_heads": 28,
            "model.num_kv_heads": 4,
            "model.ffn_width": 18944,
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
