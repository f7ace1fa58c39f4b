"""Countries and cities of the Earth as a world for search agents: facts, one passage for each entity, and questions.

A question names one entity and asks for a fact that is one or more passages away:

    1 hop   What is the currency of Kenya?
            Kenya -> Shilling
    2 hops  What is the currency of the country that Nairobi lies in?
            Nairobi -> Kenya -> Shilling
    3 hops  What is the time zone of the capital of the country that Mombasa lies in?
            Mombasa -> Kenya -> Nairobi -> Africa/Nairobi

Facts are those of GeoNames (geonames.org, CC BY 4.0), see `jaxrl_llm/data/geography/README.md`. Training and test
questions share no entity: countries are split, and cities follow their country.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from functools import cache
from importlib import resources
from itertools import islice, zip_longest
from typing import Literal, NamedTuple

import numpy as np

from jaxrl_llm.retrieval.bm25 import Bm25Index, bm25_index, top_passages

COUNTRY_RELATIONS = ("capital", "continent", "currency", "domain", "language")
RELATIONS = (*COUNTRY_RELATIONS, "country", "time zone")
RELATIONS_BY_HOPS = {1: RELATIONS, 2: COUNTRY_RELATIONS, 3: ("time zone",)}

# A relation's phrasings; `{}` is what the fact is asked of.
PHRASINGS = {
    relation: (f"What is the {relation} of {{}}?", f"Which {relation} does {{}} have?", f"Name the {relation} of {{}}.")
    for relation in (*COUNTRY_RELATIONS, "time zone")
} | {"country": ("Which country does {} lie in?", "In which country is {}?", "Name the country of {}.")}
COUNTRY_OF_CITY = ("the country that {} lies in", "the country of {}", "the country with the city {}")
CAPITAL_OF_COUNTRY = ("the capital of {}",)

TEST_BYTES = 63  # first bytes of a hash, of 256, that mean test: 49 of the 246 countries

# What the environment says to a turn that neither searches nor answers.
CORRECTION = "No search and no answer. Try again."


class Country(NamedTuple):
    """What is known of a country; text as it stands in passages."""

    name: str
    capital: str
    continent: str
    currency: str
    domain: str  # top-level domain with its dot, e.g. ".ke"; empty if there is none
    language: str  # ISO 639 code
    code: str  # ISO 3166, two letters


class City(NamedTuple):
    """What is known of a city."""

    name: str
    country: str  # name of the country
    timezone: str


class Question(NamedTuple):
    """A question with the searches that answer it.

    `path` holds the names to search for, in order, and `passages` the passage that each search must return; the last
    passage holds the answer. `relation` is the last relation asked for.
    """

    question: str
    answers: tuple[str, ...]
    hops: int
    relation: str
    path: tuple[str, ...]
    passages: tuple[int, ...]


@cache
def load_geography() -> tuple[tuple[Country, ...], tuple[City, ...]]:
    """All 246 countries and 6,079 cities, in the order of the files; a city's name is unique."""
    folder = resources.files("jaxrl_llm.data") / "geography"

    def rows(name: str) -> list[dict[str, str]]:
        table = csv.DictReader((folder / name).read_text(encoding="utf-8").splitlines())
        return [{column: value.strip() for column, value in row.items()} for row in table]

    countries = tuple(
        Country(r["name"], r["capital"], r["continent"], r["currency_name"], r["tld"], r["language"], r["iso2"])
        for r in rows("countries.csv")
    )
    names = {country.code: country.name for country in countries}
    cities = tuple(City(r["name"], names[r["country_iso2"]], r["timezone"]) for r in rows("cities.csv"))
    return countries, cities


def country_passage(country: Country) -> str:
    """The passage of a country; facts that are not known are left out."""
    facts = [
        ("Capital", country.capital),
        ("continent", country.continent),
        ("currency", country.currency),
        ("domain", country.domain),
        ("language", country.language),
    ]
    return f"{country.name} is a country. " + ", ".join(f"{name} {value}" for name, value in facts if value) + "."


def city_passage(city: City) -> str:
    """The passage of a city."""
    return f"{city.name} is a city in {city.country}, time zone {city.timezone}."


