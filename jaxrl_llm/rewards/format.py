"""Whether a trace of tagged blocks follows a grammar."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class TagGrammar:
    """Which block may follow which.

    Attributes:
      follows: for every tag, and for `"start"`, the tags that may come next; `"end"` among them lets the trace end.

    Raises:
      ValueError: there is no start, or a tag is followed by one that the grammar does not describe.
    """

    follows: Mapping[str, frozenset[str]]

    def __post_init__(self) -> None:
        if "start" not in self.follows:
            raise ValueError(f"follows needs an entry 'start', got {sorted(self.follows)}")
        unknown = frozenset().union(*self.follows.values()) - set(self.follows) - {"end"}
        if unknown:
            raise ValueError(f"tags {sorted(unknown)} may follow but have no entry of their own in follows; add one")

    @property
    def tags(self) -> frozenset[str]:
        return frozenset(self.follows) - {"start"}


SEARCH_R1_GRAMMAR = TagGrammar(
    {
        "start": frozenset({"think"}),
        "think": frozenset({"search", "answer"}),
        "search": frozenset({"information"}),
        "information": frozenset({"think"}),
        "answer": frozenset({"end"}),
    }
)
"""think -> (search -> information -> think)* -> answer (Search-R1's format-aware reward, arXiv 2505.15117)."""


def tag_trace_ok(text: str, grammar: TagGrammar = SEARCH_R1_GRAMMAR) -> bool:
    """Whether `text` is a sequence of closed, unnested blocks in an order that `grammar` allows, with nothing but white
    space between them. `text` is the response alone: policy turns and observations, no prompt."""
    tags = re.compile("<(/?)(" + "|".join(sorted(grammar.tags, key=len, reverse=True)) + ")>")
    before, inside, end = "start", "", 0
    for match in tags.finditer(text):
        closing, tag = match.group(1) == "/", match.group(2)
        if inside:  # only the block's own closing tag may come
            if not closing or tag != inside:
                return False
            before, inside = tag, ""
        else:
            if closing or tag not in grammar.follows[before] or text[end : match.start()].strip():
                return False
            inside = tag
        end = match.end()
    return not inside and "end" in grammar.follows[before] and not text[end:].strip()
