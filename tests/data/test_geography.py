import json
from collections import Counter
from functools import cache
from importlib import resources

import pytest

from jaxrl_llm.data.worlds import geography
from jaxrl_llm.data.worlds.geography import Question, make_questions
from jaxrl_llm.retrieval import top_passages


@cache
def all_questions(split):
    return tuple(question for hops in (1, 2, 3) for question in make_questions(split, hops, None))


def test_passages():
    countries, cities = geography.load_geography()
    titles, passages = geography.geography_passages()
    assert (len(countries), len(cities), len(passages)) == (246, 6079, 6325)
    assert passages[titles.index("Kenya")] == (
        "Kenya is a country. Capital Nairobi, continent Africa, currency Shilling, domain .ke, language en."
    )
    assert passages[titles.index("Nairobi")] == "Nairobi is a city in Kenya, time zone Africa/Nairobi."
    nowhere = countries[0]._replace(domain="", language="")
    assert geography.country_passage(nowhere) == (
        "Andorra is a country. Capital Andorra la Vella, continent Europe, currency Euro."
    )
    assert not any("  " in passage for passage in passages)


def test_questions_are_those_asked_for():
    found = {question.question: question for split in ("train", "test") for question in all_questions(split)}
    titles, _ = geography.geography_passages()
    kenya, nairobi, mombasa = (titles.index(name) for name in ("Kenya", "Nairobi", "Mombasa"))
    for expected in [
        Question("What is the currency of Kenya?", ("Shilling",), 1, "currency", ("Kenya",), (kenya,)),
        Question("Which country does Nairobi lie in?", ("Kenya",), 1, "country", ("Nairobi",), (nairobi,)),
        Question("What is the time zone of Nairobi?", ("Africa/Nairobi",), 1, "time zone", ("Nairobi",), (nairobi,)),
        Question(
            "What is the currency of the country that Nairobi lies in?",
            ("Shilling",),
            2,
            "currency",
            ("Nairobi", "Kenya"),
            (nairobi, kenya),
        ),
        Question(
            "What is the time zone of the capital of the country that Mombasa lies in?",
            ("Africa/Nairobi",),
            3,
            "time zone",
            ("Mombasa", "Kenya", "Nairobi"),
            (mombasa, kenya, nairobi),
        ),
    ]:
        assert found[expected.question] == expected


def test_every_kept_question_can_be_answered():
    """The oracle searches the names on the path in turn; its last passage holds the answer."""
    index = geography.geography_index()
    found = {}
    for question in (*all_questions("train"), *all_questions("test")):
        for name, passage in zip(question.path, question.passages, strict=True):
            if name not in found:
                found[name] = top_passages(index, name)[0]
            assert found[name] == passage
        assert question.answers[0] in index.passages[question.passages[-1]]
    assert len(found) > 6000


@pytest.mark.parametrize(("hops", "expected"), [(1, (85, 13387)), (2, (1535, 30392)), (3, (294, 5433))])
def test_left_out_questions_are_counted(hops, expected):
    assert geography.count_unanswerable(hops) == expected


def test_splits_share_no_entity():
    splits = Counter(geography.country_splits().values())
    assert splits == {"train": 197, "test": 49}
    named = {"train": set(), "test": set()}
    for split, names in named.items():
        for question in all_questions(split):
            names.update(question.path)
            if question.relation in ("capital", "country"):  # a currency may be called like a city
                names.update(question.answers)
    assert len(named["test"]) > 900 and len(named["train"]) > 5000
    assert not named["train"] & named["test"]


@pytest.mark.parametrize("hops", [1, 2])
def test_balance(hops):
    questions = make_questions("train", hops, 1000, seed=3)
    assert len({question.question for question in questions}) == 1000
    relations = Counter(question.relation for question in questions)
    assert max(relations.values()) <= 1 + min(relations.values())
    titles, _ = geography.geography_passages()
    cities = {city.name: city.country for city in geography.load_geography()[1]}
    countries = Counter(cities.get(question.path[0], question.path[0]) for question in questions)
    assert max(countries.values()) <= 20  # China has 652 of the 6,079 cities
    assert questions == make_questions("train", hops, 1000, seed=3)
    assert questions != make_questions("train", hops, 1000, seed=4)


def test_bad_input():
    with pytest.raises(ValueError, match="split must be"):
        make_questions("valid", 1, 1)
    with pytest.raises(ValueError, match="hops must be 1, 2 or 3, got 4"):
        make_questions("train", 4, 1)
    with pytest.raises(ValueError, match=r"num must lie in \[1, \d+\]"):
        make_questions("test", 1, 10**6)
    with pytest.raises(ValueError, match="one of"):
        geography.question_phrasings(2, "time zone")


def test_committed_data_has_its_credit():
    folder = resources.files("jaxrl_llm.data") / "geography"
    credit = (folder / "README.md").read_text(encoding="utf-8")
    assert "GeoNames" in credit and "Attribution 4.0" in credit
    assert json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["type"] == "BPE"
