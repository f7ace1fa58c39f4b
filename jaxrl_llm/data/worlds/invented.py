"""Invented cities and countries, as tokens: the geography world's own sentences about places that do not exist.

A name or value is a random sequence of the tokens that real ones of its kind are made of. A model that reads of such
places can learn to copy what it reads, and no facts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from jaxrl_llm.data.worlds import geography
from jaxrl_llm.data.worlds.geography import COUNTRY_RELATIONS
from jaxrl_llm.models.tokenizer import Tokenizer

Tokens = list[int]
CITY_FIELDS = ("name", "country", "time zone")
COUNTRY_FIELDS = ("name", *COUNTRY_RELATIONS)
_MARKER = "Kenya"  # stands in for a field while a template is tokenized


class Inventory(NamedTuple):
    """The tokens that a kind of name is made of, with probabilities, and how many follow the first token of a word."""

    first: tuple[np.ndarray, np.ndarray]
    later: tuple[np.ndarray, np.ndarray]
    num_later: np.ndarray  # probability of 0, 1, 2, ... further tokens
    num_words: np.ndarray  # probability of 1, 2, ... words


class Templates(NamedTuple):
    """The world's sentences, tokenized: the pieces around and between their fields."""

    city: list[Tokens]
    country: list[Tokens]
    questions: dict[tuple[int, str], list[list[Tokens]]]  # by hops and relation, one for each phrasing
    relation_words: dict[str, Tokens]


def template_pieces(tokenizer: Tokenizer, template: str) -> list[Tokens]:
    """Tokens of `template` around its `{}` fields: pieces and field values in turn are the tokens of the filled text.

    That holds where a value begins a word, as values do here.
    """
    marker = tokenizer.encode(_MARKER)
    pieces: list[Tokens] = [[]]
    rest = tokenizer.encode(template.replace("{}", _MARKER))
    while rest:
        if rest[: len(marker)] == marker:
            pieces.append([])
            rest = rest[len(marker) :]
        else:
            pieces[-1].append(rest.pop(0))
    return pieces


def fill(pieces: list[Tokens], values: Sequence[Tokens]) -> Tokens:
    """A template with its values."""
    tokens = list(pieces[0])
    for value, piece in zip(values, pieces[1:], strict=True):
        tokens += value
        tokens += piece
    return tokens


@cache
def world_templates(tokenizer: Tokenizer) -> Templates:
    """The sentences of the world as tokens with gaps, made once for a tokenizer."""
    empty_city = geography.City("{}", "{}", "{}")
    empty_country = geography.Country("{}", "{}", "{}", "{}", "{}", "{}", "")
    asked = [(hops, relation) for hops, relations in geography.RELATIONS_BY_HOPS.items() for relation in relations]
    return Templates(
        city=template_pieces(tokenizer, geography.city_passage(empty_city)),
        country=template_pieces(tokenizer, geography.country_passage(empty_country)),
        questions={key: [template_pieces(tokenizer, t) for t in geography.question_phrasings(*key)] for key in asked},
        relation_words={relation: tokenizer.encode(relation) for relation in geography.RELATIONS},
    )


def _inventory(
    tokenizer: Tokenizer, values: Sequence[str], most_later: int, most_words: int, marks: str = ""
) -> Inventory:
    """The tokens of `values` but for `marks`, each with a probability proportional to the square root of its count, so
    that rare ones are seen often enough to be copied."""
    first: Counter[int] = Counter()
    later: Counter[int] = Counter()
    num_later = np.zeros(most_later + 1)
    num_words = np.zeros(most_words)
    for tokens in tokenizer.encode_batch(values):
        tokens = [token for token in tokens if tokenizer.pieces[token] not in marks]
        starts = [i for i, token in enumerate(tokens) if tokenizer.pieces[token].startswith("▁")]
        num_words[min(len(starts), most_words) - 1] += 1
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            first[tokens[start]] += 1
            later.update(tokens[start + 1 : end])
            num_later[min(end - start - 1, most_later)] += 1

    def table(counts: Counter[int]) -> tuple[np.ndarray, np.ndarray]:
        weights = np.sqrt(np.array(list(counts.values()), float))
        return np.array(list(counts), np.int32), np.cumsum(weights / max(weights.sum(), 1e-9))

    return Inventory(table(first), table(later), num_later / num_later.sum(), num_words / num_words.sum())


