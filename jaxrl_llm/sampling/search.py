"""From several samples to one answer, and the likeliest sequences: best of n, self-consistency, beam search."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxrl_llm.models.decoder import Model, output_logits, replace_prefix
from jaxrl_llm.sampling.constraints import Constraint, allowed_tokens, next_states, start_states
from jaxrl_llm.sampling.slots import check_sizes, prefill
from jaxrl_llm.types import Params


class Vote(NamedTuple):
    """A group's answer, the share of its samples that gave it, and the row of the first of these. Where no sample has
    an answer: None, 0, and the group's first row."""

    answer: Hashable
    share: float
    row: int


class Beams(NamedTuple):
    """The best sequences of each prompt, the best first. One that was not found has length 0 and score -inf."""

    tokens: Int[Array, "P K M"]  # the end token included, 0 behind it
    lengths: Int[Array, "P K"]
    logprobs: Float[Array, "P K"]  # summed, in nats
    scores: Float[Array, "P K"]  # logprobs / lengths ** length_penalty


def best_of_n(scores: ArrayLike, group_ids: ArrayLike) -> Int[np.ndarray, "P"]:
    """The row of the highest score in each group, the first of equal ones; groups in the order of their ids.

        rows = best_of_n(reward_model(rollout), rollout.group_ids)
        best = jax.tree.map(lambda x: x[rows], rollout)

    A row with the score NaN is taken only where a group has no other.
    """
    scores, group_ids = np.asarray(scores, np.float64), np.asarray(group_ids)
    order = np.lexsort((np.arange(len(scores)), np.where(np.isnan(scores), np.inf, -scores), group_ids))
    first = np.unique(group_ids[order], return_index=True)[1]
    return order[first]


def self_consistency(answers: Sequence[Hashable], group_ids: ArrayLike) -> list[Vote]:
    """What most samples of each group say, the earliest of equally frequent answers; groups in the order of their ids.

    Source: Wang et al. 2023, https://arxiv.org/abs/2203.11171.

    Args:
      answers: as parsed from each sample; None where nothing could be, which is no vote but counts for the share.
      group_ids: [B].
    """
    groups = np.asarray(group_ids)
    found = []
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group).tolist()
        votes = Counter(answers[row] for row in rows if answers[row] is not None)
        # of equals the one that came first
        answer, count = votes.most_common(1)[0] if votes else (None, 0)
        found.append(Vote(answer, count / len(rows), next(row for row in rows if answers[row] == answer)))
    return found


def beam_search(
    model: Model,
    params: Params,
    prompts: Int[Array, "P L"],
    lengths: Int[Array, "P"],
    *,
    num_beams: int,
    max_tokens: int,
    end: Sequence[int] = (),
    constraint: Constraint | None = None,
    renormalize: bool = False,
    length_penalty: float = 0.0,
) -> Beams:
    """The `num_beams` sequences of the highest score behind each prompt, as far as a beam of this width finds them.

    They are the exact ones if there are never more beginnings than beams. Finished sequences are kept apart from the
    beam; the search stops once nothing in it can overtake them.

    Args:
      prompts, lengths: padded prompts.
      num_beams: K, sequences that are gone on from, and that are returned.
      max_tokens: M. What is not finished then counts as finished, unless a constraint asks for more.
      end: tokens that finish a sequence.
      constraint: what may be written; a sequence is finished where it leaves the automaton. Of the constraint's
        `choices` those of the prompt's place hold.
      renormalize: under a constraint, sum log-probs of the constrained distribution (`Rollout.logprobs`) rather than
        those of the free one (`Rollout.free_logprobs`), under which sequences are what they are without it.
      length_penalty: scores are `logprobs / length ** length_penalty`: 0 is the plain sum, 1 the mean.

    Raises:
      ValueError: a size is not positive, `length_penalty` is negative, or the constraint is for another vocabulary.
    """
    check_sizes(num_beams=num_beams, max_tokens=max_tokens, num_prompts=len(prompts))
    if length_penalty < 0:
        raise ValueError(f"length_penalty must be at least 0, got {length_penalty}; 0 ranks by the plain sum")
    if constraint is not None and constraint.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the constraint is for {constraint.vocab_size} tokens, the model has {model.config.vocab_size}"
        )
    return _beams(
        params, jnp.asarray(prompts), jnp.asarray(lengths), constraint, model=model, num_beams=num_beams,
        max_tokens=max_tokens, end=tuple(map(int, end)), renormalize=renormalize, length_penalty=length_penalty,
    )  # fmt: skip


