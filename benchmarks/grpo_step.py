"""Time of one GRPO step: generate for a batch of prompts, then one update of the policy.

    python -m benchmarks.grpo_step --prompts 8 --group 8 --prompt-len 64 --new-tokens 128 --width 256 --layers 4 \
        --heads 8 --kv-heads 2 --ffn 1024 --vocab 8192 --steps 5 --json

Prompts are random, nothing stops early, and every step samples anew from the updated policy. The update is what a user
of the library runs: group advantages, clipped loss, gradient accumulated over micro-batches, AdamW behind the
non-finite guard. All times are medians over the steps after a warm-up step, with the device waited for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time

import jax
import jax.numpy as jnp

from jaxrl_llm import ops, train
from jaxrl_llm.envs.single_turn import SingleTurnEnv
from jaxrl_llm.models.decoder import DecoderConfig, make_decoder
from jaxrl_llm.sampling import rollout, score_rollout
from jaxrl_llm.types import Decoding, Rollout, TrainState


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {
        "prompts": 8,
        "group": 8,
        "prompt-len": 64,
        "new-tokens": 128,
        "width": 256,
        "layers": 4,
        "heads": 8,
        "kv-heads": 2,
        "ffn": 1024,
        "vocab": 8192,
        "steps": 5,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--micro-batch", type=int, default=16, help="sequences whose activations exist at a time")
    parser.add_argument("--json", action="store_true", help="print one JSON line and nothing else")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    decoding = Decoding()
    batch = args.prompts * args.group
    model = make_decoder(
        DecoderConfig(
            args.vocab,
            width=args.width,
            num_layers=args.layers,
            num_heads=args.heads,
            num_kv_heads=args.kv_heads,
            ffn_width=args.ffn,
        )
    )
    optimizer = train.make_optimizer({"learning_rate": 1e-5, "max_grad_norm": 1.0})
    state = train.init_state(jax.jit(model.init)(jax.random.key(0)), optimizer, seed=0)
    env = SingleTurnEnv(lambda task, tokens, length: jnp.mean(tokens % 2, dtype=jnp.float32))
    tasks = {
        "prompt_tokens": jax.random.randint(jax.random.key(1), (args.prompts, args.prompt_len), 0, args.vocab),
        "prompt_length": jnp.full(args.prompts, args.prompt_len),
    }

    @jax.jit
    def generate(params, key) -> Rollout:
        return rollout(
            model,
            params,
            env,
            tasks,
            key,
            max_length=args.prompt_len + args.new_tokens,
            max_turns=1,
            max_turn_tokens=args.new_tokens,
            group_size=args.group,
            num_slots=batch,
            decoding=decoding,
        )

    @jax.jit
    def update(state: TrainState, sampled: Rollout):
        advantages = ops.grpo_advantages(sampled.rewards, sampled.group_ids, sampled.mask)
        num_tokens = jnp.sum(sampled.mask)

        def loss_fn(params, micro):
            sampled, advantages = micro
            logprobs, _ = score_rollout(
                model, params, sampled, decoding=decoding, group_size=args.group, shared_prefix=args.prompt_len - 1
            )
            return ops.ppo_clip_loss(logprobs, sampled.logprobs, advantages, sampled.mask, denominator=num_tokens)

        loss, grads, metrics = train.accumulate_gradients(
            loss_fn, state.params, (sampled, advantages), batch // micro_batch
        )
        state, norms = train.apply_gradients(state, grads, optimizer, loss)
        return dataclasses.replace(state, step=state.step + 1), metrics | norms

    # whole groups to a micro-batch, so that a group's prompt is computed once
    micro_batch = max(args.group, min(args.micro_batch, batch) // args.group * args.group)
    if batch % micro_batch:
        raise SystemExit(
            f"--micro-batch {args.micro_batch}: the batch of {batch} does not divide into slices of {micro_batch}"
        )
    times = []
    for step in range(args.steps + 1):
        start = time.perf_counter()
        sampled = jax.block_until_ready(generate(state.params, jax.random.fold_in(jax.random.key(2), step)))
        middle = time.perf_counter()
        state, metrics = jax.block_until_ready(update(state, sampled))
        times.append((middle - start, time.perf_counter() - middle))
    generated = int(jnp.sum(sampled.mask))
    assert generated == batch * args.new_tokens, f"{generated} tokens were generated, not {batch * args.new_tokens}"
    generate_s, update_s = (statistics.median(column) for column in zip(*times[1:], strict=True))
    step_s = statistics.median(sum(row) for row in times[1:])
    figures = {
        "generate_s": round(generate_s, 3),
        "update_s": round(update_s, 3),
        "step_s": round(step_s, 3),
        "tokens_per_s": round(generated / step_s, 1),
    }
    if args.json:
        print(json.dumps(figures))
    else:
        print(
            f"generate {generate_s:.2f} s   update {update_s:.2f} s   step {step_s:.2f} s   "
            f"{figures['tokens_per_s']:.0f} generated tokens/s   ({jax.devices()[0].platform}, {batch} sequences)"
        )


if __name__ == "__main__":
    main()
