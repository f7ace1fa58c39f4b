import re

import numpy as np
import pytest

from jaxrl_llm.data import demonstrations, geography_tokenizer
from jaxrl_llm.data.worlds import geography
from jaxrl_llm.data.worlds.invented import fill, world_templates
from jaxrl_llm.rewards import extract_tags, parse_action
from jaxrl_llm.types import Span

QUESTIONS = {
    (hops, relation): [
        re.compile(re.escape(text).replace(r"\{\}", "(.+)")) for text in geography.question_phrasings(hops, relation)
    ]
    for hops, relations in geography.RELATIONS_BY_HOPS.items()
    for relation in relations
}
CITY = re.compile(r"(?P<name>.+) is a city in (?P<country>.+), time zone (?P<zone>\S+)\.")
COUNTRY = re.compile(
    r"(?P<name>.+) is a country\. Capital (?P<capital>.+), continent (?P<continent>.+), "
    r"currency (?P<currency>.+), domain (?P<domain>\.\S+), language (?P<language>.+)\."
)


def spans_of(demos, i, tokenizer):
    """The runs of one author in demonstration `i`."""
    tokens, mask = demos["tokens"][i, : demos["lengths"][i]], demos["mask"][i, : demos["lengths"][i]]
    cuts = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(tokens)]
    roles = ["policy" if mask[start] else "observation" for start in cuts[:-1]]
    roles[0] = "prompt"
    return [
        Span(role, tokenizer.decode(tokens[start:end]))
        for role, start, end in zip(roles, cuts[:-1], cuts[1:], strict=True)
    ], cuts


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_transcripts_have_the_environments_form(hops):
    tokenizer = geography_tokenizer()
    demos = demonstrations(np.random.default_rng(hops), 400, tokenizer, 256, hops=(hops,))
    information = {tokenizer.special_ids["<information>"], tokenizer.special_ids["</information>"]}
    for i in range(400):
        spans, cuts = spans_of(demos, i, tokenizer)
        assert cuts[1] == demos["prompt_lengths"][i] and demos["hops"][i] == hops
        assert not demos["tokens"][i, demos["lengths"][i] :].any() and not demos["mask"][i, demos["lengths"][i] :].any()
        assert not information & set(demos["tokens"][i][demos["mask"][i]].tolist())
        prompt, turns, observations = spans[0].text, spans[1::2], spans[2::2]
        assert [span.role for span in turns] == ["policy"] * len(turns)
        assert any(
            pattern.fullmatch(prompt) for key, patterns in QUESTIONS.items() if key[0] == hops for pattern in patterns
        )
        actions = [parse_action(turn.text) for turn in turns]
        assert [kind for kind, _ in actions] == ["search"] * len(observations) + ["answer"]
        assert len(observations) <= 3 and all(content for _, content in actions)
        for turn, (kind, content) in zip(turns, actions, strict=True):
            assert turn.text == f"<{kind}> {content}</{kind}>"
        for observation in observations:
            if observation.text != "<information></information>":
                passage = observation.text.removeprefix("<information> ").removesuffix("</information>")
                assert CITY.fullmatch(passage) or COUNTRY.fullmatch(passage)
        answer = actions[-1][1]
        evidence = " ".join(extract_tags("".join(o.text for o in observations), "information"))
        if demos["right"][i]:
            assert len(observations) >= hops and answer in evidence
        assert answer in evidence or answer in prompt


def test_right_answers_follow_the_chain():
    """An independent reader answers from the observations; `right` says whether the demonstrator did as well."""
    tokenizer = geography_tokenizer()
    demos = demonstrations(np.random.default_rng(9), 500, tokenizer, 256, hops=(1, 2))
    checked = 0
    for i in range(500):
        spans, _ = spans_of(demos, i, tokenizer)
        hops = int(demos["hops"][i])
        relation, entity = next(
            (key[1], match[1])
            for key, patterns in QUESTIONS.items()
            if key[0] == hops
            for pattern in patterns
            if (match := pattern.fullmatch(spans[0].text))
        )
        passages = [
            match.groupdict()
            for span in spans
            if span.role == "observation"
            for text in extract_tags(span.text, "information")
            if (match := CITY.fullmatch(text) or COUNTRY.fullmatch(text))
        ]
        by_name = {}
        for passage in passages:
            by_name.setdefault(passage["name"], passage)
        place = by_name.get(entity)
        if hops == 2 and place is not None:
            place = by_name.get(place["country"])
        gold = place and place.get({"time zone": "zone"}.get(relation, relation))
        if demos["right"][i]:
            assert parse_action(spans[-1].text)[1] == gold
            checked += 1
    assert checked > 200


def test_templates_are_tokenized_as_the_world_is():
    tokenizer = geography_tokenizer()
    templates, (countries, cities) = world_templates(tokenizer), geography.load_geography()
    for city in cities:
        assert fill(templates.city, tokenizer.encode_batch(city)) == tokenizer.encode(geography.city_passage(city))
    for country in countries:
        if country.domain and country.language:
            fields = tokenizer.encode_batch(country[:6])
            assert fill(templates.country, fields) == tokenizer.encode(geography.country_passage(country))
    for (hops, relation), phrasings in templates.questions.items():
        for pieces, text in zip(phrasings, geography.question_phrasings(hops, relation), strict=True):
            assert fill(pieces, [tokenizer.encode("Port-au-Prince")]) == tokenizer.encode(text.format("Port-au-Prince"))


def test_success_is_as_stated():
    tokenizer = geography_tokenizer()
    demos = demonstrations(np.random.default_rng(0), 6000, tokenizer, 256)
    s, again = 1 - 0.3 - 0.15, 0.15
    expected = {1: s * (1 + again + again**2), 2: s**2 * (1 + 2 * again)}
    for hops, rate in expected.items():
        right = demos["right"][demos["hops"] == hops]
        assert abs(right.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / len(right))
    perfect = demonstrations(np.random.default_rng(0), 200, tokenizer, 256, early_answer=0.0, wrong_query=0.0)
    assert perfect["right"].all()
    careless = demonstrations(
        np.random.default_rng(0), 200, tokenizer, 256, early_answer=0.0, wrong_query=0.0, wrong_relation=1.0
    )
    assert not careless["right"].any()


def test_seeds_and_lengths():
    tokenizer = geography_tokenizer()
    first, again, other = (demonstrations(np.random.default_rng(seed), 50, tokenizer, 96) for seed in (1, 1, 2))
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["tokens"] != other["tokens"]).any()
    assert first["tokens"].shape == (50, 96) and first["lengths"].max() <= 96


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hops": ()}, "hops must be"),
        ({"hops": (4,)}, "hops must be"),
        ({"max_searches": 0}, "max_searches"),
        ({"early_answer": 0.9, "wrong_query": 0.2}, "early_answer"),
        ({"max_length": 8}, "max_length=8"),
    ],
)
def test_bad_input(options, message):
    arguments = {"num": 10, "max_length": 128} | options
    with pytest.raises(ValueError, match=message):
        demonstrations(np.random.default_rng(0), tokenizer=geography_tokenizer(), **arguments)