@cache
def world_inventories(tokenizer: Tokenizer) -> dict[str, Inventory]:
    """What the real world's names and values are made of."""
    countries, cities = geography.load_geography()
    names = [*geography.geography_passages()[0], *(c.capital for c in countries)]
    return {
        "name": _inventory(tokenizer, names, 6, 5),
        "currency": _inventory(tokenizer, sorted({c.currency for c in countries}), 4, 2),
        "continent": _inventory(tokenizer, sorted({c.continent for c in countries}), 0, 2),
        "language": _inventory(tokenizer, [c.language for c in countries if c.language], 2, 1),
        "domain": _inventory(tokenizer, [c.domain for c in countries if c.domain], 2, 1, marks="."),
        "time zone": _inventory(tokenizer, sorted({city.timezone for city in cities}), 4, 1, marks="/_-"),
    }


def _draw(rng: np.random.Generator, table: tuple[np.ndarray, np.ndarray], num: int) -> list[int]:
    ids, cumulative = table
    return ids[np.minimum(np.searchsorted(cumulative, rng.random(num)), len(ids) - 1)].tolist() if num else []


def _words(rng: np.random.Generator, inventory: Inventory, least_later: int = 0, bare: int = -1) -> Iterator[Tokens]:
    """Random words without end: a first token and at least `least_later` more, at least one behind the token `bare`."""
    while True:
        first = _draw(rng, inventory.first, 1024)
        num_later = rng.choice(len(inventory.num_later), 1024, p=inventory.num_later)
        num_later = np.maximum(num_later, np.where(np.array(first) == bare, 1, least_later))
        later, end = _draw(rng, inventory.later, int(num_later.sum())), 0
        for token, count in zip(first, num_later.tolist(), strict=True):
            start, end = end, end + count
            yield [token, *later[start:end]]


def _names(rng: np.random.Generator, inventory: Inventory, bare: int) -> Iterator[Tokens]:
    """Random names of one or more words without end."""
    words = _words(rng, inventory, bare=bare)
    while True:
        for count in rng.choice(len(inventory.num_words), 1024, p=inventory.num_words).tolist():
            name = next(words)
            for _ in range(count):
                name = name + next(words)
            yield name


def _domains(rng: np.random.Generator, inventory: Inventory, dot: Tokens) -> Iterator[Tokens]:
    for word in _words(rng, inventory, least_later=1):
        yield dot + word[1:]


def _time_zones(rng: np.random.Generator, inventory: Inventory, slash: Tokens, underscore: Tokens) -> Iterator[Tokens]:
    """Region/Place, and Region/Place_Place about as often as in the world."""
    words = _words(rng, inventory, least_later=1)
    while True:
        for second in (rng.random(1024) < 0.25).tolist():
            word = next(words)
            yield word[:1] + slash + word[1:] + (underscore + next(words)[1:] if second else [])


def uniforms(rng: np.random.Generator) -> Iterator[float]:
    """Numbers from [0, 1) without end."""
    while True:
        yield from rng.random(4096).tolist()


class Place(NamedTuple):
    """An invented city or country: its fields, and the passage about it."""

    fields: dict[str, Tokens]
    passage: Tokens


class Inventor(NamedTuple):
    """Where invented places come from: an endless supply of values for every field, and the world's sentences."""

    values: dict[str, Iterator[Tokens]]
    templates: Templates


def make_inventor(rng: np.random.Generator, tokenizer: Tokenizer) -> Inventor:
    """An `Inventor` that draws from `rng` in blocks; one seed gives one sequence of places."""
    inventories = world_inventories(tokenizer)
    bare, dot, slash, underscore = (tokenizer.pieces.index(piece) for piece in "▁./_")
    names = _names(rng, inventories["name"], bare)
    return Inventor(
        {
            "name": names,
            "country": names,
            "capital": names,
            **{kind: _names(rng, inventories[kind], bare) for kind in ("currency", "continent", "language")},
            "domain": _domains(rng, inventories["domain"], [bare, dot]),
            "time zone": _time_zones(rng, inventories["time zone"], [slash], [underscore]),
        },
        world_templates(tokenizer),
    )


def invent_place(
    inventor: Inventor, kind: Literal["city", "country"], known: Mapping[str, Tokens] = MappingProxyType({})
) -> Place:
    """A city or country with the `known` fields and new values for the others."""
    fields, template = (
        (CITY_FIELDS, inventor.templates.city) if kind == "city" else (COUNTRY_FIELDS, inventor.templates.country)
    )
    values = {field: known.get(field) or next(inventor.values[field]) for field in fields}
    return Place(values, fill(template, list(values.values())))
