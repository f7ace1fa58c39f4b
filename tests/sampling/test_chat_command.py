"""`python -m jaxrl_llm.sampling.chat`: from a checkpoint on disk, with scripted input."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import jax
import pytest
import rich.console

from jaxrl_llm.envs import HERMES, REACT, ToolEnv
from jaxrl_llm.models import DecoderConfig, load_tokenizer, make_decoder, save
from jaxrl_llm.sampling import chat
from jaxrl_llm.tools import call_tool

TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "models/golden/tokenizers/chatml")
END = "<|im_end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    config = DecoderConfig(TOKENIZER.vocab_size, width=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=16)
    model = dataclasses.replace(make_decoder(config), tokenizer=TOKENIZER)
    save(model, jax.jit(model.init)(jax.random.key(0)), path)
    return str(path)


def run(monkeypatch, capsys, typed, *arguments):
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    status = chat.main(["--max-tokens", "5", "--context", "512", *arguments])
    return status, capsys.readouterr().out


def test_a_conversation(folder, monkeypatch, capsys):
    typed = "Hello\n\n  \nAnd now?\n"  # empty lines are no messages
    status, out = run(monkeypatch, capsys, typed, "--model", folder, "--system", "Be brief.", "--seed", "3")
    assert status == 0 and out.count("> ") == 5 and len(out.splitlines()) >= 2
    assert run(monkeypatch, capsys, typed, "--model", folder, "--system", "Be brief.", "--seed", "3")[1] == out
    greedy = run(monkeypatch, capsys, "Hello\n", "--model", folder, "--temperature", "0")
    assert greedy == run(monkeypatch, capsys, "Hello\n", "--model", folder, "--temperature", "0", "--seed", "1")
    assert run(monkeypatch, capsys, "", "--model", folder) == (0, "> ")


def test_a_full_context_ends_it(folder, monkeypatch, capsys):
    status, out = run(monkeypatch, capsys, f"{'word ' * 200}\n", "--model", folder)
    assert status == 1 and "a prompt of" in out


def test_tools_from_names(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "documents.txt").write_text("Lima is the capital of Peru.\n\nNairobi lies in Kenya.\n")
    (tmp_path / "corpus.jsonl").write_text('{"_id": "1", "title": "Peru", "text": "The capital is Lima."}\n')
    for name, expected in (("documents.txt", "Doc 1: Lima is the"), ("corpus.jsonl", "Doc 1(Title: Peru) The")):
        tools = chat.make_tools(["search", "calculator", "memory"], str(tmp_path / name))
        assert call_tool(tools, "search", {"query": "capital Peru"}).text.startswith(expected)
        assert call_tool(tools, "calculator", {"expression": "6*7"}).text == "42" and len(tools) == 7
    documents = ["--tools", "search,calculator", "--documents", str(tmp_path / "documents.txt")]
    status, out = run(monkeypatch, capsys, "Hello\n", "--model", folder, *documents, "--context", "4096")
    assert status == 0 and out.startswith("> ")


def play(env, turns, typed):
    """What the terminal shows of scripted turns, and what the policy read."""
    lines, turns, read, shown = iter(typed), iter(turns), [], io.StringIO()

    def write(ids):
        read.append(TOKENIZER.decode(ids))
        return iter(TOKENIZER.encode(next(turns)))

    chat.converse(env, write, lambda: next(lines, None), rich.console.Console(file=shown, width=200, markup=False))
    return shown.getvalue(), read


def test_calls_and_results_are_shown():
    env = ToolEnv(
        protocol=HERMES, tokenizer=TOKENIZER, tools=chat.make_tools(["calculator"], None), reward=lambda trajectory: 0.0
    )
    call = '<tool_call>{"name": "calculator", "arguments": {"expression": "6 * 7"}}</tool_call>'
    turns = [f"{call}<tool_call>?</tool_call>{END}", f"42, I think: ñ😀{END}", f"Bye{END}"]
    shown, read = play(env, turns, ["What is 6 * 7?", "Thanks"])
    lines = shown.splitlines()
    assert lines[0] == turns[0].removesuffix(END) and lines[1:3] == ['calculator {"expression": "6 * 7"}', "42"]
    assert lines[3].startswith("The call is not JSON") and lines[4:] == ["42, I think: ñ😀", "Bye"]
    assert read[0].endswith(f"What is 6 * 7?{END}\n<|im_start|>assistant\n")
    assert read[1].startswith("\n<|im_start|>user\n<tool_response>\n42\n</tool_response>")
    assert read[2] == f"\n<|im_start|>user\nThanks{END}\n<|im_start|>assistant\n" and len(read) == 3


def test_a_protocol_without_a_template():
    bare = dataclasses.replace(TOKENIZER, chat_template=None)
    env = ToolEnv(
        protocol=REACT, tokenizer=bare, tools=chat.make_tools(["calculator"], None), reward=lambda trajectory: 0.0
    )
    turns = ["Action: calculator\nAction Input: 6*7\nObservation:", "Final Answer: 42", "Final Answer: bye"]
    shown, read = play(env, turns, ["6*7?", "Thanks"])
    assert "\n42\nFinal Answer: 42\n" in shown and read[1:] == [" 42\n", "\nObservation:\nQuestion: Thanks\n"]
    assert play(env, [], []) == ("", [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tools", "calculater"], "there is no tool 'calculater'; there are calculator, memory, python, search"),
        (["--tools", "search"], "--documents go together"),
        (["--documents", "x.txt"], "--documents go together"),
        (["--tools", "search", "--documents", "no such file.txt"], "No such file"),
        (["--temperature", "-1"], "temperature must be positive"),
        (["--protocol", "mcp"], "invalid choice: 'mcp'"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        chat.main(["--model", "nowhere", *arguments])
    assert message in capsys.readouterr().err


def test_bad_models(folder, monkeypatch, capsys, tmp_path):
    status, out = run(monkeypatch, capsys, "Hello\n", "--model", str(tmp_path))
    assert status == 1 and "config.json" in out
    bare = make_decoder(DecoderConfig(64, width=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=16))
    save(bare, jax.jit(bare.init)(jax.random.key(0)), tmp_path / "bare")
    status, out = run(monkeypatch, capsys, "Hello\n", "--model", str(tmp_path / "bare"))
    assert status == 1 and "no tokenizer" in out
    status, out = run(monkeypatch, capsys, "Hello\n", "--model", folder, "--tools", "calculator", "--protocol", "chat")
    assert status == 1 and "calls no tools" in out
