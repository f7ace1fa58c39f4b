"""Talk to a model, with tools or without: `python -m jaxrl_llm.sampling.chat --model PATH --tools calculator,search`.

What the policy writes is shown as it comes, what tools return below it. Ctrl-D ends, and so does a full context.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import rich.console

from jaxrl_llm.data.readers import read_records
from jaxrl_llm.envs.tool_env import ToolEnv, Trajectory
from jaxrl_llm.envs.tool_protocols import CHAT, HERMES, REACT, SEARCH_R1, Call
from jaxrl_llm.models.hub import load
from jaxrl_llm.models.tokenizer import decode_stream
from jaxrl_llm.retrieval.bm25 import bm25_index
from jaxrl_llm.sampling.rows import Row
from jaxrl_llm.sampling.session import Session
from jaxrl_llm.tools.calculator import calculator_tool
from jaxrl_llm.tools.memory import KeyValueMemory, memory_tools
from jaxrl_llm.tools.sandbox import PythonSandbox, python_tool
from jaxrl_llm.tools.search import search_tool
from jaxrl_llm.tools.tool import Tool
from jaxrl_llm.types import Decoding, Params

PROTOCOLS = {"hermes": HERMES, "react": REACT, "search_r1": SEARCH_R1, "chat": CHAT}
TOOLS = ("calculator", "memory", "python", "search")
STEPS = 4  # decode steps between two looks at what was written
Write = Callable[[Sequence[int]], Iterator[int]]  # the tokens of the next turn, behind those that were read


def converse(env: ToolEnv, write: Write, ask: Callable[[], str | None], console: rich.console.Console) -> None:
    """Plays one long episode of `env` and shows it. Each turn that is no call is answered by `ask`; None ends.

    Args:
      env: one without a user; its rewards are not looked at.
      write: reads a prompt or an observation and writes the policy's turn, token by token.
      ask: what the person at the terminal says.

    Raises:
      ValueError: what `write` raises, as for a context that is full.
    """
    first = ask()
    if first is None:
        return

    def user(trajectory: Trajectory) -> str | None:
        return ask()

    env, tokenizer = dataclasses.replace(env, user=user), env.tokenizer
    state, text = asyncio.run(env.reset(first))
    done = False
    while not done:
        ids: list[int] = []

        def shown(new: Iterator[int], ids: list[int] = ids) -> Iterator[int]:
            for token in new:
                ids.append(token)
                if token not in tokenizer.eos_ids:
                    yield token

        for part in decode_stream(tokenizer, shown(write(tokenizer.encode(text)))):
            console.print(part, end="", style="green", soft_wrap=True)
        console.print()
        # not one event loop for all, as that would keep an interrupt from stopping the policy
        state, text, _, done = asyncio.run(env.step(state, tokenizer.decode(ids)))
        for action, result in zip(state.turns[-1].actions, state.turns[-1].results, strict=True):
            if isinstance(action, Call):
                console.print(f"{action.name} {json.dumps(action.arguments, ensure_ascii=False)}", style="bold cyan")
            console.print(result.text, style="cyan" if result.error is None else "red")


def session_writer(session: Session, params: Params) -> Write:
    """The policy of one conversation, in a row of `session`."""
    rows: list[Row] = []

    def write(ids: Sequence[int]) -> Iterator[int]:
        if rows:
            session.observe(rows[0], ids)
        else:
            rows.append(session.add(ids))
        row, place, over = rows[0], rows[0].known, False
        while not over:
            over = bool(session.advance(params, steps=STEPS))
            yield from row.tokens[place : row.known].tolist()
            place = row.known

    return write


def make_tools(names: Sequence[str], documents: str | None) -> list[Tool]:
    """The tools of `TOOLS` with these names.

    Args:
      documents: what `search` finds: a text file with a passage in each line, or a corpus as `data.read_records` reads
        it.

    Raises:
      ValueError: an unknown name, `search` without documents or documents without `search`.
      RuntimeError: this machine lacks what holds Python programs.
    """
    if unknown := sorted(set(names) - set(TOOLS)):
        raise ValueError(f"there is no tool {unknown[0]!r}; there are {', '.join(TOOLS)}")
    if ("search" in names) != (documents is not None):
        raise ValueError("the tool search and --documents go together: give both or neither")
    found: list[Tool] = []
    for name in names:
        if name == "calculator":
            found.append(calculator_tool())
        elif name == "memory":
            found += memory_tools(KeyValueMemory())
        elif name == "python":
            found.append(python_tool(PythonSandbox()))
        else:
            passages, titles = _read_documents(Path(str(documents)))
            index = bm25_index(passages, titles=titles, stop_share=1.0)  # of few passages, most words stand in many
            found.append(search_tool(index, passages, titles=titles, k=min(3, len(passages))))
    return found


def _read_documents(path: Path) -> tuple[list[str], list[str] | None]:
    """Passages, and their titles if any has one."""
    if path.suffix == ".txt":
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()], None
    corpus = read_records(path, "corpus")
    titles = [row["title"] or "" for row in corpus]
    return [row["text"] for row in corpus], titles if any(titles) else None


def _options(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m jaxrl_llm.sampling.chat", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--model", required=True, help="folder of a checkpoint, or a model of the Hugging Face hub")
    parser.add_argument("--tools", default="", help=f"names with commas between them, of {', '.join(TOOLS)}")
    parser.add_argument("--documents", help="what search finds: .txt with a passage a line, or a corpus (.jsonl, ...)")
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), help="default: hermes with tools, chat without")
    parser.add_argument("--system", default="", help="a system message")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a turn (%(default)s)")
    parser.add_argument("--context", type=int, default=4096, help="tokens of a conversation, at most (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random draws (%(default)s)")
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if the context is full or the model cannot be used, 130 after Ctrl-C."""
    parser, options = _options(arguments)
    console = rich.console.Console(markup=False, highlight=False)
    try:
        tools = make_tools([name for name in options.tools.split(",") if name], options.documents)
        decoding = Decoding(temperature=options.temperature) if options.temperature else Decoding(greedy=True)
    except (ValueError, RuntimeError, OSError) as error:
        parser.error(str(error))

    def ask() -> str | None:
        said = ""
        while not said.strip():
            try:
                said = console.input("> ")
            except EOFError:
                return None
        return said

    try:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        model = load(options.model, dtype=dtype)
        if model.tokenizer is None:
            raise ValueError(f"no tokenizer lies beside the weights of {options.model}")
        env = ToolEnv(
            protocol=PROTOCOLS[options.protocol or ("hermes" if tools else "chat")],
            tokenizer=model.tokenizer,
            tools=tools,
            system=options.system,
            reward=lambda trajectory: 0.0,
        )
        session = Session(
            model,
            jax.random.key(options.seed),
            max_length=options.context,
            max_turn_tokens=options.max_tokens,
            stop_sequences=env.stop_sequences,
            decoding=decoding,
            num_slots=1,
            cache_dtype=dtype,
        )
        converse(env, session_writer(session, model.params), ask, console)
    except ValueError as error:
        console.print(f"\n{error}", style="red")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
