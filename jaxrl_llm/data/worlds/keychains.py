"""Long windows of facts with something to find: a fact, a fact about a fact, or a question at the end of a key chain.

A window is a sequence of pieces: documents `FACT name other` and pairs `KEY key next`. In our windows every name has
one fact, which leads to another name or to a value; a chain of keys ends in a name. `ASK start` asks where it all leads
to: `next next ... value` written down step by step, and an end. Tokens: marks, values, names, keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

PAD, EOS, ASK, FACT, KEY = range(5)
FIRST_VALUE, VALUES, NAMES, KEYS = 5, 16, 84, 32
FIRST_NAME = FIRST_VALUE + VALUES
FIRST_KEY = FIRST_NAME + NAMES
VOCAB_SIZE = FIRST_KEY + KEYS
KINDS = ("needle", "qa", "keychain")  # one fact; a fact about a fact; such a question, hidden behind keys


class Question(NamedTuple):
    """What is hidden at the end of a chain."""

    tokens: Sequence[int]
    answer: Any


def link_chain(keys: Sequence[Sequence[int]], question: Sequence[int]) -> list[list[int]]:
    """The pairs `KEY key next` of a chain, whose last one holds the question.

    Raises:
      ValueError: no key, or a key that comes twice, which would close the chain to a loop.
    """
    names = [tuple(key) for key in keys]
    repeated = next((key for key in names if names.count(key) > 1), None)
    if not names or repeated is not None:
        raise ValueError(
            f"a chain needs keys that are all different, got {names}" + f", {repeated} twice" * bool(names)
        )
    return [[KEY, *key, *following] for key, following in zip(names, [*names[1:], tuple(question)], strict=True)]


def make_keychain(
    rng: np.random.Generator,
    *,
    question: Question,
    other_questions: Sequence[Question],
    documents: Sequence[Sequence[int]],
    window: int,
    num_chains: int,
    hops: int,
    key_len: int = 1,
    key_ids: Sequence[int] = range(FIRST_KEY, FIRST_KEY + KEYS),
) -> tuple[Int[np.ndarray, "L"], tuple[int, ...], Any]:
    """A window of at most `window` tokens in which a question is hidden (LoongRL 2025): `(tokens, head key, answer)`.

    From the head key, `hops` pairs lead to the question; `num_chains - 1` other chains lead to other questions. The
    pairs lie at random places between the documents. Documents are taken in order as long as they fit, so that those
    which the answer needs come first, and distractors after them; then they are shuffled. For text, give tokens of a
    tokenizer, `key_len` 32 and the tokens of the hexadecimal digits.

    Raises:
      ValueError: pairs and first document do not fit, there are too few other questions or possible keys, or a size is
        below 1.
    """
    if min(num_chains, hops, key_len) < 1:
        raise ValueError(f"num_chains={num_chains}, hops={hops} and key_len={key_len} must be at least 1")
    if len(other_questions) < num_chains - 1:
        raise ValueError(f"num_chains={num_chains} needs {num_chains - 1} other questions, got {len(other_questions)}")
    keys = _different_keys(rng, num_chains * hops, key_len, key_ids)
    asked = [question, *other_questions[: num_chains - 1]]
    chains = [link_chain(keys[i * hops : (i + 1) * hops], one.tokens) for i, one in enumerate(asked)]
    pieces: list[Sequence[int]] = [pair for chain in chains for pair in chain]
    size = sum(map(len, pieces))
    if size + len(documents[0] if documents else ()) > window:
        raise ValueError(
            f"{num_chains} chains of {hops} pairs take {size} tokens, which leaves too little of a window of {window}; "
            "raise window, or lower num_chains or hops"
        )
    for document in documents:
        if size + len(document) > window:
            break
        pieces.append(document)
        size += len(document)
    shuffled = [pieces[i] for i in rng.permutation(len(pieces))]
    return np.concatenate(shuffled).astype(np.int32), keys[0], question.answer


def _different_keys(
    rng: np.random.Generator, number: int, key_len: int, key_ids: Sequence[int]
) -> list[tuple[int, ...]]:
    """Keys drawn from all `len(key_ids) ** key_len`, none twice."""
    if number > len(key_ids) ** key_len:
        raise ValueError(f"{number} different keys of {key_len} tokens need more than {len(key_ids)} key_ids")
    keys: dict[tuple[int, ...], None] = {}
    while len(keys) < number:
        keys[tuple(key_ids[i] for i in rng.integers(len(key_ids), size=key_len))] = None
    return list(keys)


def make_long_questions(
    rng: np.random.Generator,
    number: int,
    *,
    windows: Sequence[int],
    mix: dict[str, float],
    tokens_per_chain: int = 32,
    hops: int = 4,
    asked: int = 1,
) -> dict[str, np.ndarray]:
    """Random windows, each with a question of a kind drawn from `mix` (shares by kind), and of a length from
    `windows`, each equally often.

    Windows with keys have a chain for every `tokens_per_chain` tokens.

    Returns:
      `prompt_tokens` int32[number, max(windows)] with the question at the end, `prompt_length`, `answer`, `kind` (place
      in KINDS) and `window` int32[number]; and `trails` int32[number, asked, hops + 4]: what is asked, the steps to the
      value and the end, of this question and, as far as there are any, of others that share no fact with it.

    Raises:
      ValueError: an unknown kind, no share above 0, or windows that are too short or have more names than there are.
    """
    shares = np.array([mix.get(kind, 0.0) for kind in KINDS])
    if set(mix) - set(KINDS) or shares.min() < 0 or shares.sum() <= 0:
        raise ValueError(f"mix must have shares from 0 on for kinds among {', '.join(KINDS)}, one above 0; got {mix}")
    if min(windows) < 8 or max(windows) > 3 * NAMES + 7:
        raise ValueError(f"windows must have 8 to {3 * NAMES + 7} tokens, got {tuple(windows)}")
    kinds = rng.choice(len(KINDS), number, p=shares / shares.sum())
    sizes = rng.permutation(np.resize(np.asarray(windows), number))
    prompts, lengths = np.full((number, max(windows)), PAD, np.int32), np.zeros(number, np.int32)
    trails = np.full((number, asked, hops + 4), PAD, np.int32)
    for row, (kind, window) in enumerate(zip(kinds, sizes, strict=True)):
        chains = {"num_chains": math.ceil(window / tokens_per_chain), "hops": hops}
        text, found = _write_window(rng, KINDS[kind], int(window) - 2, **chains)
        lengths[row] = len(text) + 2
        prompts[row, : lengths[row]] = [*text, ASK, found[0][0]]
        for place, trail in zip(trails[row], found, strict=False):
            place[: len(trail) + 1] = [*trail, EOS]
    return {
        "prompt_tokens": prompts,
        "prompt_length": lengths,
        "trails": trails,
        "answer": trails[np.arange(number), 0, np.argmax(trails[:, 0] == EOS, axis=1) - 1],
        "kind": kinds.astype(np.int32),
        "window": sizes.astype(np.int32),
    }


def _write_window(
    rng: np.random.Generator, kind: str, window: int, *, num_chains: int, hops: int
) -> tuple[list[int], list[list[int]]]:
    """A window, and trails from something to ask to a value that have nothing in common, the first of the kind."""
    items = max(window // 6, 1)
    names = (FIRST_NAME + rng.permutation(NAMES)[: 2 * items]).reshape(items, 2).tolist()
    values = (FIRST_VALUE + rng.integers(VALUES, size=items)).tolist()
    trails = [[a, b, value] for (a, b), value in zip(names, values, strict=True)]
    facts = [[FACT, *pair] for a, b, value in trails for pair in ((a, b), (b, value))]
    if kind != "keychain":
        shuffled = [facts[i] for i in rng.permutation(len(facts))]
        return sum(shuffled, []), trails if kind == "qa" else [trail[1:] for trail in trails]
    hidden, *others = [Question(trail[:1], trail[-1]) for trail in trails]
    tokens, head, _ = make_keychain(
        rng,
        question=hidden,
        other_questions=others,
        documents=facts,
        window=window,
        num_chains=num_chains,
        hops=hops,
    )
    follows = dict(zip(tokens[1::3].tolist(), tokens[2::3].tolist(), strict=True))
    heads = [key for key in follows if key >= FIRST_KEY and key not in follows.values()]
    starts = [*head, *(key for key in heads if key != head[0])]
    chained = [_follow(follows, start) for start in starts]
    whole = [trail for trail in chained if trail[-1] < FIRST_NAME]  # of other chains the facts may not fit
    asked = {trail[-3] for trail in whole}
    return tokens.tolist(), whole + [t for t in trails if t[0] not in asked and follows.get(t[1]) == t[2]]


def _follow(follows: dict[int, int], start: int) -> list[int]:
    trail = [start]
    while trail[-1] in follows:
        trail.append(follows[trail[-1]])
    return trail


def demonstrate_trails(
    rng: np.random.Generator, questions: dict[str, np.ndarray], *, stop: float = 0.0
) -> dict[str, np.ndarray]:
    """Windows in which each of the `trails` is asked for in turn, and right steps by a demonstrator who gives up after
    each with the chance `stop`: `tokens`, `mask` (of what is answered) and `lengths`."""
    number, width = questions["prompt_tokens"].shape
    trails = questions["trails"]
    tokens = np.pad(questions["prompt_tokens"], ((0, 0), (0, trails.shape[1] * (trails.shape[2] + 1))))
    mask, lengths = np.zeros(tokens.shape, bool), questions["prompt_length"] - 2
    for row in range(number):
        for trail in trails[row]:
            steps = min(np.argmax(trail == EOS) - 1, rng.geometric(stop) if stop else width)
            if steps < 1:
                continue
            turn = [ASK, *trail[: steps + 1], EOS]
            mask[row, lengths[row] + 2 : lengths[row] + len(turn)] = True
            tokens[row, lengths[row] : lengths[row] + len(turn)] = turn
            lengths[row] += len(turn)
    return {"tokens": tokens, "mask": mask, "lengths": lengths}


def trail_reward(task: dict[str, Any], tokens: Int[Array, "L"], length: Int[Array, ""]) -> Float[Array, ""]:
    """1 if the response ends, and what stands before the end is the answer; else 0."""
    ending = tokens[jnp.maximum(length - 2 + jnp.arange(2), 0)]
    return jnp.where((length >= 2) & (ending[0] == task["answer"]) & (ending[1] == EOS), 1.0, 0.0)
