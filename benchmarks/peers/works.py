"""The works that all libraries do, and how the driver talks to a worker. Imports no library that is measured."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

BATCH_SIZES = (64, 128, 256, 512)  # what the workers try; each keeps its fastest


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A decoder with RMSNorm, rotary positions, grouped-query attention, gated SiLU and tied embeddings, in float32."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int


@dataclasses.dataclass(frozen=True)
class Work:
    """Rollouts to sample at temperature 1, all probabilities kept. A turn ends after `turn_tokens`, or before that with
    probability 1 / `mean` after each token; behind each turn but the last stand the `observation` tokens of a tool."""

    sizes: Sizes
    prompts: int
    group: int  # sequences per prompt
    prompt_tokens: int
    turn_tokens: int
    mean: int | None = None
    turns: int = 1
    observation: int = 0

    @property
    def sequences(self) -> int:
        """B."""
        return self.prompts * self.group

    @property
    def max_length(self) -> int:
        """T, all turns and observations included."""
        return self.prompt_tokens + self.turns * self.turn_tokens + (self.turns - 1) * self.observation

    def prompt_ids(self) -> np.ndarray:
        """int32[P, L]; no token is 0, which the peers pad with."""
        return np.random.default_rng(0).integers(1, self.sizes.vocab, (self.prompts, self.prompt_tokens), np.int32)

    def tool(self) -> np.ndarray:
        """int32[V, O]: what the tool answers to a turn, looked up by the turn's first token."""
        return np.random.default_rng(1).integers(1, self.sizes.vocab, (self.sizes.vocab, self.observation), np.int32)


SMALL = Sizes(vocab=8192, width=256, layers=4, heads=8, kv_heads=2, ffn=1024)
SMALLER = Sizes(vocab=2048, width=128, layers=2, heads=4, kv_heads=2, ffn=512)
WORKS = {
    "generate": Work(SMALL, prompts=8, group=8, prompt_tokens=64, turn_tokens=128),
    "long_tail": Work(SMALL, prompts=64, group=8, prompt_tokens=64, turn_tokens=256, mean=48),
    "multi_turn": Work(SMALLER, prompts=64, group=8, prompt_tokens=12, turn_tokens=32, mean=8, turns=3, observation=12),
}


class Prepared(NamedTuple):
    """What a worker is about to measure: `run` returns when the tokens are there."""

    run: Callable[[], Any]
    settings: str
    lengths: np.ndarray  # int[B, K], tokens of each turn


def fastest(candidates: Mapping[str, Callable[[], Any]], *, compiles: bool) -> tuple[str, Callable[[], Any]]:
    """The candidate that takes the shortest time. Each runs once before that if it `compiles`, else only the first."""
    seconds = {}
    for number, (name, run) in enumerate(candidates.items()):
        if compiles or number == 0:
            run()
        seconds[name] = timed(run)
        print(f"{name}: {seconds[name]:.2f} s", file=sys.stderr, flush=True)
    best = min(seconds, key=seconds.__getitem__)
    return best, candidates[best]


def timed(run: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def serve(prepare: Callable[[Work, np.ndarray | None], Prepared], versions: dict[str, str]) -> None:
    """Answers the driver, one JSON line at the start and one for each of its lines, until its lines end.

    `{"prepare": name, "lengths": [[...]]}` warms up and finds the best settings, `{"run": name}` measures once.
    Whatever else is printed goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepared: dict[str, Prepared] = {}
    print(json.dumps({}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            name = request["prepare"]
            lengths = None if request["lengths"] is None else np.array(request["lengths"])
            prepared[name] = prepare(WORKS[name], lengths)
            answer = {"settings": prepared[name].settings, "lengths": prepared[name].lengths.tolist(), **versions}
        else:
            answer = {"seconds": timed(prepared[request["run"]].run)}
        print(json.dumps(answer), file=answers, flush=True)
