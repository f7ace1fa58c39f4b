"""Worker for TRL: the generation of its GRPO trainer, and a turn-by-turn loop over Hugging Face `generate`.

Sequences of one turn go through `GRPOTrainer._generate_single_turn`, in batches in order. `generate` gives every row of
a batch as many steps as the longest one takes, so a batch gets a limit of just that many, which spares it a test for
each row; rows are cut to their lengths. Where lengths differ, the trainer's other backend (continuous batching, with a
limit for each request) is a candidate too.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import tempfile
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers.works import BATCH_SIZES, Prepared, Sizes, Work, fastest, serve

PAGE = 64  # tokens of a page of the continuous batching's cache


def make_model(sizes: Sizes) -> LlamaForCausalLM:
    """A Llama of these sizes in float32; its attention is PyTorch's own (`sdpa`)."""
    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def make_trainer(work: Work, **options: Any) -> GRPOTrainer:
    """The trainer with its model; the token that ends a sequence lies outside the vocabulary, so none ends early."""
    vocabulary = {str(token): token for token in range(work.sizes.vocab)} | {"end": work.sizes.vocab}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return GRPOTrainer(
        model=make_model(work.sizes),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=tempfile.gettempdir(),  # nothing is written
            use_cpu=True,
            bf16=False,
            report_to="none",
            temperature=1.0,
            max_completion_length=work.turn_tokens,
            num_generations=work.group,
            per_device_train_batch_size=work.group,
            **options,
        ),
        train_dataset=Dataset.from_list([{"prompt": "1"}]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="end", pad_token="0"),
    )


def in_batches(trainer: GRPOTrainer, prompts: list[list[int]], lengths: np.ndarray, size: int) -> list[list[int]]:
    """One turn of all prompts, `size` at a time."""
    sampled = []
    for first in range(0, len(prompts), size):
        batch = lengths[first : first + size]
        trainer.generation_config.max_new_tokens = int(batch.max())
        rows, _ = trainer._generate_single_turn(prompts[first : first + size], None, {}, trainer.num_generations)
        sampled += [row[:length] for row, length in zip(rows, batch, strict=True)]
    return sampled


@torch.no_grad()
def continuously(trainer: GRPOTrainer, prompts: list[list[int]], lengths: np.ndarray) -> list[list[int]]:
    """The same with `generate_batch` of the trainer's other backend, which has one limit for all, spelled out."""
    with trainer.model.continuous_batching_context_manager(
        generation_config=trainer.generation_config, continuous_batching_config=trainer.continuous_batching_config
    ) as manager:
        names = [
            manager.add_request(row, max_new_tokens=int(length)) for row, length in zip(prompts, lengths, strict=True)
        ]
        sampled: dict[str, list[int]] = {}
        while len(sampled) < len(names):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                sampled[result.request_id] = result.generated_tokens
            elif not manager.is_running():
                raise RuntimeError("continuous batching ended early")
    return [sampled[name] for name in names]


@torch.no_grad()
def turn_by_turn(
    model: LlamaForCausalLM, work: Work, prompts: np.ndarray, lengths: np.ndarray, size: int, keep_cache: bool
) -> None:
    """All turns, `size` sequences at a time: generate for the longest turn, mask out what lies behind each row's own
    end, append the observations.

    `keep_cache` leaves the keys and values of earlier turns, with the masked gaps, where they are; without it, rows are
    packed to the left edge and `generate` computes them again.
    """
    table = torch.from_numpy(work.tool()).long()
    for first in range(0, len(prompts), size):
        tokens = torch.from_numpy(prompts[first : first + size]).long()
        mask = torch.ones_like(tokens)
        cache: dict[str, Any] = {}
        for turn in range(work.turns):
            ends = torch.from_numpy(lengths[first : first + size, turn])[:, None]
            longest = int(ends.max())
            known = tokens.shape[1]
            output = model.generate(
                input_ids=tokens,
                attention_mask=mask,
                generation_config=GenerationConfig(
                    max_new_tokens=longest,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    pad_token_id=0,
                    disable_compile=True,
                    return_dict_in_generate=True,
                ),
                **cache,
            )
            if turn + 1 == work.turns:
                break
            observation = table[output.sequences[:, known]]
            tokens = torch.cat([output.sequences, observation], dim=1)
            mask = torch.cat([mask, torch.arange(longest) < ends, torch.ones_like(observation)], dim=1)
            if keep_cache:
                cache = {"past_key_values": output.past_key_values}
            else:  # gaps to the left, the longest row without any
                order = torch.argsort(mask, dim=1, stable=True)[:, -int(mask.sum(1).max()) :]
                tokens, mask = tokens.gather(1, order), mask.gather(1, order)


def prepare(work: Work, lengths: np.ndarray | None) -> Prepared:
    """The fastest way of TRL to sample these lengths."""
    assert lengths is not None
    torch.manual_seed(0)
    rows = np.repeat(work.prompt_ids(), work.group, axis=0)
    sizes = sorted({min(size, work.sequences) for size in BATCH_SIZES})
    if work.turns > 1:
        model = make_model(work.sizes)
        candidates = {
            f"batches of {size}, cache {'kept' if keep else 'not kept'} between turns": functools.partial(
                turn_by_turn, model, work, rows, lengths, size, keep
            )
            for size in sizes
            for keep in (False, True)
        }
    else:
        prompts, ends = rows.tolist(), lengths[:, 0]
        trainer = make_trainer(work)
        candidates = {
            f"batches of {size}": functools.partial(in_batches, trainer, prompts, ends, size) for size in sizes
        }
        for size in sizes[:2] if work.mean is not None else ():  # more at a time were no faster
            pages = size * -(-work.max_length // PAGE)
            paged = make_trainer(
                work,
                use_transformers_continuous_batching=True,
                transformers_continuous_batching_config={
                    "page_size": PAGE,
                    "num_blocks": pages,
                    "max_batch_tokens": size + work.prompt_tokens,
                    "max_requests_per_batch": size,
                },
            )
            candidates[f"continuous batching of {size}"] = functools.partial(continuously, paged, prompts, ends)
    name, run = fastest(candidates, compiles=False)
    return Prepared(run, name, lengths)


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch")]
    serve(prepare, {"library": f"TRL {importlib.metadata.version('trl')}", "version": ", ".join(versions)})
