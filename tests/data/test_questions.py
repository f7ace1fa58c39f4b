import json

import pytest

from jaxrl_llm.data import read_questions


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_csv(tmp_path):
    path = write(tmp_path, "mine.csv", 'question,answers,hops,source\n"Who, then?",Ann|Bob,2,x\n Where? , Rome ,,y\n')
    first, second = read_questions(path)
    assert (first.question, first.answers, first.hops) == ("Who, then?", ("Ann", "Bob"), 2)
    assert (second.question, second.answers, second.hops) == ("Where?", ("Rome",), 1)
    assert first.path == () and first.relation == ""
    (one,) = read_questions(write(tmp_path, "one.csv", "\ufeffquestion,answer\nWhat?,a|b\n"))
    assert one.answers == ("a|b",)


def test_jsonl(tmp_path):
    rows = [{"question": "Who?", "answer": "Ann"}, {"question": "Where?", "answers": ["Rome", "Roma"], "hops": 3}]
    path = write(tmp_path, "mine.jsonl", "\n\n".join(map(json.dumps, rows)) + "\n")
    assert [(q.question, q.answers, q.hops) for q in read_questions(path)] == [
        ("Who?", ("Ann",), 1),
        ("Where?", ("Rome", "Roma"), 3),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.csv",
            "frage,answer\nWho?,Ann\n",
            r"row 1: column 'question' is missing; found columns \['answer', 'frage'\]",
        ),
        ("a.csv", "question,reply\nWho?,Ann\n", r"row 1: column 'answer' \(or 'answers'\) is missing"),
        ("a.csv", "question,answer\nWho?,Ann\nWhere?,\n", r"row 2: column 'answer' must hold texts that are not empty"),
        ("a.csv", "question,answers\nWho?,Ann|\n", r"row 1: column 'answers' must hold"),
        ("a.csv", "question,answer\nWho?\n", r"row 1: column 'answer' \(or 'answers'\) is missing"),
        ("a.csv", "question,answer\n ,Ann\n", r"row 1: column 'question' must be a text"),
        ("a.csv", "question,answer,hops\nWho?,Ann,two\n", "row 1: column 'hops' must be a whole number.*'two'"),
        ("a.csv", "question,answer\n", "no questions in it"),
        ("a.jsonl", '{"question": "?", "answer": "Ann"}\n{"question": "?", "answers": []}', "row 2: column 'answers'"),
        ("a.jsonl", '{"question": "Who?", "answer": 7}', "row 1: column 'answer' must hold texts"),
        ("a.jsonl", "{oops", "row 1: not a JSON object"),
        ("a.jsonl", "[1]", r"row 1: expected a JSON object, got '\[1\]'"),
        ("a.txt", "x", "from a .csv or .jsonl file, got '.txt'"),
    ],
)
def test_bad_input(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_questions(write(tmp_path, name, text))


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_questions(tmp_path / "none.csv")
