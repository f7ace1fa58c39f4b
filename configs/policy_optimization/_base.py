"""What the family's configs share: the small policy and its run, and the sizes of the models that papers train."""

from typing import Any

from jaxrl_llm import train

SUMS = {  # the world of sums: `experiments.policy_optimization._training.arithmetic_world`
    "terms": (2, 3, 4),
    "modulus": 10,
    "train_problems": 20_000,
    "test_problems": 256,
    "shown": {"write_steps": 0.5, "wrong": 0.4, "waits": 0.0, "wait_first": True},
}


def base_config(**changes: Any) -> dict[str, Any]:
    """The settings of a small policy that is trained on `world`; `changes` replaces or adds some at the top level."""
    return {
        "seed": 0,
        "vocab_size": None,  # None: the world's
        "model": {
            "width": 64,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 4,
            "ffn_width": 256,
            "rope_theta": 1e4,
            "attention_bias": False,
            "tie_embeddings": True,
            "remat": "none",  # full: layers are computed again in the backward pass
            "scan_layers": False,
        },
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
        # the update
        "agg": "token",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": None,
        "kl_coefficient": 0.0,  # of the k3 estimate against the warm start, in the loss
        "prompts": 16,
        "group_size": 8,
        "mini_batches": 2,
        "micro_batches": 1,
        "optimizer": train.optimizer_config(2e-4, warmup_updates=5),
        # the run
        "steps": 200,
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1, "expert": 1},
        "evaluate_every": 25,
        "checkpoint_every": 100,
        "keep_checkpoints": 1,
        "max_skipped_in_row": 10,
        **changes,
    }


QWEN: dict[str, Any] = {"rope_theta": 1e6, "attention_bias": True}
# looks things up in long windows: `jaxrl_llm.models.induction_head`
LONG_MODEL = base_config()["model"] | {"num_heads": 2, "num_kv_heads": 2, **QWEN}


TINY = {  # seconds, for tests; equal shapes on all pages, so that they share compiled functions
    "steps": 2,
    "model.num_layers": 1,
    "warm_start.steps": 2,
    "warm_start.optimizer.warmup_updates": 0,
    "evaluate_every": 2,
    "world.train_problems": 64,
    "world.test_problems": 8,
}


def _model(vocab_size: int, width: int, layers: int, heads: int, kv_heads: int, ffn: int, **more: Any) -> dict:
    sizes: dict[str, Any] = {"width": width, "num_layers": layers, "num_heads": heads, "num_kv_heads": kv_heads}
    sizes |= {"ffn_width": ffn, "remat": "full", "scan_layers": True}  # rematerialized as models of this size are
    return {"vocab_size": vocab_size} | {f"model.{name}": value for name, value in {**sizes, **more}.items()}


LARGE = QWEN | {"tie_embeddings": False}
MODELS = {  # as their config.json on the Hugging Face hub have it
    "llama3.1-8b": _model(128256, 4096, 32, 32, 8, 14336, rope_theta=5e5, tie_embeddings=False),
    "qwen2.5-1.5b": _model(151936, 1536, 28, 12, 2, 8960, **QWEN),
    "qwen2.5-3b": _model(151936, 2048, 36, 16, 2, 11008, **QWEN),
    "qwen2.5-7b": _model(152064, 3584, 28, 28, 4, 18944, **LARGE),
    "qwen2.5-14b": _model(152064, 5120, 48, 40, 8, 13824, **LARGE),
    "qwen2.5-32b": _model(152064, 5120, 64, 40, 8, 27648, **LARGE),
}
