"""Scores of a short answer against gold answers: exact match, containment, token F1, and Search-R1's format ladder.

Over several golds a score is always that of the best one.
"""

from __future__ import annotations

import re
import string
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from jaxrl_llm.rewards.format import SEARCH_R1_GRAMMAR, TagGrammar, tag_trace_ok
from jaxrl_llm.rewards.parse import extract_tags
from jaxrl_llm.types import Span

Style = Literal["squad", "kilt", "dpr", "plain"]
Unit = Literal["char", "word"]
ARTICLES = frozenset({"a", "an", "the"})
_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPACE_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))
_QUOTES = str.maketrans(dict.fromkeys("‘’‚‛`´", "'") | dict.fromkeys("“”„‟«»", '"'))


def plain_words(text: str) -> list[str]:
    """Words of `text` for search and scoring: lower case, ASCII punctuation deleted, split at white space."""
    return text.lower().translate(_DELETE_PUNCTUATION).split()


def _ascii_marks(text: str) -> str:
    """Hyphens, quotes and spaces of Unicode as their ASCII relatives."""
    text = text.translate(_QUOTES)
    kinds = {"Pd": "-", "Zs": " "}
    return "".join(kinds.get(unicodedata.category(c), c) for c in text)


def normalize_answer(s: str, style: Style = "squad") -> str:
    """The form in which answers are compared: lower case, no punctuation, no articles, single spaces, in this order.

    `squad` (Search-R1, FlashRAG, ALCE) deletes the 32 ASCII punctuation marks, `kilt` puts a space in their place;
    `dpr` first folds Unicode hyphens, quotes and spaces to ASCII, then does as `kilt`; `plain` (LoongRL) does as `kilt`
    but keeps articles. Articles go after punctuation, so `a.` is one; a string of articles only becomes the empty
    string. Accents stay.

    Raises:
      ValueError: another style.
    """
    if style == "squad":
        words = plain_words(s)
    elif style in ("kilt", "plain"):
        words = s.lower().translate(_SPACE_PUNCTUATION).split()
    elif style == "dpr":
        words = _ascii_marks(s.lower()).translate(_SPACE_PUNCTUATION).split()
    else:
        raise ValueError(f"style must be 'squad', 'kilt', 'dpr' or 'plain', got {style!r}")
    return " ".join(word for word in words if style == "plain" or word not in ARTICLES)


def check_golds(golds: Sequence[str]) -> None:
    """Raises ValueError for a string in place of a sequence, and for a question without gold answers."""
    if isinstance(golds, str):
        raise ValueError(f"golds must be a sequence of strings, got the string {golds!r}; pass [{golds!r}]")
    if not golds:
        raise ValueError("golds is empty; a question needs at least one gold answer to be scored")


def _normalized_golds(golds: Sequence[str], style: Style, allow_empty: bool) -> list[str]:
    check_golds(golds)
    normalized = [normalize_answer(gold, style) for gold in golds]
    if "" in normalized:
        problem = f"gold answer {golds[normalized.index('')]!r} normalizes to the empty string"
        if not allow_empty:
            raise ValueError(f"{problem}, which every text contains; remove it")
        warnings.warn(f"{problem}: empty answers match it", stacklevel=3)
    return normalized


def exact_match(pred: str, golds: Sequence[str], *, style: Style = "squad") -> float:
    """1 if `pred` and any gold have the same normal form, else 0. Two strings that both normalize to nothing are equal.

    Raises:
      ValueError: `golds` is empty.
    """
    return float(normalize_answer(pred, style) in _normalized_golds(golds, style, allow_empty=True))


def substring_match(
    pred: str,
    golds: Sequence[str],
    *,
    style: Style = "squad",
    unit: Unit = "char",
    two_way: bool = False,
    min_chars: int = 1,
) -> float:
    """1 if the normal form of any gold is contained in that of `pred`, else 0.

    Args:
      unit: contained as a run of characters, or of whole words, so that `4` is not found in `42`.
      two_way: `pred` may also be contained in the gold (QwenLong-L1, LoongRL). It must then have at least `min_chars`
        characters, unless the two are equal; an empty one scores 0.

    Raises:
      ValueError: `golds` is empty, one of them normalizes to nothing, or an option is unknown.
    """
    if unit not in ("char", "word"):
        raise ValueError(f"unit must be 'char' or 'word', got {unit!r}")
    text = normalize_answer(pred, style)
    within = (lambda a, b: f" {a} " in f" {b} ") if unit == "word" else (lambda a, b: a in b)
    back = two_way and len(text) >= max(min_chars, 1)
    return float(
        any(
            within(gold, text) or (back and within(text, gold))
            for gold in _normalized_golds(golds, style, allow_empty=False)
        )
    )


