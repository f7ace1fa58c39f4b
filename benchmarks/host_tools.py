"""Rollouts against slow and failing tools on the host, beside the same rollouts with instant ones.

    python -m benchmarks.host_tools --rollouts 256 --latency 0.05 --time-outs 0.02 --exceptions 0.02

An episode has three turns; each is answered after the latency, except for the shares of calls that hang until their
time is over or raise. Both are retried once and then shown to the policy. Wall times are medians over runs that take
turns after a warm-up; every rollout must come back, marked rightly, or the run fails.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import statistics
import threading
import time
from typing import Any

import jax
import numpy as np

from jaxrl_llm.data.worlds.tokenizer import geography_tokenizer
from jaxrl_llm.models.decoder import DecoderConfig, make_decoder
from jaxrl_llm.sampling import CallLimits, host_rollout

TURNS, TURN_TOKENS = 3, 24


class SlowEnv:
    """Answers with a fixed text, slowly, and sometimes not at all."""

    def __init__(self, latency: float, time_outs: float, exceptions: float) -> None:
        self.latency, self.time_outs, self.exceptions = latency, time_outs, exceptions
        self.random, self.lock, self.ended = random.Random(0), threading.Lock(), threading.Event()
        self.planned: collections.Counter[str] = collections.Counter()

    def reset(self, task: int) -> tuple[int, str]:
        return 0, f"What is the capital of country {task}?"

    def step(self, state: int, text: str) -> tuple[int, str, float, bool]:
        with self.lock:
            draw = self.random.random()
        if draw < self.time_outs:
            self.planned["time-outs"] += 1
            self.ended.wait(60)
        time.sleep(self.latency)
        if self.time_outs <= draw < self.time_outs + self.exceptions:
            self.planned["exceptions"] += 1
            raise ConnectionError("the index is away")
        return state + 1, "Nairobi is the capital of Kenya.", 1.0, state + 1 == TURNS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=256)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--in-flight", type=int, help="episodes under way; by default twice the slots")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds")
    parser.add_argument("--timeout", type=float, default=0.2, help="seconds that an attempt may take")
    parser.add_argument("--time-outs", type=float, default=0.02, help="share of attempts that hang")
    parser.add_argument("--exceptions", type=float, default=0.02, help="share of attempts that raise")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON line and nothing else")
    args = parser.parse_args()
    tokenizer = geography_tokenizer()
    model = make_decoder(
        DecoderConfig(tokenizer.vocab_size, width=256, num_layers=4, num_heads=8, num_kv_heads=2, ffn_width=1024)
    )
    params = jax.jit(model.init)(jax.random.key(0))

    def play(env: SlowEnv) -> tuple[float, Any, Any]:
        start = time.perf_counter()
        sampled, episodes = host_rollout(
            model, params, env, range(args.rollouts), jax.random.key(1), tokenizer=tokenizer, max_length=192,
            max_turns=TURNS, max_turn_tokens=TURN_TOKENS, num_slots=args.slots, in_flight=args.in_flight,
            max_observation=32, call_limits=CallLimits(timeout=args.timeout, retries=1, backoff=0.01),
        )  # fmt: skip
        jax.block_until_ready(sampled)
        return time.perf_counter() - start, sampled, episodes

    kinds = {"instant": (0.0, 0.0, 0.0), "slow": (args.latency, args.time_outs, args.exceptions)}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    errors = 0
    for repeat in range(args.repeats + 1):
        for name, shape in kinds.items():
            env = SlowEnv(*shape)
            taken, sampled, episodes = play(env)
            env.ended.set()
            if repeat:  # the first run compiles
                seconds[name].append(taken)
            failed = sum(len(episode.errors) for episode in episodes)
            shown = int(np.sum((sampled.turn_rewards == 0) & sampled.turn_mask))
            if len(episodes) != args.rollouts or failed != shown:
                raise SystemExit(f"{len(episodes)} of {args.rollouts} rollouts, {failed} failed calls, {shown} marked")
            errors = failed if name == "slow" else errors
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "instant_s": round(medians["instant"], 3),
        "slow_s": round(medians["slow"], 3),
        "ratio": round(medians["slow"] / medians["instant"], 3),
        "returned": args.rollouts,
        "calls_shown_as_errors": errors,
    }
    print(json.dumps(result) if args.json else "\n".join(f"{name:24}{value}" for name, value in result.items()))


if __name__ == "__main__":
    main()
