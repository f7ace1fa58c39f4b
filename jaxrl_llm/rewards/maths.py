"""Scores of mathematical answers."""

from __future__ import annotations

import atexit
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from jaxrl_llm.rewards.parse import boxed_spans, extract_boxed
from jaxrl_llm.rewards.qa import check_golds, substring_match


def math_equal(pred: str, golds: Sequence[str], *, cpu_seconds: int = 5) -> float:
    """1 if `pred` and any gold are equal as mathematics, else 0; NaN if that could not be found out.

    Numbers, fractions, percentages, intervals, sets, equations and formulas, as plain text or LaTeX, are read and
    compared by Math-Verify (https://github.com/huggingface/Math-Verify), units and thousands separators aside.

    The answer is the last `\\boxed{...}` of `pred`, else what stands behind its last `####` (GSM8K), else `pred`
    itself. In a sentence it is the last number or formula.

    The comparison runs in a process beside this one, as sympy may not come to an end; any thread may call, one at a
    time is served. It gives up after `cpu_seconds` of processor time (whole seconds; a busy machine does not shorten
    it) or 4 GiB: NaN, which is no reward, rather than a 0 that a right answer might get.

    Raises:
      ValueError: `golds` is empty, or one of them is no mathematics, such as a name (for these `exact_match`).
      RuntimeError: the process does not start.
    """
    check_golds(golds)
    if cpu_seconds < 1:
        raise ValueError(f"cpu_seconds must be at least 1, got {cpu_seconds}")
    boxed = extract_boxed(pred)
    if boxed:
        answer = boxed[-1]
    else:
        answer = pred.rpartition("####")[2].strip().partition("\n")[0] if "####" in pred else pred
    job = {"answer": answer, "golds": list(golds), "cpu_seconds": cpu_seconds}
    verdict = _comparer.ask(json.dumps(job))
    if isinstance(verdict, str):
        raise ValueError(f"gold answer {verdict!r} cannot be read as mathematics; compare text with exact_match")
    return math.nan if verdict is None else float(verdict)


def boxed_containment_reward(
    text: str,
    golds: Sequence[str],
    *,
    max_extra: int = 128,
    max_tail: int = 32,
    two_way: bool = True,
    min_chars: int = 3,
) -> float:
    """1 if the one `\\boxed{...}` of `text` contains a gold, by characters, else 0 (LoongRL, 2025).

    0 also where there is no box or a second one, and where its content has a second opening brace, closing brace or
    backslash, is more than `max_extra` characters longer than the gold, or has more than `max_tail` characters behind
    it (the closing brace is one, white space at the end is none). Compared in `normalize_answer`'s style "plain".

    Args:
      two_way: a gold that contains the answer counts too, if the answer has `min_chars` characters or equals it.

    Raises:
      ValueError: `golds` is empty, or one of them has nothing but punctuation.
    """
    check_golds(golds)
    text = text.strip()
    spans = boxed_spans(text)
    if len(spans) != 1 or text.count(r"\boxed") != 1 or len(text) - spans[0].stop > max_tail:
        return 0.0
    answer = text[spans[0]]
    if any(answer.count(mark) > 1 for mark in "{}\\"):
        return 0.0
    fitting = [gold for gold in golds if len(answer) - len(gold) <= max_extra]
    score = {"style": "plain", "two_way": two_way, "min_chars": min_chars}
    return substring_match(answer, fitting, **score) if fitting else 0.0  # type: ignore[arg-type]


class _Comparer:
    """A process that compares answers, started when it is first asked and again after it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0  # a fork of this process must not share the pipes

    def ask(self, job: str) -> bool | str | None:
        """The answer to a line of JSON; None if the process ended over it."""
        with self._lock:
            process = self._running()
            try:
                print(job, file=process.stdin, flush=True)
                line = process.stdout.readline() if process.stdout else ""
            except BrokenPipeError:
                line = ""
            if not line:
                self.close()
                return None
            return json.loads(line)

    def close(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._owner != os.getpid():
            # -P: the folder of the program is not searched for modules
            program = [sys.executable, "-P", str(Path(__file__).with_name("maths_child.py"))]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
            self._owner = os.getpid()
            if self._process.stdout is None or self._process.stdout.readline() != "ready\n":
                self.close()
                raise RuntimeError(f"the process that compares answers did not start; try {' '.join(program)}")
        return self._process


_comparer = _Comparer()
atexit.register(_comparer.close)