def token_f1(
    pred: str,
    golds: Sequence[str],
    *,
    kind: Literal["multiset", "set"] = "multiset",
    style: Style = "squad",
    yes_no_rule: bool = False,
    empty_rule: Literal["zero", "equal"] = "zero",
) -> float:
    """Largest F1 of the words of `pred` with those of a gold, as multisets or as sets.

    Args:
      yes_no_rule: if either side is yes, no or noanswer and the two differ, that gold scores 0 (FlashRAG).
      empty_rule: where a side has no words, `zero` scores 0, `equal` scores 1 if neither has any (SQuAD 2, ALCE).

    Raises:
      ValueError: `golds` is empty, or an option is unknown.
    """
    if kind not in ("multiset", "set"):
        raise ValueError(f"kind must be 'multiset' or 'set', got {kind!r}")
    if empty_rule not in ("zero", "equal"):
        raise ValueError(f"empty_rule must be 'zero' or 'equal', got {empty_rule!r}")
    count = Counter if kind == "multiset" else lambda words: Counter(set(words))
    text = normalize_answer(pred, style)
    best = 0.0
    for gold in _normalized_golds(golds, style, allow_empty=True):
        if yes_no_rule and text != gold and {text, gold} & {"yes", "no", "noanswer"}:
            continue
        words, gold_words = count(text.split()), count(gold.split())
        total = words.total() + gold_words.total()
        if total == 0:
            best = max(best, float(empty_rule == "equal"))
        else:
            best = max(best, 2 * (words & gold_words).total() / total)
    return best


def retrieval_hit(passages: Sequence[str], golds: Sequence[str], *, k: int, style: Style = "squad") -> float:
    """1 if the normal form of any gold is a substring of one of the first `k` passages, else 0.

    Raises:
      ValueError: `k` is below 1, `golds` is empty, or one of them normalizes to nothing.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    wanted = _normalized_golds(golds, style, allow_empty=False)
    texts = [normalize_answer(passage, style) for passage in passages[:k]]
    return float(any(gold in text for gold in wanted for text in texts))


def em_format_reward(
    spans: Sequence[Span],
    golds: Sequence[str],
    *,
    structure: float = 0.2,
    final: float = 0.1,
    retrieval: float = 0.0,
    min_answers: int = 1,
    grammar: TagGrammar = SEARCH_R1_GRAMMAR,
) -> float:
    """Search-R1's format-aware reward (Jin et al. 2025, arXiv 2505.15117) of one trajectory.

    | answer | grammar holds | grammar broken |
    | --- | --- | --- |
    | right | 1 | 1 - structure |
    | wrong | structure (+ retrieval) | final |
    | none | structure (+ retrieval) | 0 |

    `retrieval` is added if an information block of an observation contains a gold. The answer is the content of the
    last `<answer>` pair inside a policy span, so a gold that only a tool wrote earns nothing; a policy that writes an
    information block itself breaks the grammar (these two are our rules).

    Args:
      spans: the trajectory, each run of text with its author.
      min_answers: how many answer pairs there must be: 1, counted in the policy's spans; from 2 on those of the prompt
        count too, for prompts that show examples (2 is the authors' setting).

    Raises:
      ValueError: `golds` is empty, a plain string is given as spans, or `min_answers` is below 1.
    """
    if isinstance(spans, str):
        raise ValueError("spans must be a sequence of Span, got a string; who wrote which text decides the reward")
    if min_answers < 1:
        raise ValueError(f"min_answers must be at least 1, got {min_answers}")
    policy = [span.text for span in spans if span.role == "policy"]
    answers = [answer for text in policy for answer in extract_tags(text, "answer")]
    prompts = [span.text for span in spans if span.role == "prompt"] if min_answers > 1 else []
    found = len(answers) + sum(len(extract_tags(text, "answer")) for text in prompts)

    response = "".join(span.text for span in spans if span.role != "prompt")
    valid = tag_trace_ok(response, grammar) and not any(re.search(r"</?information>", text) for text in policy)
    answered = bool(answers) and found >= min_answers
    if answered and exact_match(answers[-1], golds):
        return 1.0 if valid else 1.0 - structure
    if valid:
        blocks = [b for span in spans if span.role == "observation" for b in extract_tags(span.text, "information")]
        hit = bool(blocks) and bool(retrieval) and retrieval_hit(blocks, golds, k=len(blocks))
        return structure + (retrieval if hit else 0.0)
    return final if answered else 0.0
