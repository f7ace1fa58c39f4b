"""Reading tagged text: `<tag>content</tag>`. Broken tags are a parse result, never an exception."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Literal


@cache
def _pair(tag: str) -> re.Pattern[str]:
    if not re.fullmatch(r"[A-Za-z][\w-]*", tag):
        raise ValueError(f"tag must be a name such as 'answer', got {tag!r}; leave out the angle brackets")
    return re.compile(rf"<{tag}>(.*?)</{tag}>", re.DOTALL)


def extract_tags(text: str, tag: str) -> list[str]:
    """Contents of all closed `<tag>..</tag>` pairs, white space at their ends cut.

    Pairs do not nest: a pair runs from an opening tag to the first closing tag behind it.

    Raises:
      ValueError: `tag` is not a plain name.
    """
    return [content.strip() for content in _pair(tag).findall(text)]


def extract_tag(text: str, tag: str, which: Literal["first", "last"] = "last") -> str | None:
    """Content of the first or last closed `<tag>..</tag>` pair (as `extract_tags`), None if there is no such pair."""
    if which not in ("first", "last"):
        raise ValueError(f"which must be 'first' or 'last', got {which!r}")
    found = extract_tags(text, tag)
    return found[0 if which == "first" else -1] if found else None


def boxed_spans(text: str) -> list[slice]:
    r"""Where the contents of all `\boxed{...}` with closed braces are, in order; of nested ones the outer."""
    found: list[slice] = []
    opened: list[tuple[bool, int]] = []  # whether it is a box's brace, and where its content starts
    for match in re.finditer(r"(\\boxed\s*)?\{|\}", text):
        if match.group() != "}":
            opened.append((match.group(1) is not None, match.end()))
        elif opened:
            boxed, start = opened.pop()
            if boxed:
                while found and found[-1].start > start:
                    found.pop()
                found.append(slice(start, match.start()))
    return found


def extract_boxed(text: str) -> list[str]:
    r"""Contents of all `\boxed{...}` whose braces are closed, in order, white space at their ends cut; of nested
    ones the outer."""
    return [text[span].strip() for span in boxed_spans(text)]


def parse_action(text: str, tags: Sequence[str] = ("search", "answer")) -> tuple[str, str]:
    """The action that a turn takes: `(tag, content)` of the first pair of one of `tags`, or `("invalid", "")`.

    First means: whose opening tag comes first among those that are closed at all; the content runs to the first closing
    tag of that name, other tags inside it are plain text. This is Search-R1's rule (Jin et al. 2025, reference code); a
    turn that the sampler stops at the first closing tag holds at most one pair anyway.
    """
    matches = [(match.start(), tag, match.group(1).strip()) for tag in tags if (match := _pair(tag).search(text))]
    if not matches:
        return "invalid", ""
    _, tag, content = min(matches)
    return tag, content
