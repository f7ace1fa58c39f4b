"""Time of `discounted_scan` and `fused_policy_loss` on the platform this runs on, beside what they stand in for.

    python -m benchmarks.scan_kernels --rows 64 --length 8192 --json

Medians over `--steps` calls, with the device waited for. The scan: masked, discounts per entry, float32, forward, and
forward plus backward; beside it the same in `jax.lax.scan` with the rule written into its step, and a copy that reads
and writes as much. The loss: value and gradient with dual clip, a KL term and entropy, beside `jaxrl_llm.ops`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_kernels.policy_loss import fused_policy_loss
from jaxrl_kernels.scan import discounted_scan
from jaxrl_llm import ops


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"rows": 64, "length": 8192, "steps": 30}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true", help="print one JSON line and nothing else")
    return parser.parse_args()


def scan_step_by_step(values: jax.Array, discount: jax.Array, mask: jax.Array) -> jax.Array:
    """What one would write without a kernel."""

    def step(state: jax.Array, entry: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        value, factor, counts = entry
        state = jnp.where(counts, value + factor * state, state)
        return state, jnp.where(counts, state, 0)

    entries = (values.T, discount.T, mask.T)
    return jax.lax.scan(step, jnp.zeros(len(values)), entries, reverse=True)[1].T


def plain_loss(logprobs: jax.Array, old: jax.Array, advantages: jax.Array, mask: jax.Array, ref: jax.Array) -> Any:
    loss, metrics = ops.ppo_clip_loss(logprobs, old, advantages, mask, dual_clip=3.0)
    kl = ops.kl_estimate(logprobs, ref, mask=mask)
    return loss + 0.1 * ops.reduce_loss(kl, mask), metrics | {"kl": ops.masked_mean(kl, mask)}


def fused_loss(logprobs: jax.Array, old: jax.Array, advantages: jax.Array, mask: jax.Array, ref: jax.Array) -> Any:
    return fused_policy_loss(logprobs, old, advantages, mask, dual_clip=3.0, ref_logprobs=ref, kl_coefficient=0.1)


def measure(functions: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]], steps: int) -> dict[str, float]:
    """Median seconds of each; the functions take turns, so that a disturbance hits all alike."""
    compiled = {name: (jax.jit(function), arrays) for name, (function, arrays) in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(steps + 1):
        for name, (function, arrays) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arrays))
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    args = parse_args()
    rng = np.random.default_rng(0)
    shape = (args.rows, args.length)
    values, noise, advantages = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3))
    mask = jnp.asarray(rng.random(shape) < 0.8)
    discount = jnp.asarray(rng.uniform(0.9, 1, shape), jnp.float32)
    scan, loss = (values, discount, mask), (values, values + 0.3 * noise, advantages, mask, values - 0.2 * noise)
    functions: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "copy": (lambda x, factor, mask: jnp.where(mask, x + factor, 0), scan),
        "discounted_scan": (lambda x, factor, mask: discounted_scan(x, factor, mask=mask), scan),
        "lax.scan": (scan_step_by_step, scan),
        "associative_scan": (lambda x, factor, mask: ops.reverse_discounted_sum(x, mask, factor), scan),
        "discounted_scan, gradient": (
            jax.grad(lambda x, factor, mask: jnp.sum(discounted_scan(x, factor, mask=mask) ** 2)),
            scan,
        ),
        "lax.scan, gradient": (jax.grad(lambda *arrays: jnp.sum(scan_step_by_step(*arrays) ** 2)), scan),
        "fused_policy_loss": (jax.value_and_grad(fused_loss, has_aux=True), loss),
        "policy loss in ops": (jax.value_and_grad(plain_loss, has_aux=True), loss),
    }
    seconds = measure(functions, args.steps)
    device = jax.devices()[0].device_kind
    if args.json:
        print(json.dumps({"device": device, "shape": shape, "milliseconds": {k: 1e3 * v for k, v in seconds.items()}}))
        return
    print(f"{device}, [{args.rows}, {args.length}] float32, medians of {args.steps}")
    for name, value in seconds.items():
        print(f"{name:28s} {1e3 * value:8.3f} ms")


if __name__ == "__main__":
    main()
