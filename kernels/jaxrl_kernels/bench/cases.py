"""The cases of `jaxrl_kernels.bench` without attention: log-probs, scans, the policy's loss, sampling.

A function makes the arrays of one case and lists everything that is timed on them. Alternatives are written as one
would write them without a kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_kernels.bench import pytorch
from jaxrl_kernels.bench.timing import (
    BOTH,
    FORWARD,
    Alternative,
    Case,
    Work,
    alternative,
    copy_alternative,
    least_work,
    size_of,
)
from jaxrl_kernels.dispatch import HOPPER, compute_capability
from jaxrl_kernels.logprob import fused_logprob
from jaxrl_kernels.policy_loss import fused_policy_loss
from jaxrl_kernels.sampling import sample_tokens
from jaxrl_kernels.scan import discounted_scan

OURS = "jaxrl_kernels"
# Names by JAX's backend. The first is what the dispatch takes where a call has no other reason.
VERSIONS = {"cpu": ["xla"], "gpu": ["mosaic_gpu", "pallas_gpu", "xla"], "tpu": ["pallas_tpu", "xla"]}
KEY = 0


def normal(index: int, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Standard normal numbers, other ones for each index."""
    return jax.random.normal(jax.random.key(KEY + index), shape, dtype)


def our_versions(
    make: Callable[[str | None], Callable[..., Any]],
    arrays: tuple[Any, ...],
    cotangent: Any = None,
    *,
    differentiated: int = 0,
    passes: str = FORWARD,
    more: tuple[str, ...] = (),
) -> tuple[list[Alternative], dict[str, str]]:
    """Our kernel as dispatched, then by every version that this platform has; and the others with the reason."""
    reasons = {"pallas_tpu": "runs on a TPU", "pallas_gpu": "runs on a GPU", "mosaic_gpu": "runs on a Hopper GPU"}
    here = VERSIONS[jax.default_backend()]
    if compute_capability() != HOPPER:
        here = [name for name in here if name != "mosaic_gpu"]
    named = [*here[1:], *more] if len(here) == 1 else [*here, *more]
    names: dict[str, str | None]
    names = {f"{OURS}: {here[0]} (dispatch)" if len(here) == 1 else f"{OURS}: dispatch": None}
    names |= {f"{OURS}: {name}": name for name in named}
    entries = [
        alternative(label, make(name), arrays, cotangent, differentiated=differentiated, passes=passes)
        for label, name in names.items()
    ]
    return entries, {f"{OURS}: {name}": reason for name, reason in reasons.items() if name not in here}


def logprob_case(torch: bool, *, rows: int, width: int, vocab: int, dtype: str) -> Case:
    """Log-probs of one target a row, and the gradients of hidden states and head."""
    hidden = normal(0, (rows, width), jnp.dtype(dtype))
    head = (normal(1, (vocab, width)) / width**0.5).astype(dtype)
    targets = jax.random.randint(jax.random.key(2), (rows,), 0, vocab)
    cotangent = normal(3, (rows,))
    arrays = hidden, head, targets

    def logits_of(hidden: Any, head: Any) -> Any:
        return jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=jnp.float32)

    def naive(hidden: Any, head: Any, targets: Any) -> Any:
        logprobs = jax.nn.log_softmax(logits_of(hidden, head), axis=-1)
        return jnp.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0]

    def in_chunks(hidden: Any, head: Any, targets: Any) -> Any:
        piece = jax.checkpoint(lambda block: naive(block[0], head, block[1]))
        size = min(rows, 512)
        return jax.lax.map(piece, (hidden.reshape(-1, size, width), targets.reshape(-1, size))).reshape(-1)

    def ours(name: str | None) -> Callable[..., Any]:
        return functools.partial(fused_logprob, implementation=name)

    entries, not_run = our_versions(ours, arrays, cotangent, differentiated=2)
    entries.append(alternative("naive XLA: log_softmax(h @ W.T)", naive, arrays, cotangent, differentiated=2))
    if rows % min(rows, 512) == 0:
        label = "XLA, chunks of 512 rows under jax.checkpoint"
        entries.append(alternative(label, in_chunks, arrays, cotangent, differentiated=2))
    if torch:
        more, reasons = pytorch.cross_entropies(hidden, head, targets)
        entries, not_run = entries + more, not_run | reasons
    product = 2.0 * rows * width * vocab
    return Case(
        "fused_logprob",
        f"N {rows}, D {width}, V {vocab}, {dtype}; gradients of hidden and head",
        least_work((product, 3 * product), arrays, (cotangent,), (hidden, head)),
        entries,
        not_run,
    )


