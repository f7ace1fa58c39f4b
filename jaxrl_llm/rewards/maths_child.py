"""The process that compares answers for `jaxrl_llm.rewards.maths`, started as a program of its own.

It reads a line of JSON, `{"answer", "golds", "cpu_seconds"}`, and writes one: true, false, or the gold that it cannot
read. sympy may take for ever, and inside one multiplication nothing in Python can stop it; the kernel can, when the
processor time is up, and then there is no answer.
"""

from __future__ import annotations

import json
import logging
import re
import resource
import sys
import time
from typing import Any

from math_verify import parse, verify

MEMORY_BYTES = 4 << 30
_MIXED_NUMBER = re.compile(r"(?<![\d./])(\d+) (\d+)/(\d+)\b")
_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{3,}")


def read(text: str) -> list[Any]:
    """What `text` may mean: a formula if it is short; if it has words, the last number or formula among them."""
    text = _MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", text.replace("−", "-").strip().rstrip("."))
    words, found = _WORD.search(text) is not None, []
    if not words or len(text.split()) <= 4:
        found += parse(rf"\boxed{{{text}}}", parsing_timeout=None)
    return found + parse(text, parsing_timeout=None) if words else found


def compare(answer: str, golds: list[str]) -> bool | str:
    """Whether the answer equals one of the golds; the first gold that cannot be read, if there is one."""
    given = read(answer)
    wanted = [read(gold) for gold in golds]
    if [] in wanted:
        return golds[wanted.index([])]
    return any(verify(gold, given, timeout_seconds=None) for gold in wanted)


def main() -> None:
    """Answers until standard input ends."""
    logging.disable()  # the library warns of every comparison without its own clock
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        spent = int(time.process_time()) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (spent + job["cpu_seconds"], resource.RLIM_INFINITY))
        print(json.dumps(compare(job["answer"], job["golds"])), flush=True)


if __name__ == "__main__":
    main()
