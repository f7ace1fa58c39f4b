"""Joint flashback adaptation on strings: twenty old tasks, then five new ones.

`small` (default): a minute or two an arm on two CPU cores, for three seeds. `tiny`: seconds, for tests. `paper`:
Llama-3.1-8B's sizes; the paper's constants are not known, those of `small` stand.
"""

from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS, TINY, base_config
from jaxrl_llm import train


def get_config(arm: str = "small") -> ConfigDict:
    base = base_config(
        group_size=1,  # rows are shown, not sampled
        keep="symmetric",  # what the old prompts are for: nothing, one_way or symmetric KL, answers (replay)
        project="one_way",  # none, one_way, symmetric
        latent=True,  # whether pairs of a new example and a flashback are learnt from
        increments=True,
        latent_tasks=8,
        latent_rank=4,
        nearest=2,
        prompts=64,  # new examples, and flashbacks, of an update
        mini_batches=1,
        steps=200,
        warm_start=base_config()["warm_start"] | {"steps": 500, "row_length": 60},
        optimizer=train.optimizer_config(1e-3),
        world={
            "old_shifts": (0, 1, 2, 3),
            "new_shifts": (4,),
            "train_problems": 16,  # for each new task
            "test_problems": 40,  # for each task
            "flashbacks": 16,  # for each old task
        },
    )
    arms: dict[str, dict] = {
        "small": {},
        "tiny": TINY | {"prompts": 16},
        "paper": {**MODELS["llama3.1-8b"], "optimizer.learning_rate": 1e-5},
    }
    return train.choose_arm(ConfigDict(base), arm, arms)