def scan_case(torch: bool, *, rows: int, length: int) -> Case:
    """A masked reverse scan with a discount per entry, and the gradient of the values."""
    shape = (rows, length)
    values, cotangent = normal(0, shape), normal(1, shape)
    discount = jax.random.uniform(jax.random.key(2), shape, minval=0.9)
    mask = jax.random.bernoulli(jax.random.key(3), 0.8, shape)
    arrays = values, discount, mask

    def ours(name: str | None) -> Callable[..., Any]:
        return lambda values, discount, mask: discounted_scan(values, discount, mask=mask, implementation=name)

    def step_by_step(values: Any, discount: Any, mask: Any) -> Any:
        def step(state: Any, entry: Any) -> Any:
            value, factor, counts = entry
            state = jnp.where(counts, value + factor * state, state)
            return state, jnp.where(counts, state, 0)

        return jax.lax.scan(step, jnp.zeros(rows), (values.T, discount.T, mask.T), reverse=True)[1].T

    def associative(values: Any, discount: Any, mask: Any) -> Any:
        def compose(first: Any, second: Any) -> Any:
            return second[0] * first[0], second[1] + second[0] * first[1]

        maps = jnp.where(mask, discount, 1), jnp.where(mask, values, 0)
        return jnp.where(mask, jax.lax.associative_scan(compose, maps, reverse=True, axis=1)[1], 0)

    entries, not_run = our_versions(ours, arrays, cotangent, differentiated=1)
    work = least_work((0, 0), arrays, (cotangent,), (values,))
    entries += [
        alternative("jax.lax.scan", step_by_step, arrays, cotangent, differentiated=1),
        alternative("jax.lax.associative_scan", associative, arrays, cotangent, differentiated=1),
        copy_alternative(work[FORWARD].bytes),
    ]
    shape_text = f"[{rows}, {length}] float32, discount per entry, mask; gradient of values"
    return Case("discounted_scan", shape_text, work, entries, not_run)


