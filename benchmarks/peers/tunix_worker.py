"""Worker for Tunix: the vanilla rollout that its GRPO learner samples with, on its Llama 3.

The learner's cluster calls `VanillaRollout.generate` for one micro-batch after the other, and so does this. All rows of
a batch take as many steps as the longest one, so a batch gets a limit of just that many; rows are cut to their lengths.
"""

from __future__ import annotations

import functools
import importlib.metadata

import jax
import numpy as np
from flax import nnx
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.rl.rollout.base_rollout import CacheConfig, RolloutConfig
from tunix.rl.rollout.vanilla_rollout import VanillaRollout

from benchmarks.peers.works import BATCH_SIZES, Prepared, Sizes, Work, fastest, serve


class NumberTokenizer:
    """Texts are token ids with spaces between them. Neither padding nor the end has an id that can be sampled."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # none

    def eos_id(self) -> int:
        return self.vocab

    def pad_id(self) -> int:
        return -1


def make_model(sizes: Sizes) -> Llama3:
    """Tunix's Llama 3 with these sizes, in float32."""
    config = ModelConfig(
        num_layers=sizes.layers,
        vocab_size=sizes.vocab,
        embed_dim=sizes.width,
        hidden_dim=sizes.ffn,
        num_heads=sizes.heads,
        head_dim=sizes.width // sizes.heads,
        num_kv_heads=sizes.kv_heads,
        rope_theta=10_000,
        norm_eps=1e-6,
        weight_tying=True,
    )
    return Llama3(config, rngs=nnx.Rngs(0))


def in_batches(
    rollout: VanillaRollout, work: Work, prompts: list[str], lengths: np.ndarray, size: int
) -> list[np.ndarray]:
    """All prompts, `size` at a time."""
    sampled = []
    for first in range(0, len(prompts), size):
        batch = lengths[first : first + size]
        config = RolloutConfig(
            max_tokens_to_generate=int(batch.max()), max_prompt_length=work.prompt_tokens, temperature=1.0
        )
        rows = rollout.generate(prompts[first : first + size], config).tokens
        sampled += [row[:length] for row, length in zip(rows, batch, strict=True)]
    return sampled


def prepare(work: Work, lengths: np.ndarray | None) -> Prepared:
    """The fastest batch size of Tunix for these lengths."""
    assert lengths is not None
    sizes = work.sizes
    cache = CacheConfig(work.max_length, sizes.layers, sizes.kv_heads, sizes.width // sizes.heads)
    rollout = VanillaRollout(make_model(sizes), NumberTokenizer(sizes.vocab), cache)
    prompts = [" ".join(map(str, row)) for row in work.prompt_ids().tolist() for _ in range(work.group)]
    candidates = {
        f"batches of {size}": functools.partial(in_batches, rollout, work, prompts, lengths[:, 0], size)
        for size in sorted({min(size, work.sequences) for size in BATCH_SIZES})
    }
    name, run = fastest(candidates, compiles=True)
    assert [len(row) for row in run()] == lengths[:, 0].tolist()
    return Prepared(run, name, lengths)


if __name__ == "__main__":
    versions = {"library": f"Tunix {importlib.metadata.version('google-tunix')}", "version": f"jax {jax.__version__}"}
    serve(prepare, versions)
