"""A language model as a judge by a rubric, and another that rewrites the rubric where it was gamed or blind.

A model is a function `chat(text) -> text`, whichever serves it; a rubric is the texts of its items.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxrl_llm.rewards.parse import extract_tag, extract_tags

Chat = Callable[[str], str]


class Judged(NamedTuple):
    """An answer and what a judge said of it."""

    task: str
    answer: str
    score: int
    evaluations: tuple[str, ...]  # the judge's words, an item each


def judge_by_rubric(chat: Chat, task: str, answer: str, rubric: Sequence[str]) -> Judged:
    """The sum of whole points over the items, each judged by itself; what gives no number counts 0 (MPO, 2025)."""
    said = tuple(
        chat(
            f"Task:\n{task}\n\nAnswer:\n{answer}\n\nJudge the answer by this item alone:\n{item}\n\n"
            "Give your reasons, then the points as <score>number</score>."
        )
        for item in rubric
    )
    found = [extract_tag(text, "score") or "" for text in said]
    return Judged(task, answer, sum(int(text) for text in found if re.fullmatch(r"[+-]?\d+", text)), said)


def revise_rubric(
    chat: Chat, samples: Sequence[Judged], rubric: Sequence[str], *, max_words: int = 25_000 * 2 // 3
) -> list[str]:
    """`Merge({Refine(Analyze(sample, rubric))})`: a revision for each sample, then one rubric of them all (MPO, 2025).

    Items that come twice are left out. If nothing is left the rubric stays as it is, with a warning.

    Args:
      max_words: of all revisions together; the rest is not merged.
    """
    current, revised = _listed(rubric), []
    for sample in samples:
        shown = (
            f"Rubric:\n{current}\n\nTask:\n{sample.task}\n\nAnswer:\n{sample.answer}\n\nScore: {sample.score}\n\n"
            + "\n".join(sample.evaluations)
        )
        analysis = chat(f"{shown}\n\nWhere was the rubric gamed here, and to what was it blind?")
        revised += extract_tags(
            chat(f"{shown}\n\nAnalysis:\n{analysis}\n\nRewrite the rubric, each item as <item>text</item>."), "item"
        )
    words = " ".join(_listed(dict.fromkeys(revised)).split(" ")[:max_words])
    merged = chat(f"Merge these items into one rubric without repetitions, each as <item>text</item>:\n{words}")
    items = [item for item in dict.fromkeys(extract_tags(merged, "item")) if item]
    if not items:
        warnings.warn("the merged rubric has no item; the one before it stays", RuntimeWarning, stacklevel=2)
        return list(rubric)
    return items


def _listed(items: Sequence[str] | dict[str, None]) -> str:
    return "\n".join(f"<item>{item}</item>" for item in items)