def policy_loss_case(torch: bool, *, rows: int, length: int) -> Case:
    """Dual clip, a KL term and an entropy bonus; gradients of log-probs and entropy."""
    shape = (rows, length)
    old = -jnp.abs(normal(0, shape))
    logprobs, reference = old + 0.3 * normal(1, shape), old + 0.2 * normal(2, shape)
    entropy, advantages = jnp.abs(normal(3, shape)), normal(4, shape)
    mask = jax.random.bernoulli(jax.random.key(5), 0.8, shape)
    arrays = logprobs, entropy, old, reference, advantages, mask

    def ours(name: str | None) -> Callable[..., Any]:
        def loss(logprobs: Any, entropy: Any, old: Any, reference: Any, advantages: Any, mask: Any) -> Any:
            options = {"ref_logprobs": reference, "kl_coefficient": 0.1, "entropy_coefficient": 0.01}
            options |= {"entropy": entropy, "dual_clip": 3.0, "implementation": name}
            return fused_policy_loss(logprobs, old, advantages, mask, **options)

        return loss

    def plain(logprobs: Any, entropy: Any, old: Any, reference: Any, advantages: Any, mask: Any) -> Any:
        def mean(terms: Any) -> Any:
            return jnp.sum(jnp.where(mask, terms, 0)) / jnp.sum(mask)

        log_ratio = jnp.clip(logprobs - old, -20, 20)
        ratio = jnp.exp(log_ratio)
        clipped = jnp.clip(ratio, 0.8, 1.2)
        terms = jnp.maximum(-advantages * ratio, -advantages * clipped)
        terms = jnp.where(advantages < 0, jnp.minimum(terms, -3.0 * advantages), terms)
        difference = logprobs - reference
        kl = jnp.exp(-difference) - 1 + difference
        metrics = {
            "ratio_mean": mean(ratio),
            "ratio_min": jnp.min(jnp.where(mask, ratio, jnp.inf)),
            "ratio_max": jnp.max(jnp.where(mask, ratio, -jnp.inf)),
            "clip_fraction": mean((-advantages * clipped > -advantages * ratio).astype(jnp.float32)),
            "approx_kl_k1": mean(-log_ratio),
            "approx_kl_k3": mean(ratio - 1 - log_ratio),
            "kl": mean(kl),
            "entropy": mean(entropy),
        }
        return mean(terms) + 0.1 * mean(kl) - 0.01 * mean(entropy), metrics

    def with_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.value_and_grad(function, argnums=(0, 1), has_aux=True)

    entries, not_run = our_versions(lambda name: with_gradient(ours(name)), arrays, passes=BOTH)
    # One call gives both: every array is read once and both gradients are written once.
    num_bytes = size_of(arrays, logprobs, entropy)
    entries += [alternative("plain XLA", with_gradient(plain), arrays, passes=BOTH), copy_alternative(num_bytes, BOTH)]
    shape_text = f"[{rows}, {length}] float32, dual clip, KL, entropy; loss, metrics and gradients in one call"
    return Case("fused_policy_loss", shape_text, {BOTH: Work(0, num_bytes)}, entries, not_run, compared=BOTH)


def sampling_case(torch: bool, *, rows: int, vocab: int, filters: dict[str, Any], with_logprob: bool = True) -> Case:
    """One token a row: with its log-prob, or the token alone."""
    logits = 2 * normal(0, (rows, vocab))
    key = jax.random.key(1)
    arrays = logits, key

    def result(token: Any, logprob: Callable[[], Any]) -> Any:
        return (token, logprob()) if with_logprob else token

    def ours(name: str | None) -> Callable[..., Any]:
        def draw(logits: Any, key: Any) -> Any:
            tokens, logprobs = sample_tokens(logits, key, **filters, implementation=name)
            return result(tokens, lambda: logprobs)

        return draw

    def categorical(logits: Any, key: Any) -> Any:
        kept = _filter_by_sorting(logits, **filters) if filters else logits
        token = jax.random.categorical(key, kept)
        return result(token, lambda: jnp.take_along_axis(jax.nn.log_softmax(kept), token[:, None], axis=1))

    entries, not_run = our_versions(ours, arrays)
    label = "jax.random.categorical" + (" after filters by sorting" if filters else "")
    work = {FORWARD: Work(0, logits.size * 4)}
    entries += [alternative(label, categorical, arrays), copy_alternative(work[FORWARD].bytes)]
    options = ", ".join(f"{name} {value}" for name, value in filters.items()) or "no filter"
    shape_text = f"[{rows}, {vocab}] float32, {options}, {'token and log-prob' if with_logprob else 'token alone'}"
    return Case("sample_tokens", shape_text, work, entries, not_run, compared=None)


def _filter_by_sorting(logits: Any, *, top_k: int, top_p: float, min_p: float) -> Any:
    """Minus infinity where a filter excludes a token, as one writes it without a kernel."""
    descending = -jnp.sort(-logits, axis=-1)
    logits = jnp.where(logits >= descending[:, top_k - 1 : top_k], logits, -jnp.inf)
    probs = jax.nn.softmax(jnp.where(jnp.arange(logits.shape[1]) < top_k, descending, -jnp.inf), axis=-1)
    last = jnp.sum(jnp.cumsum(probs, axis=-1) - probs < top_p, axis=-1, keepdims=True) - 1
    logits = jnp.where(logits >= jnp.take_along_axis(descending, last, axis=1), logits, -jnp.inf)
    return jnp.where(logits >= descending[:, :1] + jnp.log(min_p), logits, -jnp.inf)
