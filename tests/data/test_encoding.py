"""From records to tokens: what is in the mask, what becomes of what is too long."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxrl_llm.data.encoding import (
    tokenize_demonstrations,
    tokenize_listwise,
    tokenize_preferences,
    tokenize_prompts,
    tokenize_steps,
    tokenize_unpaired,
)
from jaxrl_llm.data.packing import pack_best_fit
from jaxrl_llm.data.readers import read_records
from jaxrl_llm.data.records import Records
from jaxrl_llm.models.chat import encode_chat
from jaxrl_llm.models.tokenizer import load_tokenizer

USER, BLUE, GREEN = (
    {"role": "user", "content": "What color is the sky?"},
    {"role": "assistant", "content": "It is blue."},
    {"role": "assistant", "content": "It is green."},
)
SURE = {"role": "user", "content": "Are you sure?"}
END = 3


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Path(__file__).parents[1] / "models/golden/tokenizers/chatml")


def pieces(tokenizer, encoded, row):
    """Text of a sequence outside and inside of its mask."""
    length = encoded.lengths[row]
    tokens, mask = encoded.tokens[row, :length], encoded.mask[row, :length]
    assert not encoded.tokens[row, length:].any() and not encoded.mask[row, length:].any()
    return tokenizer.decode(tokens[~mask]), tokenizer.decode(tokens[mask])


def test_texts(tokenizer):
    records = Records("prompt_completion", [{"prompt": "The sky is", "completion": " blue."}])
    encoded = tokenize_demonstrations(records, tokenizer, end_id=END, begin_id=5, max_length=32)
    prompt, completion = tokenizer.encode("The sky is"), tokenizer.encode(" blue.")
    length = len(prompt) + len(completion) + 2
    assert encoded.tokens[0, :length].tolist() == [5, *prompt, *completion, END]
    assert encoded.mask[0].nonzero()[0].tolist() == list(range(len(prompt) + 1, length))
    assert encoded.lengths.tolist() == [length] and encoded.tokens.shape == (1, 32)
    encoded = tokenize_demonstrations(
        Records("language_modeling", [{"text": "The sky"}]), tokenizer, end_id=None, max_length=8
    )
    assert encoded.tokens[0, : encoded.lengths[0]].tolist() == tokenizer.encode("The sky")
    assert encoded.mask.sum() == encoded.lengths[0]


def test_messages(tokenizer):
    """With a prompt, only what lies behind it is learnt; a whole chat teaches every turn."""
    chat = [USER, GREEN, SURE, BLUE]
    whole = tokenize_demonstrations(
        Records("language_modeling", [{"messages": chat}]), tokenizer, end_id=END, max_length=200
    )
    behind = tokenize_demonstrations(
        Records("prompt_completion", [{"prompt": chat[:3], "completion": chat[3:]}]),
        tokenizer,
        end_id=END,
        max_length=200,
    )
    ids, mask = encode_chat(tokenizer, chat)
    for encoded in (whole, behind):
        assert encoded.tokens[0, : encoded.lengths[0]].tolist() == ids
    assert whole.mask[0, : len(ids)].tolist() == mask
    assert pieces(tokenizer, whole, 0)[1] == "It is green.<|im_end|>It is blue.<|im_end|>"
    assert pieces(tokenizer, behind, 0)[1] == "It is blue.<|im_end|>"


def test_prompts_are_the_beginning_of_demonstrations(tokenizer):
    prompts = Records("prompt_only", [{"prompt": [USER]}, {"prompt": "The sky"}])
    encoded = tokenize_prompts(prompts, tokenizer, max_length=100)
    assert not encoded.mask.any()
    ids, mask = encode_chat(tokenizer, [USER, BLUE])
    assert encoded.tokens[0, : encoded.lengths[0]].tolist() == ids[: mask.index(True)]
    assert encoded.tokens[1, : encoded.lengths[1]].tolist() == tokenizer.encode("The sky")
    cut = tokenize_prompts(prompts, tokenizer, max_length=4, too_long="left")
    assert cut.tokens[0].tolist() == ids[: mask.index(True)][-4:]
    assert cut.num_truncated == 2


def test_too_long(tokenizer):
    """Of three records the middle one is too long; cut at the right it keeps no completion."""
    rows = [{"prompt": prompt, "completion": " blue."} for prompt in ("sky", "sky " * 20, "sea")]
    records = Records("prompt_completion", rows)

    def encode(too_long, max_length=12):
        return tokenize_demonstrations(records, tokenizer, end_id=END, max_length=max_length, too_long=too_long)

    lengths = encode("raise", 100).lengths
    assert lengths[1] > 12 > max(lengths[0], lengths[2])
    with pytest.raises(ValueError, match=rf"record 1 \(from 0\) has {lengths[1]} tokens, max_length is 12"):
        encode("raise")
    for too_long in ("drop", "right"):
        encoded = encode(too_long)
        assert encoded.rows.tolist() == [0, 2] and encoded.lengths.tolist() == [lengths[0], lengths[2]]
        assert encoded.num_truncated == 0
    left = encode("left")
    assert left.rows.tolist() == [0, 1, 2] and left.num_truncated == 1
    np.testing.assert_array_equal(left.tokens[1], encode("raise", 100).tokens[1, lengths[1] - 12 : lengths[1]])
    assert pieces(tokenizer, left, 1)[1].startswith(" blue.")
    right = encode("right", int(lengths[1]) - 1)
    assert right.num_truncated == 1 and right.tokens[1, -1] != END and right.mask[1, -1]
    with pytest.raises(ValueError, match="too_long must be"):
        encode("cut")


def test_pairs_lists_and_labels(tokenizer):
    rows = [
        {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": "Sky?", "chosen": " blue", "rejected": " green" * 99},
        {"prompt": "Sky?", "chosen": " blue", "rejected": " green"},
    ]
    chosen, rejected = tokenize_preferences(
        Records("preference", rows), tokenizer, end_id=None, max_length=90, too_long="drop"
    )
    assert chosen.rows.tolist() == rejected.rows.tolist() == [0, 2], "a pair goes as a whole"
    assert [pieces(tokenizer, side, 0)[1] for side in (chosen, rejected)] == [
        "It is blue.<|im_end|>",
        "It is green.<|im_end|>",
    ]
    assert [pieces(tokenizer, side, 1) for side in (chosen, rejected)] == [("Sky?", " blue"), ("Sky?", " green")]

    unpaired = [{"prompt": "Sky?", "completion": " blue" * n, "label": n < 3} for n in (1, 99, 4, 2)]
    encoded, labels = tokenize_unpaired(
        Records("unpaired_preference", unpaired), tokenizer, end_id=None, max_length=40, too_long="drop"
    )
    assert encoded.rows.tolist() == [0, 2, 3] and labels.tolist() == [True, False, True]

    lists = [
        {"prompt": "Sky?", "completions": [" a", " b", " c"], "scores": [1.0, 3.0, 2.0]},
        {"prompt": "Sky?", "completions": [" a" * 99, " b"], "scores": [5.0, 6.0]},
        {"prompt": "Sea?", "completions": [" d", " e"], "scores": [7.0, 8.0]},
    ]
    encoded, scores = tokenize_listwise(
        Records("listwise_preference", lists), tokenizer, end_id=None, max_length=40, too_long="drop"
    )
    assert encoded.rows.tolist() == [0, 0, 0, 2, 2] and scores.tolist() == [1, 3, 2, 7, 8]
    assert [pieces(tokenizer, encoded, i)[1] for i in range(5)] == [" a", " b", " c", " d", " e"]


def test_steps(tokenizer):
    rows = [{"prompt": "Sum?", "completions": [" 1 + 1", " = 3", " so 3"], "labels": [True, False, True]}]
    records = Records("stepwise_supervision", rows)
    encoded, labels = tokenize_steps(records, tokenizer, max_length=60)
    ends = encoded.mask[0].nonzero()[0]
    assert labels[0, ends].tolist() == [True, False, True] and labels.sum() == 2
    tokens = encoded.tokens[0]
    assert [tokenizer.decode(tokens[: end + 1]) for end in ends] == [
        "Sum? 1 + 1\n",
        "Sum? 1 + 1\n = 3\n",
        "Sum? 1 + 1\n = 3\n so 3\n",
    ]
    for too_long, kept in [("left", slice(4, None)), ("right", slice(0, -4))]:
        length = int(encoded.lengths[0])
        cut, cut_labels = tokenize_steps(records, tokenizer, max_length=length - 4, too_long=too_long)
        for short, whole in [(cut.tokens, tokens), (cut.mask, encoded.mask[0]), (cut_labels, labels[0])]:
            np.testing.assert_array_equal(short[0], whole[:length][kept])
    with pytest.raises(ValueError, match="separator '' has no tokens"):
        tokenize_steps(records, tokenizer, max_length=60, separator="")


def test_what_there_is_nothing_to_learn_from(tokenizer):
    with pytest.raises(ValueError, match=r"record 1 \(from 0\) has nothing to learn"):
        tokenize_demonstrations(
            Records("language_modeling", [{"messages": [USER, BLUE]}, {"messages": [USER]}]),
            tokenizer,
            end_id=END,
            max_length=200,
        )
    with pytest.raises(ValueError, match="expected records of preference, got corpus"):
        tokenize_preferences(Records("corpus", []), tokenizer, end_id=None, max_length=9)


def test_real_questions_token_exact_into_packed_rows(tokenizer):
    path = Path(__file__).parents[2] / "jaxrl_llm" / "data" / "gsm8k" / "test.jsonl"
    records = read_records(path, "prompt_completion", columns={"prompt": "question", "completion": "answer"})
    encoded = tokenize_demonstrations(records, tokenizer, end_id=END, max_length=2048)
    packed = pack_best_fit(*encoded[:3], row_length=2048)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for index, line in enumerate(lines):
        here = packed["segment_ids"] == index
        tokens, mask = packed["tokens"][here], packed["mask"][here]
        assert tokenizer.decode(tokens[~mask]) == line["question"]
        assert tokenizer.decode(tokens[mask][:-1]) == line["answer"] and tokens[-1] == END


def test_real_tool_calls_token_exact_into_packed_rows(tokenizer):
    def convert(row):
        prompt = [{"role": role, "content": row[role]} for role in ("system", "user")]
        return {"prompt": prompt, "completion": [{"role": "assistant", "content": row["answer"]}]}

    path = Path(__file__).parent / "excerpts" / "toolrl.jsonl"
    records = read_records(path, "prompt_completion", convert=convert)
    prompts = tokenize_prompts(records, tokenizer, max_length=8192)
    encoded = tokenize_demonstrations(records, tokenizer, end_id=None, max_length=8192)
    packed = pack_best_fit(*encoded[:3], row_length=8192)
    for index, line in enumerate(map(json.loads, path.read_text().splitlines())):
        here = packed["segment_ids"] == index
        tokens, mask = packed["tokens"][here], packed["mask"][here]
        prompt = prompts.tokens[index, : prompts.lengths[index]]
        np.testing.assert_array_equal(tokens[: len(prompt)], prompt)
        assert line["system"] in tokenizer.decode(prompt) and line["user"] in tokenizer.decode(prompt)
        assert tokenizer.decode(tokens[mask]) == line["answer"] + "<|im_end|>"
