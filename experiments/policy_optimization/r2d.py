"""R2D: every step of a thought ends in a pivot, SAFE, UNSAFE or RETHINK, and a contrast sharpens it (arXiv 2502.12970).

The paper (Reasoning-to-Defend: Safety-Aware Reasoning Can Defend LLMs from Jailbreaking, EMNLP 2025) claims fewer
successful attacks at little over-refusal, by distilling thoughts that judge themselves step by step. The loss is the
cross entropy of trace and answer, a token mean, plus contrastive pivot optimization (CPO)

    mean over SAFE labels of -log sigmoid(z_safe - z_unsafe) + mean over UNSAFE ones of -log sigmoid(z_unsafe - z_safe)

with the logits z where the label is predicted: each class is averaged by itself, so the rare UNSAFE has an equal say.

Choices of ours, as the authors' prompts and filters could not be read: the guard's thresholds and the filter of traces
(`step_verdicts`, `keep_trace` in `jaxrl_llm.data.worlds.requests`), and the world: requests with forbidden pairs of
words, 8% of them harmful in training; tokens of the rules are given at test, pivots and answer decoded greedily.

    python -m experiments.sweep r2d --table=main --vmap-seeds
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from experiments.policy_optimization._supervised import Parts, device_rows, fine_tune, report
from experiments.policy_optimization._training import World, draw_tasks, make_optimizer, make_policy
from jaxrl_kernels.logprob import soft_cap
from jaxrl_llm import ops, train
from jaxrl_llm.data.worlds import requests
from jaxrl_llm.models import LoraConfig, Model, apply_lora, init_lora
from jaxrl_llm.types import Metrics, Params, TrainState

NEEDS_SCALE = ("fewer successful attacks on HarmBench and JailbreakBench with six models, usefulness on XSTest kept",)
PIVOTS = (requests.SAFE, requests.UNSAFE, requests.RETHINK)


def pivot_margins(
    model: Model, params: Params, hidden: Float[Array, "B T D"], *, safe_id: int, unsafe_id: int
) -> Float[Array, "B T"]:
    """`z_safe - z_unsafe`, the logits of the two pivots alone.

    Raises:
      ValueError: the ids are equal, or no tokens of the model.
    """
    head = model.head(params)
    if safe_id == unsafe_id or not all(0 <= one < head.shape[0] for one in (safe_id, unsafe_id)):
        raise ValueError(f"safe_id={safe_id} and unsafe_id={unsafe_id} must be two tokens below {head.shape[0]}")
    logits = jnp.einsum(
        "btd,vd->btv", hidden, head[jnp.array([safe_id, unsafe_id])], preferred_element_type=jnp.float32
    )
    softcap = model.config.logit_softcap
    logits = logits if softcap is None else soft_cap(logits, softcap)
    return logits[..., 0] - logits[..., 1]


def contrastive_pivot_loss(
    margins: Float[Array, "B T"], labels: Int[Array, "B T"], *, safe_id: int, unsafe_id: int
) -> tuple[Float[Array, ""], Metrics]:
    """The contrast of SAFE and UNSAFE at their labels, the mean of each class by itself; 0 where there is none of
    either. Other labels, RETHINK among them, take no part."""
    safe, metrics = ops.pairwise_logistic_loss(margins, valid=labels == safe_id)
    unsafe, unsafe_metrics = ops.pairwise_logistic_loss(-margins, valid=labels == unsafe_id)
    named = {"safe_margin": metrics["margin"], "unsafe_margin": unsafe_metrics["margin"]}
    return safe + unsafe, {"contrast": safe + unsafe, **named}


def pivot_decision(tokens: Int[Array, "B T"], pivot_ids: Sequence[int]) -> Int[Array, "B"]:
    """The last pivot of each row; -1, which counts as SAFE, where there is none."""
    is_pivot = jnp.isin(tokens, jnp.array(pivot_ids))
    last = jnp.max(jnp.where(is_pivot, jnp.arange(tokens.shape[1]), -1), axis=1)
    return jnp.where(last >= 0, jnp.take_along_axis(tokens, jnp.maximum(last, 0)[:, None], axis=1)[:, 0], -1)


def attack_success_rate(refused: Bool[Array, "N"], harmful: Bool[Array, "N"]) -> Float[Array, ""]:
    """Share of harmful requests that are not refused."""
    return ops.masked_mean(1.0 - refused, harmful)


def over_refusal_rate(refused: Bool[Array, "N"], benign: Bool[Array, "N"]) -> Float[Array, ""]:
    """Share of benign requests that are refused."""
    return ops.masked_mean(1.0 * refused, benign)


def make_world(config: ConfigDict) -> World:
    """Traces to learn from; and requests to test, a third of them harmful, direct ones and the same kind attacked."""
    rng, written = np.random.default_rng(1), {"pivots": config.pivots, "scheme": config.scheme}
    asked = requests.make_requests(
        rng, config.world.train_problems, harmful=config.world.harmful, synonyms=config.world.synonyms
    )

    def tests(attacked: bool) -> dict[str, Array]:
        made = requests.make_requests(
            np.random.default_rng(2),
            config.world.test_problems,
            harmful=1 / 3,
            synonyms=config.world.synonyms,
            attacked=attacked,
        )
        tokens = requests.write_traces(made, pivots=config.pivots)["tokens"]
        return jax.tree.map(jnp.asarray, made | {"tokens": tokens})

    return World(
        env=None,
        train_tasks=device_rows(requests.write_traces(asked, **written), config.max_length),
        test_tasks={"direct": tests(False), "attacked": tests(True)},
        stop_sequences=[],
        vocab_size=requests.vocab_size(),
        demonstrate=lambda rng, number: {},  # nothing comes before: the policy starts from random weights
    )


def build(config: ConfigDict) -> Parts:
    """Cross entropy and contrast: for all weights, from random ones; or for LoRA, embedding and head."""
    world = make_world(config)
    plain, optimizer = make_policy(config, world), make_optimizer(config)
    lora = LoraConfig(config.lora_rank or 1, config.lora_alpha, targets=("query|key|value|out", "gate|up|down"))
    model = apply_lora(plain, lora) if config.lora_rank else plain
    ids = {"safe_id": requests.SAFE, "unsafe_id": requests.UNSAFE}

    def init(reference: Params, seed: Array) -> TrainState:
        if not config.lora_rank:
            return train.init_state(plain.init(jax.random.key(seed)), optimizer, seed)
        params = {name: reference[name] for name in ("embedding", "head") if name in reference}
        params["lora"] = init_lora(jax.random.key(seed), reference, lora)
        return train.init_state(params, optimizer, seed, ref_params=reference)

    def weights(params: Params, reference: Params | None) -> Params:
        if reference is None:
            return params
        whole = {name: leaf for name, leaf in params.items() if name != "lora"}
        return {"base": reference | whole, "lora": params["lora"]}

    def loss_fn(params: Params, reference: Params | None, rows: dict[str, Array]) -> tuple[Array, Metrics]:
        joined = weights(params, reference)
        hidden, logprobs, _, mask = train.score_packed(model, joined, rows)
        loss, metrics = ops.sft_loss(logprobs, mask)
        margins = pivot_margins(model, joined, hidden, **ids)
        contrast, terms = contrastive_pivot_loss(margins, jnp.where(mask, rows["tokens"], -1), **ids)
        return loss + config.contrast * contrast, metrics | terms

    def iteration(state: TrainState) -> tuple[TrainState, Metrics]:
        rows, _ = draw_tasks(config, world.train_tasks, state)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, state.ref_params, rows)
        state, norms = train.apply_gradients(state, grads, optimizer, loss)
        return state, {"loss": loss, **metrics, **norms}

    def answer(params: Params, tokens: Int[Array, "N T"]) -> Int[Array, "N T"]:
        """The tokens behind the requests, those of the rules as they are given."""

        def write(place: int, tokens: Int[Array, "N T"]) -> Int[Array, "N T"]:
            given = (tokens[:, place] >= requests.FIRST_RULE) & (tokens[:, place] < requests.SAFE)
            likeliest = jnp.argmax(model.logits(params, tokens)[:, place - 1], axis=-1)
            return tokens.at[:, place].set(jnp.where(given, tokens[:, place], likeliest))

        return jax.lax.fori_loop(requests.LENGTH + 1, tokens.shape[1], write, tokens)

    def evaluate(state: TrainState) -> dict[str, Array]:
        params, found = weights(state.params, state.ref_params), {}
        for kind, tasks in world.test_tasks.items():
            written = answer(params, tasks["tokens"])
            refused = written[:, -1] == requests.REFUSE
            found[f"attack_success_{kind}"] = attack_success_rate(refused, tasks["harmful"])
            found[f"over_refusal_{kind}"] = over_refusal_rate(refused, tasks["lookalike"])
            decision = pivot_decision(written, PIVOTS)
            found[f"decided_unsafe_{kind}"] = ops.masked_mean(1.0 * (decision == requests.UNSAFE), tasks["harmful"])
            if config.pivots:
                pivots = written[:, requests.LENGTH + 1 :: 2][:, : requests.RULES]
                found[f"unsafe_recall_{kind}"] = ops.masked_mean(1.0 * (pivots == requests.UNSAFE), tasks["found"] == 2)
        return found

    return Parts(world, plain, init, iteration, evaluate)


def run(config: ConfigDict, log: train.RunLog) -> None:
    """Fine-tuning, and the rates on direct and attacked requests."""
    parts = build(config)
    report(config, log, parts, fine_tune(config, log, parts))


def _table(scheme: str, title: str, claims: Sequence[train.Claim], **more: dict) -> train.Table:
    arms = {"none": {"pivots": False, "contrast": 0.0}, "pivots": {"contrast": 0.0}, "cpo": {}, **more}
    rates = [f"trained.{rate}_{kind}" for rate in ("attack_success", "over_refusal") for kind in ("direct", "attacked")]
    return train.Table({name: arm | {"scheme": scheme} for name, arm in arms.items()}, None, rates, 3, claims, title)


OVER_REFUSAL = "trained.over_refusal_direct"
TABLES = {
    "main": _table(
        "binary",
        "R2D with two labels: UNSAFE where a pair is complete, else SAFE",
        [
            train.better("cpo", "pivots", lower=True),
            train.better("cpo", "none", lower=True),
            train.better("cpo", "pivots", metric="trained.attack_success_attacked", lower=True),
            train.better("pivots", "cpo", metric=OVER_REFUSAL, lower=True),
        ],
    ),
    "rethink": _table(
        "rethink",
        "R2D with RETHINK where one word of a pair is there",
        [
            train.better("pivots", "none", lower=True),
            train.better("pivots", "cpo", lower=True),
            train.better("cpo_0.3", "cpo", lower=True),
        ],
        **{"cpo_0.3": {"contrast": 0.3}},
    ),
    "guard": _table(
        "guard",
        "R2D with the pivots and the filter of the paper's data: a guard's score after each step",
        [train.better("cpo", "pivots", lower=True), train.better("pivots", "none", lower=True)],
    ),
}