@functools.partial(
    jax.jit, static_argnames=("model", "num_beams", "max_tokens", "end", "renormalize", "length_penalty")
)
def _beams(
    params: Params,
    prompts: Int[Array, "P L"],
    lengths: Int[Array, "P"],
    constraint: Constraint | None,
    *,
    model: Model,
    num_beams: int,
    max_tokens: int,
    end: tuple[int, ...],
    renormalize: bool,
    length_penalty: float,
) -> Beams:
    num_prompts, width = prompts.shape
    prefix = prefill(model, params, prompts, lengths, num_prompts)
    prefix = jax.tree.map(lambda x: jnp.repeat(x, num_beams, axis=0), prefix)
    cache = model.init_cache(num_prompts * num_beams, width + max_tokens, prefix[0]["keys"].dtype)
    cache = replace_prefix(cache, prefix, jnp.ones(num_prompts * num_beams, bool))
    shape = (num_prompts, num_beams)
    nothing = jnp.full(shape, -jnp.inf)
    last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)  # fed again, for its logits
    empty = jnp.zeros((*shape, max_tokens), prompts.dtype)
    states = jnp.zeros(num_prompts, int)
    if constraint is not None:
        states = start_states(constraint, jnp.arange(num_prompts))
    beam = {
        "last": jnp.broadcast_to(last, shape),
        "tokens": empty,
        "logprobs": nothing.at[:, 0].set(0.0),  # all begin alike: one of them does
        "states": jnp.broadcast_to(states[:, None], shape),
    }
    finished = Beams(empty, jnp.zeros(shape, int), nothing, nothing)

    def next_logprobs(step: Any, beam: Any, cache: Any) -> tuple[Float[Array, "P K V"], Any]:
        positions = jnp.repeat(lengths - 1, num_beams)[:, None] + step
        hidden, cache = model.apply(params, beam["last"].reshape(-1, 1), positions=positions, cache=cache)
        logits = output_logits(model, params, hidden[:, 0])
        logprobs = jax.nn.log_softmax(logits)
        if constraint is not None:
            allowed = allowed_tokens(constraint, beam["states"].reshape(-1))
            if renormalize:
                logprobs = jax.nn.log_softmax(jnp.where(allowed, logits, -jnp.inf))
            logprobs = jnp.where(allowed, logprobs, -jnp.inf)
        return logprobs.reshape(*shape, -1), cache

    def advance(carry):
        step, beam, finished, cache = carry
        logprobs, cache = next_logprobs(step, beam, cache)
        vocab = logprobs.shape[-1]
        totals = (beam["logprobs"][..., None] + logprobs).reshape(num_prompts, -1)
        # twice as many as there are beams, so that those that end leave enough to go on with
        values, places = jax.lax.top_k(totals, min(2 * num_beams, totals.shape[1]))
        origin, token = places // vocab, (places % vocab).astype(prompts.dtype)
        tokens = _take(beam["tokens"], origin).at[:, :, step].set(token)
        states = _take(beam["states"], origin)
        ended, free = jnp.isin(token, jnp.array(end, prompts.dtype)), jnp.ones(token.shape, bool)
        if constraint is not None:
            after = next_states(constraint, states.reshape(-1), token.reshape(-1)).reshape(states.shape)
            ended, free, states = ended | (states >= 0) & (after < 0), after < 0, after
        ended = ended | (free & (step == max_tokens - 1))

        scores = jnp.where(ended, values / (step + 1) ** length_penalty, -jnp.inf)
        new = Beams(tokens, jnp.full(scores.shape, step + 1), values, scores)
        both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), finished, new)
        finished = _take(both, jax.lax.top_k(both.scores, num_beams)[1])

        going, kept = jax.lax.top_k(jnp.where(ended, -jnp.inf, values), num_beams)
        beam = _take({"last": token, "tokens": tokens, "states": states}, kept) | {"logprobs": going}
        rows = jnp.arange(num_prompts)[:, None] * num_beams + _take(origin, kept)
        return step + 1, beam, finished, jax.tree.map(lambda x: x[rows.reshape(-1)], cache)

    def can_improve(carry):
        step, beam, finished, _ = carry
        # log-probs only fall, and no sequence is longer than max_tokens
        best = jnp.max(beam["logprobs"], axis=1) / max_tokens**length_penalty
        return (step < max_tokens) & jnp.any(best > finished.scores[:, -1])

    _, _, finished, _ = jax.lax.while_loop(can_improve, advance, (jnp.int32(0), beam, finished, cache))
    found = finished.scores > -jnp.inf
    return Beams(
        jnp.where(found[..., None], finished.tokens, 0), jnp.where(found, finished.lengths, 0),
        jnp.where(found, finished.logprobs, -jnp.inf), finished.scores,
    )  # fmt: skip


def _take(tree: Any, places: Int[Array, "P N"]) -> Any:
    """Entries of the second axis, for each prompt its own."""
    return jax.tree.map(lambda x: jax.vmap(lambda line, place: line[place])(x, places), tree)