@cache
def geography_passages() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Titles (the entities' names) and passages: the countries in their order, then the cities."""
    countries, cities = load_geography()
    titles = (*(c.name for c in countries), *(c.name for c in cities))
    return titles, (*map(country_passage, countries), *map(city_passage, cities))


@cache
def geography_index() -> Bm25Index:
    """The search engine of this world.

    Length is hardly normalized (`b=0.1` instead of 0.75): a country's passage is longer than those of its cities, which
    name it too, and the search for a country should find the country.
    """
    titles, passages = geography_passages()
    return bm25_index(passages, titles=titles, b=0.1, max_terms=8)


@cache
def country_splits() -> dict[str, Literal["train", "test"]]:
    """The split of every country by name: about one in five is in the test set.

    Countries that share a name in any role (a city of one is called like another's capital, two have one capital) go to
    the same side. The side is a fixed hash of the smallest country code among them, so it never moves.
    """
    countries, cities = load_geography()
    leader = {country.name: country.code for country in countries}  # merged below until stable
    users: dict[str, set[str]] = {}
    for name, country_name in (
        [(c.name, c.name) for c in countries]
        + [(c.capital, c.name) for c in countries]
        + [(c.name, c.country) for c in cities]
    ):
        users.setdefault(name, set()).add(country_name)
    shared = [group for group in users.values() if len(group) > 1]
    changed = True
    while changed:
        changed = False
        for group in shared:
            smallest = min(leader[name] for name in group)
            changed |= any(leader[name] != smallest for name in group)
            leader.update(dict.fromkeys(group, smallest))
    return {
        name: "test" if hashlib.sha256(code.encode()).digest()[0] < TEST_BYTES else "train"
        for name, code in leader.items()
    }


@cache
def findable_passages() -> frozenset[int]:
    """Passages that come up first when their own title is searched for."""
    index, (titles, _) = geography_index(), geography_passages()
    return frozenset(i for i, title in enumerate(titles) if top_passages(index, title)[0] == i)


@cache
def question_phrasings(hops: int, relation: str) -> tuple[str, ...]:
    """All ways to ask for `relation` of what lies `hops - 1` links from the entity `{}` that the question names.

    Raises:
      ValueError: no such questions are asked.
    """
    if relation not in RELATIONS_BY_HOPS.get(hops, ()):
        raise ValueError(f"hops and relation must be one of {RELATIONS_BY_HOPS}, got {hops} and {relation!r}")
    subjects: tuple[str, ...] = ("{}",)
    for link in (COUNTRY_OF_CITY, CAPITAL_OF_COUNTRY)[: hops - 1]:
        subjects = tuple(outer.format(inner) for outer in link for inner in subjects)
    return tuple(phrasing.format(subject) for subject in subjects for phrasing in PHRASINGS[relation])


class _Fact(NamedTuple):
    """A question without its words."""

    relation: str
    country: str  # the country that the split and the balance look at
    answer: str
    path: tuple[str, ...]
    passages: tuple[int, ...]


@cache
def _facts(hops: int) -> tuple[_Fact, ...]:
    """Every fact that `hops` searches reach, whether search finds it or not."""
    countries, cities = load_geography()
    country_ids = {country.name: i for i, country in enumerate(countries)}
    city_ids = {city.name: len(countries) + i for i, city in enumerate(cities)}
    by_name = {country.name: country for country in countries}
    facts = []
    if hops == 1:
        for country in countries:
            for relation in COUNTRY_RELATIONS:
                facts.append(
                    _Fact(
                        relation,
                        country.name,
                        getattr(country, relation),
                        (country.name,),
                        (country_ids[country.name],),
                    )
                )
        for city in cities:
            for relation, answer in (("country", city.country), ("time zone", city.timezone)):
                facts.append(_Fact(relation, city.country, answer, (city.name,), (city_ids[city.name],)))
    elif hops == 2:
        for city in cities:
            for relation in COUNTRY_RELATIONS:
                facts.append(
                    _Fact(
                        relation,
                        city.country,
                        getattr(by_name[city.country], relation),
                        (city.name, city.country),
                        (city_ids[city.name], country_ids[city.country]),
                    )
                )
    elif hops == 3:
        timezones = {(city.name, city.country): city.timezone for city in cities}
        for city in cities:
            capital = by_name[city.country].capital
            if (capital, city.country) in timezones and capital != city.name:
                facts.append(
                    _Fact(
                        "time zone",
                        city.country,
                        timezones[capital, city.country],
                        (city.name, city.country, capital),
                        (city_ids[city.name], country_ids[city.country], city_ids[capital]),
                    )
                )
    else:
        raise ValueError(f"hops must be 1, 2 or 3, got {hops}")
    return tuple(fact for fact in facts if fact.answer)


def count_unanswerable(hops: int) -> tuple[int, int]:
    """Facts at `hops` searches that are left out because a search on their path does not find its passage, and all."""
    facts = _facts(hops)
    return sum(not findable_passages().issuperset(fact.passages) for fact in facts), len(facts)


def make_questions(split: Literal["train", "test"], hops: int, num: int | None, seed: int = 0) -> list[Question]:
    """`num` different questions, or all with None, in random order fixed by `seed`.

    They are as even as the facts allow over relations and, within a relation, over countries: in turns, each country
    gives one question, so that one with many cities does not crowd out the others. Only questions whose `path` reaches
    the right passages are made (`count_unanswerable` says how many facts that leaves out).

    Raises:
      ValueError: `split` or `hops` is unknown, or there are fewer than `num` questions.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    rng = np.random.default_rng(seed)
    splits, findable = country_splits(), findable_passages()
    cells: dict[str, dict[str, list[tuple[_Fact, str]]]] = {}
    for fact in _facts(hops):
        if splits[fact.country] == split and findable.issuperset(fact.passages):
            cell = cells.setdefault(fact.relation, {}).setdefault(fact.country, [])
            cell += [(fact, phrasing) for phrasing in question_phrasings(hops, fact.relation)]
    available = sum(len(cell) for countries in cells.values() for cell in countries.values())
    if num is not None and not 0 < num <= available:
        raise ValueError(f"num must lie in [1, {available}], the number of {split} questions of {hops} hops, got {num}")
    turns = zip_longest(*(_in_turns(list(countries.values()), rng) for countries in cells.values()))
    chosen = list(islice((item for turn in turns for item in turn if item is not None), num))
    return [
        Question(phrasing.format(fact.path[0]), (fact.answer,), hops, fact.relation, fact.path, fact.passages)
        for fact, phrasing in (chosen[i] for i in rng.permutation(len(chosen)))
    ]


def _in_turns(cells: list[list[tuple[_Fact, str]]], rng: np.random.Generator) -> Iterator[tuple[_Fact, str]]:
    """One random item of every cell, then a second one, and so on; the order of the cells is drawn anew each time."""
    left = [[cell[i] for i in rng.permutation(len(cell))] for cell in cells]
    while left:
        yield from (left[i].pop() for i in rng.permutation(len(left)))
        left = [cell for cell in left if cell]
