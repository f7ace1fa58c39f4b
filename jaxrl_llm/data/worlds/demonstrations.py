"""Demonstrations of the geography world's format for a supervised warm start, about invented places.

They teach to copy and to keep the format, not facts and not what to do: the places are invented, and the demonstrator's
strategy is noisy. It often answers before it has read the fact, or searches for something useless; what is left to
reinforcement learning is when to search, for what, and when to answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.data.worlds.geography import COUNTRY_RELATIONS, RELATIONS_BY_HOPS
from jaxrl_llm.data.worlds.invented import Inventor, Place, Tokens, fill, invent_place, make_inventor, uniforms
from jaxrl_llm.models.tokenizer import Tokenizer


class Strategy(NamedTuple):
    """How the demonstrator errs; every probability is that of one decision."""

    max_searches: int
    early_answer: float  # to answer with some span at hand where a search is due
    wrong_query: float  # to search for something else where a search is due
    wrong_relation: float  # to answer with another value of the last passage


class _Episode(NamedTuple):
    pieces: list[tuple[Tokens, bool]]  # tokens, and whether the policy wrote them; the first piece is the prompt
    right: bool


def _choice(random: Iterator[float], items: Sequence[Any]) -> Any:
    return items[int(next(random) * len(items))]


def _chain(inventor: Inventor, hops: int, relation: str) -> list[Place]:
    """The places to read in turn; the last one has the field that is asked for."""
    if hops == 1:
        return [invent_place(inventor, "country" if relation in COUNTRY_RELATIONS else "city")]
    city = invent_place(inventor, "city")
    country = invent_place(inventor, "country", {"name": city.fields["country"]})
    if hops == 2:
        return [city, country]
    capital = {"name": country.fields["capital"], "country": country.fields["name"]}
    return [city, country, invent_place(inventor, "city", capital)]


def _useless_passage(inventor: Inventor, random: Iterator[float], field: str, query: Tokens) -> Tokens:
    """What a search for a value or a word may find: a place that has it, or nothing for a word of the question."""
    if field == "relation":
        return [] if next(random) < 0.3 else invent_place(inventor, "country").passage
    if field in ("name", "capital", "time zone"):
        return invent_place(inventor, "city", {"name" if field == "capital" else field: query}).passage
    return invent_place(inventor, "country", {"name" if field == "country" else field: query}).passage


def _play(inventor: Inventor, random: Iterator[float], tags: dict[str, int], hops: int, strategy: Strategy) -> _Episode:
    """One episode. Where a search is due, the demonstrator may answer at once or search for something else."""
    relation = _choice(random, RELATIONS_BY_HOPS[hops])
    chain = _chain(inventor, hops, relation)
    answer, entity = chain[-1].fields[relation], chain[0].fields["name"]
    question = fill(_choice(random, inventor.templates.questions[hops, relation]), [entity])
    pieces = [(question, False)]
    at_hand = [("name", entity), ("relation", inventor.templates.relation_words[relation])]
    passages: dict[tuple[int, ...], Tokens] = {}  # by query, as the same search finds the same passage
    reached = 0
    for searches in range(strategy.max_searches + 1):
        if reached == hops:
            break
        due, chance = chain[reached], next(random)
        if searches == strategy.max_searches or chance < strategy.early_answer:
            answer = _choice(random, [span for _, span in at_hand if span != answer])
            break
        if chance < strategy.early_answer + strategy.wrong_query:
            field, query = _choice(random, [item for item in at_hand if item[1] != due.fields["name"]])
            if tuple(query) not in passages:
                passages[tuple(query)] = _useless_passage(inventor, random, field, query)
        else:
            query = due.fields["name"]
            passages[tuple(query)] = due.passage
            at_hand += due.fields.items()
            reached += 1
        pieces.append(([tags["<search>"], *query, tags["</search>"]], True))
        pieces.append(([tags["<information>"], *passages[tuple(query)], tags["</information>"]], False))
    right = reached == hops
    if right and next(random) < strategy.wrong_relation:
        answer = _choice(random, [span for span in chain[-1].fields.values() if span != answer])
        right = False
    pieces.append(([tags["<answer>"], *answer, tags["</answer>"]], True))
    return _Episode(pieces, right)


def demonstrations(
    rng: np.random.Generator,
    num: int,
    tokenizer: Tokenizer,
    max_length: int,
    *,
    hops: Sequence[int] = (1, 2),
    max_searches: int = 3,
    early_answer: float = 0.3,
    wrong_query: float = 0.15,
    wrong_relation: float = 0.0,
) -> dict[str, np.ndarray]:
    """`num` transcripts of at most `max_length` tokens, padded with token 0.

    Longer ones are drawn again, which favors short episodes where `max_length` is tight: 99% of those of one and two
    hops have up to 132 tokens.

    At each point where a search is due, the demonstrator answers at once with some span at hand (probability
    `early_answer`), or searches for something else (`wrong_query`), and otherwise searches for the right name. When the
    passage with the answer is read, the answer is right, but for `wrong_relation`. With `s = 1 - early_answer -
    wrong_query`, two hops and three searches succeed with probability `s**2 * (1 + 2 * wrong_query)`, 0.39 by default.

    Returns:
      `tokens` int32[num, max_length], `mask` bool[num, max_length] (tokens of the policy), `lengths`, `prompt_lengths`
      and `hops` int32[num], `right` bool[num] (whether the answer is right).

    Raises:
      ValueError: an option is out of range, or `max_length` holds hardly any transcript.
    """
    if not hops or not set(hops) <= set(RELATIONS_BY_HOPS):
        raise ValueError(f"hops must be some of {sorted(RELATIONS_BY_HOPS)}, got {tuple(hops)}")
    if max_searches < 1:
        raise ValueError(f"max_searches must be at least 1, got {max_searches}")
    if min(early_answer, wrong_query) < 0 or early_answer + wrong_query > 1 or not 0 <= wrong_relation <= 1:
        raise ValueError(
            "early_answer, wrong_query, their sum and wrong_relation must lie in [0, 1], got "
            f"{early_answer}, {wrong_query} and {wrong_relation}"
        )
    inventor, random = make_inventor(rng, tokenizer), uniforms(rng)
    strategy = Strategy(max_searches, early_answer, wrong_query, wrong_relation)
    tags = dict(tokenizer.special_ids)
    out = {
        "tokens": np.zeros((num, max_length), np.int32),
        "mask": np.zeros((num, max_length), bool),
        **{name: np.zeros(num, np.int32) for name in ("lengths", "prompt_lengths", "hops")},
        "right": np.zeros(num, bool),
    }
    made = tries = 0
    while made < num and tries < 20 * num:
        tries += 1
        chosen = _choice(random, hops)
        pieces, right = _play(inventor, random, tags, chosen, strategy)
        length = sum(len(tokens) for tokens, _ in pieces)
        if length > max_length:
            continue
        out["tokens"][made, :length] = [token for tokens, _ in pieces for token in tokens]
        end = 0
        for tokens, policy in pieces:
            start, end = end, end + len(tokens)
            out["mask"][made, start:end] = policy
        out["lengths"][made], out["prompt_lengths"][made] = length, len(pieces[0][0])
        out["hops"][made], out["right"][made] = chosen, right
        made += 1
    if made < num:
        raise ValueError(f"only {made} of {tries} transcripts fit into max_length={max_length} tokens; raise it")
    return out
