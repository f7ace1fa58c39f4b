"""Every kind of record from every type of file, and what is said of rows that are wrong."""

import csv
import json
import warnings
from collections import Counter
from pathlib import Path

import datasets
import pytest

from jaxrl_llm.data.readers import iterate_records, read_records
from jaxrl_llm.data.records import KINDS, BadRow, lookup_passages, record

USER, BLUE, GREEN = (
    {"role": "user", "content": "What color is the sky?"},
    {"role": "assistant", "content": "It is blue."},
    {"role": "assistant", "content": "It is green."},
)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {"at": "sky"}}}]}
OTHER_CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"x": 2}}}]}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"properties": {"at": {"type": "string"}}}}}]

# kind, row as read, record: TRL's examples, and ours
ROWS = [
    ("language_modeling", {"text": "The sky is blue."}, None),
    ("language_modeling", {"messages": [USER, CALL, OTHER_CALL, BLUE], "tools": TOOLS}, None),
    ("prompt_only", {"prompt": "The sky is"}, None),
    ("prompt_only", {"prompt": [USER]}, None),
    ("prompt_completion", {"prompt": "The sky is", "completion": " blue."}, None),
    ("prompt_completion", {"prompt": [USER], "completion": [BLUE]}, None),
    ("preference", {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, None),
    (
        "preference",
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " black."},
    ),
    ("preference", {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}, None),
    (
        "preference",
        {"chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]},
    ),
    ("unpaired_preference", {"prompt": "The sky is", "completion": " blue.", "label": True}, None),
    ("unpaired_preference", {"prompt": [USER], "completion": [GREEN], "label": False}, None),
    (
        "stepwise_supervision",
        {"prompt": "Which number is larger?", "completions": ["Of 9.8 and 9.11:", "9.11."], "labels": [True, False]},
        None,
    ),
    ("listwise_preference", {"prompt": "Sky?", "completions": ["a", "b", "c"], "scores": [0.5, 2.0, -1.0]}, None),
    (
        "listwise_preference",
        {"prompt": "Sky?", "completions": ["a", "b", "c"], "ranking": [1, 2, 0]},
        {"prompt": "Sky?", "completions": ["a", "b", "c"], "scores": [0.0, 2.0, 1.0]},
    ),
    ("question_answer", {"question": "007?", "answer": "NA"}, {"prompt": "007?", "answers": ["NA"]}),
    ("question_answer", {"prompt": "Who?", "answers": ["Ann", "Anna"]}, None),
    ("retrieval", {"query": "sky", "positive": "blue", "negatives": ["green", "red"]}, None),
    (
        "retrieval",
        {"query": "sky", "positive": "blue", "negative": "green"},
        {"query": "sky", "positive": "blue", "negatives": ["green"]},
    ),
    (
        "retrieval",
        {"query": "sky", "positive_id": 7, "negative_ids": ["8"]},
        {"query": "sky", "positive_id": "7", "negative_ids": ["8"]},
    ),
    ("corpus", {"_id": 7, "text": "blue"}, {"id": "7", "title": "", "text": "blue"}),
    ("corpus", {"id": "a", "title": "Sky", "text": "blue"}, None),
]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            texts = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
            writer.writerows(texts)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        folder = path.with_suffix("")
        datasets.Dataset.from_list(rows).save_to_disk(folder)
        (folder / "data-00000-of-00001.arrow").rename(path)
    return path


def has_messages(row):
    return any(isinstance(value, list) and value and isinstance(value[0], dict) for value in row.values())


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_kinds_from_files(tmp_path, suffix):
    for number, (kind, row, expected) in enumerate(ROWS):
        if suffix == ".csv" and has_messages(row) and "messages" not in row:
            continue  # a prompt in CSV is text
        path = write(tmp_path / f"{number}{suffix}", [{**row, "note": "kept"}])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            records = read_records(path, kind)
        assert list(records) == [{**(row if expected is None else expected), "note": "kept"}], (kind, row)
        assert records.skipped == {}
    assert {kind for kind, _, _ in ROWS} == set(KINDS)


def test_values_of_text_files_stay_as_written(tmp_path):
    (tmp_path / "a.csv").write_text('question,answers,note\n"a\nb",1|007,\n', encoding="utf-8-sig")
    assert read_records(tmp_path / "a.csv", "question_answer")[0] == {
        "note": "",
        "prompt": "a\nb",
        "answers": ["1", "007"],
    }
    # Two rows of which one could be a number, and a line separator of Unicode within a text.
    rows = [{"question": "x\u2028y", "answer": "1"}, {"question": "z", "answer": "one"}]
    records = read_records(write(tmp_path / "a.jsonl", rows), "question_answer")
    assert [row["answers"] for row in records] == [["1"], ["one"]] and records[0]["prompt"] == "x\u2028y"


def test_implicit_prompts_keep_words_and_messages_whole():
    def split(chosen, rejected):
        got = record({"chosen": chosen, "rejected": rejected}, "preference")
        return got["prompt"], got["chosen"], got["rejected"]

    assert split("I know more", "I know") == ("I", " know more", " know")
    assert split("I know more", "I know\nless") == ("I know", " more", "\nless")
    assert split("A: x y", "A: xy") == ("A:", " x y", " xy")
    assert split([USER, BLUE], [USER, BLUE, USER, GREEN]) == ([USER], [BLUE], [BLUE, USER, GREEN])


def test_columns_are_renamed_or_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "prompt": "p", "reply": "r"}])
    got = read_records(path, "prompt_completion", columns={"prompt": "question", "completion": "reply"})
    assert list(got) == [{"prompt": "q", "completion": "r"}]
    path = write(tmp_path / "b.jsonl", [{"prompt": "Sky?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]}])
    with pytest.raises(ValueError, match=r"b.jsonl, row 1: columns 'prompt', 'chosen', .*columns=\{'prompt': None\}"):
        read_records(path, "preference")
    assert read_records(path, "preference", columns={"prompt": None})[0]["prompt"] == [USER]
    with pytest.raises(ValueError, match="names 'answer', which preference does not have; its columns are prompt"):
        read_records(path, "preference", columns={"answer": "chosen"})


def test_convert(tmp_path):
    path = write(tmp_path / "a.csv", [{"q": "x|y", "a": "so 3 #### 3"}, {"q": "z", "a": "4"}])

    def convert(row):
        return {"prompt": [{"role": "user", "content": row["q"]}], "answers": [row["a"].split("####")[1].strip()]}

    with pytest.warns(RuntimeWarning, match=r"1 of 2 rows left out: convert fails with IndexError \(1\)"):
        records = read_records(path, "question_answer", convert=convert, on_bad="skip")
    assert list(records) == [{"prompt": [{"role": "user", "content": "x|y"}], "answers": ["3"]}]
    with pytest.raises(ValueError, match=r"row 1: convert fails with KeyError: 'none'; columns are \['a', 'q'\]"):
        read_records(path, "question_answer", convert=lambda row: {"prompt": row["none"]})


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("prompt_only", {"text": "x"}, r"column 'prompt' is missing or empty; found columns \['text'\]"),
        ("prompt_only", {"prompt": None}, "column 'prompt' is missing or empty"),
        ("prompt_only", {"prompt": " "}, "column 'prompt' must be a text that is not empty or a list .*, got ' '"),
        ("prompt_only", {"prompt": 7}, r"column 'prompt' must be .*, got 7 \(int\)"),
        ("language_modeling", {"prompt": "x"}, r"column 'text' \(or 'messages'\) is missing"),
        ("language_modeling", {"messages": "x"}, "column 'messages' must be a list of messages .* got 'x'"),
        ("language_modeling", {"messages": [USER, {"from": "gpt", "value": "x"}]}, "'role' in message 2 of 2, .*from"),
        ("language_modeling", {"messages": [{"role": "user"}]}, "got None under 'content' in message 1 of 1"),
        ("language_modeling", {"messages": [USER, {"role": "assistant", "content": ""}]}, "neither content nor tool"),
        ("language_modeling", {"messages": [USER], "tools": "[oops"}, "column 'tools' .*, which is no JSON"),
        ("prompt_completion", {"prompt": "x", "completion": ""}, "column 'completion' must be .*, got ''"),
        ("prompt_completion", {"prompt": [USER], "completion": "x"}, "must all be texts or all be messages"),
        ("prompt_completion", {"prompt": [USER], "completion": [USER]}, "'completion' must begin with .* assistant"),
        ("preference", {"chosen": "a b", "rejected": "a b"}, "must begin alike and end differently"),
        ("preference", {"chosen": "a b", "rejected": "c"}, "must begin alike and end differently"),
        ("unpaired_preference", {"prompt": "x", "completion": "y", "label": "good"}, "'label' must be true or false"),
        ("unpaired_preference", {"prompt": "x", "completion": "y", "label": 2}, "'label' must be .* got 2"),
        (
            "stepwise_supervision",
            {"prompt": "x", "completions": ["a"], "labels": [True, False]},
            "one length, got 1 .*2",
        ),
        ("stepwise_supervision", {"prompt": "x", "completions": ["a", 3], "labels": [1, 0]}, "an item is wrong, got 3"),
        ("listwise_preference", {"prompt": "x", "completions": ["a"], "scores": [1]}, "two or more"),
        ("listwise_preference", {"prompt": "x", "completions": ["a", "b"], "scores": [1, float("nan")]}, "finite"),
        ("listwise_preference", {"prompt": "x", "completions": ["a", "b"], "ranking": [1, 2]}, r"got \[1, 2\] for 2"),
        ("question_answer", {"question": "x", "answer": 7}, "column 'answer' must be a text"),
        ("question_answer", {"question": "x", "answers": []}, r"column 'answers' must be a list .*, got \[\]"),
        ("retrieval", {"query": "x", "positive_id": 1, "negatives": ["y"]}, "both be texts or both be ids"),
        ("corpus", {"id": 1.5, "text": "x"}, "column 'id' must be an id.*got 1.5"),
    ],
)
def test_bad_rows(tmp_path, kind, row, message):
    good = next(row for name, row, _ in ROWS if name == kind)
    path = write(tmp_path / "a.jsonl", [good, row, good])
    with pytest.raises(ValueError, match=rf"a\.jsonl, row 2: .*{message}"):
        read_records(path, kind)
    with pytest.warns(RuntimeWarning, match=r"a\.jsonl: 1 of 3 rows left out: .* \(1\)"):
        records = read_records(path, kind, on_bad="skip")
    assert len(records) == 2 and sum(records.skipped.values()) == 1


def test_rows_that_are_none(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n\n{oops\n[1]\n{"prompt": "b"}\n{"prompt": 1}\n{"prompt": 2}\n')
    with pytest.raises(ValueError, match="row 2: not a JSON object: "):
        read_records(path, "prompt_only")
    skipped = Counter()
    assert [row["prompt"] for row in iterate_records(path, "prompt_only", skipped=skipped)] == ["a", "b"]
    assert sorted(skipped.values()) == [1, 1, 2], "the same fault is one reason"
    (tmp_path / "a.csv").write_text("prompt,label\na,b,c\n")
    with pytest.raises(ValueError, match=r"a\.csv, row 1: more cells than the header has columns: \['c'\]"):
        read_records(tmp_path / "a.csv", "prompt_only")


def test_folders_globs_and_splits(tmp_path):
    for name in ("train-00000.jsonl", "train-00001.jsonl", "test.jsonl"):
        write(tmp_path / name, [{"prompt": name}])
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "dataset_info.json").write_text("{}")

    def prompts(source, **options):
        return [row["prompt"] for row in read_records(source, "prompt_only", **options)]

    assert prompts(tmp_path) == ["train-00000.jsonl", "train-00001.jsonl"]
    assert prompts(tmp_path, split="test") == ["test.jsonl"]
    assert prompts(str(tmp_path / "t*t.jsonl")) == ["test.jsonl"]
    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"prompt": "saved"}])}).save_to_disk(tmp_path / "saved")
    assert prompts(tmp_path / "saved") == ["saved"]
    for source, options, message in [
        (tmp_path, {"split": "validation"}, "no file of split 'validation' among .*test.jsonl"),
        (tmp_path / "test.jsonl", {"split": "test"}, "split='test' is for folders"),
        (tmp_path / "test.jsonl", {"config": "main"}, "config='main' is for data sets of the hub"),
        (tmp_path / "none.jsonl", {}, "there is no such file"),
        (tmp_path / "README.md", {}, "expected a file of type .jsonl, .json, .csv"),
        (str(tmp_path / "x*"), {}, "no file matches"),
        (write(tmp_path / "e.json", []), {}, "there are no records in it"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_records(source, "prompt_only", **options)
    write(tmp_path / "test.csv", [{"prompt": "x"}])
    with pytest.raises(ValueError, match=r"files of several types \(.csv, .jsonl\)"):
        read_records(tmp_path, "prompt_only", split="test")


def test_damaged_files(tmp_path):
    whole = write(tmp_path / "a.parquet", [{"prompt": "x" * 1000}]).read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    (tmp_path / "d.json").write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    for name, message in [("b.parquet", "not a readable .parquet"), ("c.jsonl", "not UTF-8"), ("d.json", "in .jsonl")]:
        with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
            read_records(tmp_path / name, "prompt_only")


def test_hub_without_network(monkeypatch):
    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match="'openai/gsm8k' is no file .*ConnectionError.*give the path of its file"):
        read_records("openai/gsm8k", "question_answer", config="main")


def test_hub_rows_go_the_same_way(monkeypatch):
    calls = []

    def loaded(*arguments, **options):
        calls.append((arguments, options))
        return datasets.Dataset.from_list([{"question": "q", "answer": "a"}, {"question": "q", "answer": ""}])

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    with pytest.raises(ValueError, match=r"openai/gsm8k \(test\), row 2: column 'answer' must be"):
        read_records("openai/gsm8k", "question_answer", config="main", split="test")
    assert next(iterate_records("openai/gsm8k", "question_answer")) == {"prompt": "q", "answers": ["a"]}
    assert calls[0] == (("openai/gsm8k", "main"), {"split": "test", "streaming": False})
    assert calls[1] == (("openai/gsm8k", None), {"split": "train", "streaming": True})


def test_lookup_passages(tmp_path):
    passages = [{"id": 7, "title": "Sky", "text": "blue"}, {"id": "8", "text": "green"}]
    corpus = read_records(write(tmp_path / "corpus.jsonl", passages), "corpus")
    path = write(tmp_path / "a.jsonl", [{"query": "q", "positive_id": "7", "negative_ids": [8], "note": 1}])
    triples = read_records(path, "retrieval")
    assert list(lookup_passages(triples, corpus)) == [
        {"query": "q", "positive": "Sky\nblue", "negatives": ["green"], "note": 1}
    ]
    with pytest.raises(ValueError, match="record 0 .* names '7', which is no id"):
        lookup_passages(triples, corpus.select([1]))
    with pytest.raises(ValueError, match="1 passages have the id of another one, such as '7'"):
        lookup_passages(triples, corpus.select([0, 1, 0]))


def test_real_questions():
    path = Path(__file__).parents[2] / "jaxrl_llm" / "data" / "gsm8k" / "test.jsonl"
    records = read_records(path, "question_answer")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert list(records) == [{"prompt": line["question"], "answers": [line["answer"]]} for line in lines]


def test_unknown_kind_and_policy(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "x"}])
    with pytest.raises(ValueError, match="no kind 'prompts' of records; choose one of language_modeling, prompt_only"):
        read_records(path, "prompts")
    with pytest.raises(ValueError, match="on_bad must be 'raise' or 'skip', got 'ignore'"):
        read_records(path, "prompt_only", on_bad="ignore")
    with pytest.raises(BadRow) as caught:
        record({"prompt": 7}, "prompt_only")
    assert "7" not in caught.value.reason
